"""``fusedres eval``: each protocol against views and averages written out with pillow and plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cifar_data import WEIGHTS, trained
from cifar_data import images as cifar_images
from test_inference import seasoned
from torch import Tensor, nn
from views_case import logits, mean_probabilities, mirrored, one_crop, resized, ten_crops, whole

import fusedres
from fusedres.cli import eval as command
from fusedres.cli import main
from fusedres.training.normalise import Normalisation

CLASSES = 6
# one thread: what waits for another one takes long on a busy machine
QUICK = ("--threads", "1", "--device", "cpu")
SIZES = [(300, 260), (260, 300), (250, 250), (300, 260), (100, 90), (240, 400), (300, 260), (331, 97)]  # h, w


class Ran(NamedTuple):
    found: dict[str, Any]
    scores: Tensor  # [images, members, classes], in the order of the images
    out: str
    err: str


@pytest.fixture
def evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Run the command; what it found out and every score."""
    seen: dict[int, Tensor] = {}
    score = command.score

    def spy(*given: Any) -> Iterator[tuple[list[int], Tensor]]:
        for indices, scores in score(*given):
            assert not seen.keys() & set(indices)
            seen.update(zip(indices, scores, strict=True))
            yield indices, scores

    monkeypatch.setattr(command, "score", spy)

    def run(*argv: object) -> Ran:
        seen.clear()
        path = tmp_path / "found.json"
        assert main([str(arg) for arg in ("eval", *QUICK, *argv, "--json", path)]) == 0
        scores = torch.stack([seen[index] for index in sorted(seen)])
        return Ran(json.loads(path.read_text()), scores, *capsys.readouterr())

    return run


def assert_same(scores: Tensor, expected: list[Tensor]) -> None:
    torch.testing.assert_close(scores[:, 0], torch.stack(expected), rtol=1e-3, atol=1e-5)


# real photographs of several sizes, and an ImageNet net that is sure of what it sees


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subfolder for each class; sizes of images differ."""
    pytest.importorskip("PIL.Image")
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for index in range(CLASSES):
        (folder / f"thing {index}").mkdir()
    sources = datasets.load_sample_images().images
    for index, (height, width) in enumerate(SIZES):
        source = sources[index % 2]
        top, left = 13 * index, 31 * index
        pixels = source[top : top + height, left : left + width]
        assert pixels.shape == (height, width, 3)
        Image.fromarray(pixels).save(folder / f"thing {index * CLASSES // len(SIZES)}" / f"{index}.png")
    return folder


def opened(folder: Path) -> list[Any]:
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*/*.png"))]


@torch.no_grad()
def decided(net: nn.Module) -> nn.Module:
    """Whose classes differ from view to view: the mean of probabilities is not that of logits."""
    x = nn.functional.interpolate(torch.randn(16, 3, 8, 8), size=96, mode="bilinear")
    net.fc.weight *= 50
    net.fc.bias -= net(x).mean(0)
    return net


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return decided(seasoned(fusedres.ResNet18(num_classes=CLASSES)))


@pytest.fixture(scope="module")
def checkpoint(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "net.pt"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def of_photos(evaluate: Any, checkpoint: Path, photos: Path) -> Callable[..., Ran]:
    return lambda *argv: evaluate(
        "--model", "resnet18", "--checkpoint", checkpoint, "--data", photos, "--batch", "7", *argv
    )


def test_the_crop_in_the_centre(of_photos: Any, net: nn.Module, photos: Path) -> None:
    images = opened(photos)
    expected = [mean_probabilities(net, one_crop(image, 224, 256)) for image in images]
    ran = of_photos()
    assert_same(ran.scores, expected)
    labels = torch.tensor([index * CLASSES // len(SIZES) for index in range(len(SIZES))])
    right = (torch.stack(expected).argmax(1) == labels).sum()
    assert ran.found["result"]["top1"]["correct"] == right
    assert [entry["images"] for entry in ran.found["per_class"]] == labels.bincount().tolist()

    smaller = of_photos("--size", "64", "--flip")
    # the shorter side is in proportion: 64 of 73 px, as 224 of 256
    views = [one_crop(image, 64, 73) for image in images]
    assert_same(smaller.scores, [mean_probabilities(net, v + [mirrored(v[0])]) for v in views])


def test_ten_crops(of_photos: Any, net: nn.Module, photos: Path) -> None:
    expected = [mean_probabilities(net, ten_crops(image, 96, 128)) for image in opened(photos)]
    one = torch.stack([mean_probabilities(net, one_crop(image, 96, 128)) for image in opened(photos)])
    assert (torch.stack(expected) - one).abs().max() > 0.01
    for batch in ("1", "64"):  # fewer views than an image has, and views of several images
        ran = of_photos("--crops", "10", "--size", "96", "--resize", "128", "--batch", batch)
        assert_same(ran.scores, expected)
    member = ran.found["members"][0]
    assert (member["size"], member["resize"], ran.found["settings"]["flip"]) == (96, 128, True)
    assert "10 crops, 96 of 128 px" in ran.out


@pytest.mark.parametrize("batch", ["1", "5", "64"])
def test_whole_images_at_several_scales(of_photos: Any, net: nn.Module, photos: Path, batch: str) -> None:
    scales = (64, 96, 160)
    expected = [mean_probabilities(net, whole(image, scales)) for image in opened(photos)]
    ran = of_photos("--crops", "full", "--scales", "64,96,160", "--batch", batch)
    assert_same(ran.scores, expected)
    assert "whole images with shorter sides of 64, 96, 160 px and mirror images" in ran.out
    if batch == "64":
        unflipped = [
            mean_probabilities(net, [resized(image, scale) for scale in scales]) for image in opened(photos)
        ]
        assert (torch.stack(unflipped) - torch.stack(expected)).abs().max() > 0.01
        assert_same(of_photos("--crops", "full", "--scales", "64,96,160", "--no-flip").scores, unflipped)


def test_the_default_scales_are_the_papers(of_photos: Any, net: nn.Module, photos: Path) -> None:
    ran = of_photos("--crops", "full", "--limit", "1")
    (image,) = opened(photos)[:1]
    assert_same(ran.scores, [mean_probabilities(net, whole(image, (224, 256, 384, 480, 640)))])


def test_a_larger_image_is_the_mean_over_positions(net: nn.Module, photos: Path) -> None:
    """Global average pooling and then the classifier: the classifier at every position, and then the mean."""
    image = opened(photos)[1]
    features: list[Tensor] = []
    hook = net.layer4.register_forward_hook(lambda module, given, out: features.append(out))
    out = logits(net, image)
    hook.remove()
    scores = torch.nn.functional.conv2d(features[0], net.fc.weight.detach()[:, :, None, None], net.fc.bias)
    assert scores.shape[2:] > (7, 7)
    torch.testing.assert_close(scores.mean((0, 2, 3)), out, rtol=1e-4, atol=1e-4)


def test_logits_are_averaged_when_asked_for(of_photos: Any, net: nn.Module, photos: Path) -> None:
    given = ("--crops", "10", "--size", "96", "--resize", "128")
    views = [ten_crops(image, 96, 128) for image in opened(photos)]
    expected = [torch.stack([logits(net, view) for view in of_image]).mean(0) for of_image in views]
    ran = of_photos(*given, "--average", "logits")
    assert_same(ran.scores, expected)
    probabilities = torch.stack([mean_probabilities(net, of_image) for of_image in views])
    assert (torch.stack(expected).softmax(1) - probabilities).abs().max() > 0.01


@pytest.mark.parametrize(
    ("argv", "batch", "largest"),
    [
        # of the 8 photographs 3 have one size; mirror images go with them
        (("--crops", "full", "--scales", "64"), 8, 6),
        (("--crops", "full", "--scales", "64"), 5, 4),
        (("--crops", "full", "--scales", "64"), 1, 1),
        (("--crops", "10", "--size", "64"), 25, 20),
        (("--crops", "10", "--size", "64"), 3, 2),
        (("--size", "64"), 5, 5),
    ],
)
def test_views_of_one_size_share_a_call(
    argv: tuple[str, ...], batch: int, largest: int, of_photos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    optimise = fusedres.optimize_for_inference

    def spy(*given: Any, **settings: Any) -> nn.Module:
        net = optimise(*given, **settings)
        net.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
        return net

    monkeypatch.setattr(fusedres, "optimize_for_inference", spy)
    of_photos(*argv, "--batch", batch)
    assert max(seen) == largest <= batch


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dtypes(of_photos: Any, dtype: str) -> None:
    single, half = (of_photos("--size", "64", "--dtype", name).scores for name in ("fp32", dtype))
    assert 0 < (single - half).abs().max() < 0.2


# ensembles


def test_an_ensemble_is_the_mean_of_probabilities(
    evaluate: Any, photos: Path, net: nn.Module, checkpoint: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = decided(seasoned(fusedres.ResNet34(num_classes=CLASSES)))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    given = ("--model", "resnet18", "--model", "resnet34", "--size", "64", "--data", photos)
    given += ("--checkpoint", checkpoint, "--checkpoint", tmp_path / "other.pt")
    ran = evaluate(*given)
    views = [one_crop(image, 64, 73) for image in opened(photos)]
    of_nets = [[mean_probabilities(one, of_image) for of_image in views] for one in (net, other)]
    for side in (0, 1):
        assert_same(ran.scores[:, side : side + 1], of_nets[side])
    labels = torch.tensor([index * CLASSES // len(SIZES) for index in range(len(SIZES))])
    mean = (torch.stack(of_nets[0]) + torch.stack(of_nets[1])) / 2
    sides = [*map(torch.stack, of_nets), mean]
    expected = [int((side.argmax(1) == labels).sum()) for side in sides]
    top5 = [int((side.topk(5).indices == labels[:, None]).sum()) for side in sides]
    found = [*ran.found["members"], ran.found["result"]]
    assert [figures["top1"]["correct"] for figures in found] == expected
    assert [figures["top5"]["correct"] for figures in found] == top5
    assert [member["model"] for member in ran.found["members"]] == ["resnet18", "resnet34"]
    rows = ran.out.splitlines()[-3:]
    assert rows[2].startswith("ensemble of 2, mean of probabilities")
    assert [int(row.split()[-4]) for row in rows] == expected


def test_members_read_images_in_their_own_way(
    evaluate: Any, net: nn.Module, photos: Path, tmp_path: Path
) -> None:
    """Each by its own size and normalisation."""
    weights = net.state_dict()
    normalisation = Normalisation(torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25))
    facts = {"net": {"name": "resnet18"}, "size": 80, "resize": None}
    torch.save({"model": weights, **facts, "normalisation": normalisation.state_dict()}, tmp_path / "a.pt")
    torch.save({"model": weights, "net": {"name": "resnet18"}, "size": 64}, tmp_path / "b.pt")
    ran = evaluate("--data", photos, "--checkpoint", tmp_path / "a.pt", "--checkpoint", tmp_path / "b.pt")
    from PIL import Image

    images = opened(photos)
    assert_same(ran.scores[:, 1:], [mean_probabilities(net, one_crop(image, 64, 73)) for image in images])
    squares = [np.asarray(image.resize((80, 80), Image.Resampling.BILINEAR)) for image in images]
    x = (torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad(), fusedres.backend("reference"):
        assert_same(ran.scores, [*net(x).softmax(1)])
    assert [(member["size"], member["resize"]) for member in ran.found["members"]] == [(80, None), (64, 73)]


def test_a_per_pixel_mean_is_taken_from_each_view(
    evaluate: Any, net: nn.Module, photos: Path, tmp_path: Path
) -> None:
    """From the mirror image too, which is not the mirror image of the difference."""
    torch.manual_seed(2)
    mean = torch.rand(3, 64, 64)
    state = {"mean": mean, "std": torch.full((3, 1, 1), 0.5)}
    facts = {"net": {"name": "resnet18"}, "size": 64, "resize": 80, "normalisation": state}
    torch.save({"model": net.state_dict(), **facts}, tmp_path / "net.pt")
    ran = evaluate("--data", photos, "--checkpoint", tmp_path / "net.pt", "--crops", "10", "--limit", "2")
    images = opened(photos)
    for index, image in enumerate((images[0], images[len(images) // 2])):
        crops = np.stack([np.asarray(crop) for crop in ten_crops(image, 64, 80)])
        x = (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - mean) / 0.5
        with torch.no_grad(), fusedres.backend("reference"):
            expected = net(x).softmax(1).mean(0)
        torch.testing.assert_close(ran.scores[index, 0], expected, rtol=1e-3, atol=1e-5)


# trained weights


def test_trained_weights_on_the_test_images(data: Path, evaluate: Any) -> None:
    given = ["--data", data / "cifar10_test.npz"]
    for depth in (20, 56):
        given += ["--model", f"resnet{depth}", "--checkpoint", data / WEIGHTS[depth]]
    ran = evaluate(*given)
    found = [*ran.found["members"], ran.found["result"]]
    expected = (9_173, 9_339, 9_401)
    assert tuple(figures["top1"]["correct"] for figures in found) == expected
    for figures, right, row in zip(found, expected, ran.out.splitlines()[-3:], strict=True):
        assert figures["top1"]["error_percent"] == pytest.approx((10_000 - right) / 100)
        assert row.split()[-4:-2] == [f"{right:,}", f"{(10_000 - right) / 100:.2f}"]
    assert ran.found["data"]["images"] == 10_000
    assert [entry["images"] for entry in ran.found["per_class"]] == [1000] * 10
    assert sum(entry["top1"] for entry in ran.found["per_class"]) == expected[-1]


def test_protocols_and_an_ensemble_on_the_test_images(data: Path, evaluate: Any) -> None:
    Image = pytest.importorskip("PIL.Image")
    nets = []
    for depth in (20, 56):
        nets.append(fusedres.CifarResNet(depth, zeros="split").eval())
        nets[-1].load_state_dict(trained(data, depth))
    with np.load(data / "cifar10_test.npz") as arrays:
        chosen = np.arange(0, 10_000, 400)  # as --limit spreads them
        images = [Image.fromarray(pixels) for pixels in arrays["images"][chosen]]
        labels = torch.from_numpy(arrays["labels"][chosen])
    given = ["--data", data / "cifar10_test.npz", "--limit", "25"]
    for depth in (20, 56):
        given += ["--model", f"resnet{depth}", "--checkpoint", data / WEIGHTS[depth]]
    for argv, views in (
        (("--crops", "10", "--size", "32", "--resize", "40"), lambda image: ten_crops(image, 32, 40)),
        (("--crops", "full", "--scales", "32,40"), lambda image: whole(image, (32, 40))),
        (("--resize", "36"), lambda image: one_crop(image, 32, 36)),
        ((), lambda image: [image]),
    ):
        ran = evaluate(*given, *argv)
        of_nets = [torch.stack([mean_probabilities(net, views(image)) for image in images]) for net in nets]
        torch.testing.assert_close(ran.scores, torch.stack(of_nets, 1), rtol=1e-3, atol=1e-5)
        of_nets.append((of_nets[0] + of_nets[1]) / 2)
        found = [*ran.found["members"], ran.found["result"]]
        assert [figures["top1"]["correct"] for figures in found] == [
            int((scores.argmax(1) == labels).sum()) for scores in of_nets
        ]
    x, _ = cifar_images(data, "cifar10_test.npz")
    with torch.no_grad():
        torch.testing.assert_close(ran.scores[:, 1], nets[1](x[::400]).softmax(1), rtol=1e-3, atol=1e-5)
