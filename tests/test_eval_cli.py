"""``fusedres eval``: what it prints and writes, and every input that it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import fails, needs
from test_inference import seasoned

import fusedres
from fusedres.cli import images, labels, main

CLASSES = 7
QUICK = ("--threads", "1", "--device", "cpu")


def pixels(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def net(classes: int = CLASSES) -> fusedres.CifarResNet:
    torch.manual_seed(0)
    return seasoned(fusedres.CifarResNet(8, zeros="split", num_classes=classes))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "net.th"
    torch.save({"state_dict": net().state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "images.npz"
    np.savez(path, images=pixels(20), labels=np.arange(20) % (CLASSES - 1))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images in a subfolder for each class."""
    Image = pytest.importorskip("PIL.Image")
    for index, image in enumerate(pixels(2 * CLASSES, 40)):
        subfolder = tmp_path / "classes" / f"thing {index // 2}"
        subfolder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(subfolder / f"{index}.png")
    return tmp_path / "classes"


@pytest.fixture
def evaluate(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str, str]]:
    """Run it on the small net; its JSON and what it printed on stdout and stderr."""

    def run(*argv: object) -> tuple[dict[str, Any], str, str]:
        path = tmp_path / "found.json"
        common = ("eval", "--model", "resnet8", "--checkpoint", checkpoint, *QUICK, "--json", path)
        assert main([str(arg) for arg in (*common, *argv)]) == 0
        return json.loads(path.read_text()), *capsys.readouterr()

    return run


@pytest.fixture
def refused(checkpoint: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run it with wrong input; its line."""

    def run(*argv: object, weights: Path = checkpoint, data: Path = archive, status: int = 2) -> str:
        common = ("eval", "--model", "resnet8", "--checkpoint", weights, "--data", data, *QUICK)
        got, line = fails(capsys, *common, *argv)
        assert got == status
        return line

    return run


# what it says


def test_what_is_printed_is_what_is_written(evaluate: Any, archive: Path) -> None:
    found, out, err = evaluate("--data", archive, "--batch", "6", "--per-class")
    x = torch.from_numpy(pixels(20)).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    with torch.no_grad():
        scores = net()(x)
    truth = torch.arange(20) % (CLASSES - 1)
    top1 = scores.argmax(1) == truth
    top5 = (scores.topk(5).indices == truth[:, None]).any(1)
    for name, right in (("top1", top1), ("top5", top5)):
        figures = found["result"][name]
        assert figures["correct"] == right.sum()
        assert figures["accuracy"] == pytest.approx(right.float().mean().item())
        assert figures["error_percent"] == pytest.approx(100 - 100 * figures["accuracy"])
        of_classes = [int(right[truth == index].sum()) for index in range(CLASSES)]
        assert [entry[name] for entry in found["per_class"]] == of_classes
    assert [entry["images"] for entry in found["per_class"]] == [4, 4, 3, 3, 3, 3, 0]

    lines = out.splitlines()
    assert lines[0].startswith(f"20 images of {archive}, 7 classes, 1 crop, 32 px, fp32")
    assert f"{found['images_per_second']:,.1f} images/s" in lines[1]
    assert lines[3].split() == ["top-1", "top-1", "err.", "%", "top-5", "top-5", "err.", "%"]
    cells = [f"{int(top1.sum())}", f"{100 - 5 * int(top1.sum()):.2f}"]
    cells += [f"{int(top5.sum())}", f"{100 - 5 * int(top5.sum()):.2f}"]
    assert lines[4].startswith("resnet8, ") and lines[4].split()[-4:] == cells
    assert lines[6].startswith("class") and len(lines) == 7 + CLASSES
    assert lines[-1].split() == ["class", "6", "0", "0", "-", "0", "-"]
    assert err == ""
    assert found["settings"] == {
        "crops": "1",
        "scales": None,
        "flip": False,
        "average": "probabilities",
        "device": "cpu",
        "dtype": "fp32",
        "batch": 6,
        "limit": None,
    }
    assert found["machine"]["threads"] == 1 and found["versions"]["torch"] == torch.__version__
    (member,) = found["members"]
    assert (member["model"], member["zeros"], member["size"], member["resize"]) == (
        "resnet8",
        "split",
        32,
        None,
    )
    assert member["std"] == pytest.approx([0.229, 0.224, 0.225])
    assert member["top1"] == found["result"]["top1"]


def test_five_classes_have_no_top_5(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "images.npz", images=pixels(5), labels=np.arange(5))
    torch.save(net(5).state_dict(), tmp_path / "net.pt")
    argv = ("eval", "--model", "resnet8", "--checkpoint", tmp_path / "net.pt", *QUICK)
    argv += ("--data", tmp_path / "images.npz", "--json", tmp_path / "found.json")
    assert main([str(arg) for arg in argv]) == 0
    assert "top-5" not in capsys.readouterr().out
    assert [*json.loads((tmp_path / "found.json").read_text())["result"]] == ["top1"]


def test_zeros_are_split_unless_told_otherwise(evaluate: Any, archive: Path) -> None:
    found = {zeros: evaluate("--data", archive, *zeros)[0] for zeros in ((), ("--zeros", "end"))}
    assert found[()]["members"][0]["zeros"] == "split"
    assert found["--zeros", "end"]["members"][0]["zeros"] == "end"


def test_images_that_cannot_be_read(evaluate: Any, folder: Path) -> None:
    (folder / "thing 2" / "4.png").write_text("no image")
    good = (folder / "thing 5" / "10.png").read_bytes()
    (folder / "thing 5" / "10.png").write_bytes(good[:200])
    found, out, err = evaluate("--data", folder, "--batch", "1", "--per-class")
    assert found["data"] | {"path": None} == {"path": None, "classes": 7, "images": 12, "left_out": 2}
    assert f"12 images of {folder} (2 left out)" in out
    notes = err.splitlines()
    assert [note.startswith("fusedres: note: left out: ") for note in notes] == [True, True]
    assert "4.png" in notes[0] and "10.png" in notes[1]
    assert [entry["images"] for entry in found["per_class"]] == [2, 2, 1, 2, 2, 1, 2]
    # the labels of those after it are still theirs
    for image in folder.glob("thing 2/*"):
        image.unlink()
    (folder / "thing 5" / "10.png").unlink()
    assert evaluate("--data", folder)[0]["result"]["top1"]["correct"] == (
        found["result"]["top1"]["correct"] - found["per_class"][2]["top1"]
    )


def test_an_image_too_long_to_be_resized(evaluate: Any, folder: Path) -> None:
    from PIL import Image

    for name, size in (("long", (1, 51)), ("wide", (510, 10)), ("fits", (500, 10))):
        Image.new("RGB", size).save(folder / "thing 0" / f"{name}.png")
    found, _, err = evaluate("--data", folder)
    assert found["data"]["left_out"] == 2 and found["data"]["images"] == 2 * CLASSES + 1
    assert "one side must be at most 50 times the other, got 1x51 px" in err


@pytest.mark.parametrize(
    ("probabilities", "average", "best"),
    [
        (([0.5, 0.05, 0.45], [0.05, 0.5, 0.45]), "probabilities", [0, 1, 2]),
        (([0.9, 0.0999, 0.0001], [0.0001, 0.4, 0.5999]), "probabilities", [0, 2, 0]),
        (([0.9, 0.0999, 0.0001], [0.0001, 0.4, 0.5999]), "logits", [0, 2, 1]),
    ],
)
def test_what_an_ensemble_decides(
    probabilities: tuple[list[float], ...], average: str, best: list[int], tmp_path: Path
) -> None:
    """Nets that say the same of every image: of each class as many are right as the data has of it."""
    counts = (1, 2, 4)
    np.savez(tmp_path / "images.npz", images=pixels(7), labels=np.repeat(range(3), counts))
    argv = ["eval", "--model", "resnet8", "--data", tmp_path / "images.npz", *QUICK, "--average", average]
    for index, of_net in enumerate(probabilities):
        weights = net(3).state_dict()
        weights |= {"fc.weight": torch.zeros(3, 64), "fc.bias": torch.tensor(of_net).log()}
        torch.save(weights, tmp_path / f"{index}.pt")
        argv += ["--checkpoint", tmp_path / f"{index}.pt"]
    assert main([str(arg) for arg in (*argv, "--json", tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    right = [figures["top1"]["correct"] for figures in (*found["members"], found["result"])]
    assert right == [counts[index] for index in best]


def test_names_of_classes(evaluate: Any, folder: Path, tmp_path: Path, archive: Path) -> None:
    found, out, _ = evaluate("--data", folder, "--per-class")
    assert [entry["label"] for entry in found["per_class"]] == [f"thing {index}" for index in range(CLASSES)]
    assert all(f"\nthing {index} " in out for index in range(CLASSES))
    file = tmp_path / "labels.txt"
    file.write_text("".join(f"kind {index}\n" for index in range(CLASSES)))
    for data in (folder, archive):
        found, out, _ = evaluate("--data", data, "--per-class", "--labels", file)
        assert found["per_class"][3]["label"] == "kind 3" and "\nkind 3 " in out


@needs("torchvision")
def test_names_of_imagenets_classes() -> None:
    names = labels.names(None, 1000)
    assert names is not None and names[281] == "tabby"


def test_a_limit_takes_images_at_even_distances(evaluate: Any, folder: Path) -> None:
    found = evaluate("--data", folder, "--limit", str(CLASSES))[0]
    assert [entry["images"] for entry in found["per_class"]] == [1] * CLASSES
    assert evaluate("--data", folder, "--limit", "99")[0]["data"]["images"] == 2 * CLASSES
    spread = images.find(folder, "--data", CLASSES).spread(3)
    assert [path.name for path in spread.items] == ["0.png", "4.png", "9.png"]
    assert spread.labels.tolist() == [0, 2, 4]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("crops", [("1",), ("10", "--resize", "33"), ("full", "--scales", "1,9")])
def test_every_protocol_in_every_dtype(
    evaluate: Any, folder: Path, crops: tuple[str, ...], dtype: str
) -> None:
    given = ("--data", folder, "--dtype", dtype, "--batch", "3", "--crops", *crops)
    assert evaluate(*given)[0]["data"]["images"] == 2 * CLASSES


def test_a_net_in_fp32_has_no_tf32(evaluate: Any, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    score = fusedres.cli.eval.score

    def spy(*given: Any) -> Any:
        seen.append(torch.backends.cudnn.allow_tf32)
        return score(*given)

    monkeypatch.setattr(fusedres.cli.eval, "score", spy)
    before = torch.backends.cudnn.allow_tf32
    evaluate("--data", archive)
    assert seen == [False] and torch.backends.cudnn.allow_tf32 == before


# what it refuses


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "--data"),
        (("--data", "a"), "--checkpoint --weights"),
        (("--data", "a", "--weights", "b", "--checkpoint", "c"), "not allowed with"),
        (("--model", "resnet21"), "resnet21"),
        (("--crops", "5"), "'5'"),
        (("--size", "0"), "at least 1, got '0'"),
        (("--scales", "224,x"), "at least 1, got 'x'"),
        (("--scales", ""), "at least 1, got ''"),
        (("--batch", "0"), "at least 1, got '0'"),
        (("--limit", "0"), "at least 1, got '0'"),
        (("--dtype", "int8"), "int8"),
    ],
)
def test_a_bad_command_line(argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = fails(capsys, "eval", *argv)
    assert status == 2 and said in line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--scales", "32"), "--scales is for --crops full, got --crops 1"),
        (("--crops", "full", "--size", "32"), "give --scales instead of --size and --resize"),
        (("--crops", "full"), "--crops full needs --scales for resnet8, a net for CIFAR"),
        (("--crops", "10", "--no-flip", "--resize", "40"), "leave out --no-flip"),
        (("--crops", "10"), "--crops 10 needs a --resize above the crops' size, 32 px"),
        (("--crops", "10", "--resize", "32"), "a --resize above the crops' size, 32 px, got 32"),
        (("--resize", "31"), "--resize must be at least the crop's size, 32 px, got 31"),
        (("--model", "resnet14", "--checkpoint", "b", "--checkpoint", "c"), "got 2 for 3"),
        (("--json", "no/such/folder/out.json"), "there is no directory"),
        (("--json", "."), "is a directory"),
        (("--labels", "no-such.txt"), "can't read --labels"),
    ],
)
def test_options_that_do_not_fit(argv: tuple[str, ...], said: str, refused: Any) -> None:
    assert said in refused(*argv)


def test_data_that_does_not_fit(refused: Any, folder: Path, archive: Path, tmp_path: Path) -> None:
    assert "--data: there is no" in refused(data=tmp_path / "missing")
    (tmp_path / "text.txt").write_text("no images")
    assert "--data must be a folder of images or an .npz" in refused(data=tmp_path / "text.txt")
    (tmp_path / "damaged.npz").write_bytes(archive.read_bytes()[:2000])
    assert "is no .npz that numpy reads" in refused(data=tmp_path / "damaged.npz")
    for wrong in (CLASSES, -1):
        np.savez(tmp_path / "labels.npz", images=pixels(2), labels=np.array([0, wrong]))
        assert "must be from 0 to 6, the net's classes, got" in refused(data=tmp_path / "labels.npz")
    np.savez(tmp_path / "none.npz", images=pixels(2))
    assert "has no array labels" in refused(data=tmp_path / "none.npz")
    (folder / "an eighth").mkdir()
    assert "a subfolder for each of the net's 7 classes, got 8" in refused(data=folder)
    for image in folder.glob("*/*.png"):
        image.unlink()
    (folder / "an eighth").rmdir()
    assert "has no images" in refused(data=folder)


def test_no_image_that_can_be_read(
    folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in folder.glob("*/*.png"):
        image.write_text("no image")
    argv = ("eval", "--model", "resnet8", "--checkpoint", checkpoint, "--data", folder)
    assert main([str(arg) for arg in argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2 * CLASSES + 1
    assert err.splitlines()[-1] == f"fusedres: error: none of the images in {folder} can be read"


def test_nets_of_other_classes(refused: Any, tmp_path: Path) -> None:
    torch.save(net(5).state_dict(), tmp_path / "net.pt")
    said = refused("--checkpoint", tmp_path / "net.pt")
    assert "the nets of an ensemble must have the same classes" in said
    assert "net.th has 7" in said and "net.pt 5" in said


def test_outputs_that_are_not_finite(refused: Any, tmp_path: Path) -> None:
    weights = net().state_dict()
    weights["fc.weight"] = torch.full_like(weights["fc.weight"], 3e38)
    torch.save(weights, tmp_path / "net.pt")
    said = refused(weights=tmp_path / "net.pt", status=1)
    assert "net.pt gives values that are not finite, in fp32" in said


def test_a_backend_that_cannot_serve(refused: Any) -> None:
    with fusedres.backend("cuda"):
        assert "backend 'cuda' can't serve" in refused(status=1)


def test_without_pillow(refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert "needs pillow: pip install pillow" in refused("--resize", "40", status=1)
    assert "needs pillow: pip install pillow" in refused(data=tmp_path, status=1)


def test_out_of_memory(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(fusedres.cli.eval, "score", full)
    assert "out of memory, try a smaller --batch: " in refused(status=1)
    given = ("--crops", "full", "--scales", "32")
    assert "out of memory, try a smaller --batch or --scales: " in refused(*given, status=1)


def test_a_disk_that_is_full(
    checkpoint: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(path: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    argv = ("eval", "--model", "resnet8", "--checkpoint", checkpoint, "--data", archive, *QUICK)
    assert main([str(arg) for arg in (*argv, "--json", tmp_path / "found.json")]) == 1
    err = capsys.readouterr().err
    assert (
        err == f"fusedres: error: can't write {tmp_path / 'found.json'}: [Errno 28] No space left on device\n"
    )
    assert not list(tmp_path.iterdir())
