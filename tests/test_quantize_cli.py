"""``fusedres quantize``: what it prints, what it writes, and every input that it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cifar_data import WEIGHTS
from test_cli import fails
from test_inference import seasoned

import fusedres
from fusedres.cli import images, main
from fusedres.cli.views import CIFAR, IMAGENET
from fusedres.inference import onednn
from fusedres.training import files
from fusedres.training.normalise import IMAGENET as IMAGENET_PIXELS

CLASSES = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# one thread: what waits for another one takes long on a busy machine
QUICK = ("--threads", "1", "--batch", "2")


def pixels(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def save_images(folder: Path, count: int, size: int = 32) -> list[Path]:
    Image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(count)]
    for path, image in zip(paths, pixels(count, size), strict=True):
        Image.fromarray(image).save(path)
    return paths


def net() -> fusedres.CifarResNet:
    torch.manual_seed(0)
    return seasoned(fusedres.CifarResNet(20, zeros="split", num_classes=CLASSES))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As CIFAR ResNets are published: of DataParallel, with a classifier called linear."""
    path = tmp_path_factory.mktemp("checkpoint") / "net.th"
    weights = {f"module.{k.replace('fc.', 'linear.')}": v for k, v in net().state_dict().items()}
    torch.save({"state_dict": weights, "best_prec1": 90.0}, path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "images.npz"
    np.savez(path, images=pixels(40), labels=np.arange(40) % CLASSES)
    return path


class Ran(NamedTuple):
    out: str
    found: dict[str, Any]
    file: Path


@pytest.fixture(scope="module")
def ran(checkpoint: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The command with everything, once."""
    folder = tmp_path_factory.mktemp("ran")
    argv = ["quantize", "--model", "resnet20", "--checkpoint", checkpoint, "--calibration", archive]
    argv += ["--calibration-images", "24", "--evaluate", archive, "--dtype", "fp32", "--layers", *QUICK]
    argv += ["--out", folder / "net.pt2", "--json", folder / "found.json"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(arg) for arg in argv]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["found.json", "net.pt2"]
    return Ran(out.getvalue(), json.loads((folder / "found.json").read_text()), folder / "net.pt2")


@pytest.fixture
def quantize(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run it on the small net; what it printed on stdout and stderr."""

    def run(*argv: object) -> tuple[str, str]:
        common = ("quantize", "--model", "resnet20", "--checkpoint", checkpoint, *QUICK)
        assert main([str(arg) for arg in (*common, *argv)]) == 0
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run it with wrong input; its status and its line. Nothing is written."""

    def run(*argv: object, model: str = "resnet20", weights: Path = checkpoint, status: int = 2) -> str:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        common = ("quantize", "--model", model, "--checkpoint", weights, *QUICK)
        written = ("--out", out / "net.pt2", "--json", out / "found.json")
        got, line = fails(capsys, *common, *written, *argv)
        assert got == status
        assert not list(out.iterdir())
        return line

    return run


# what it says


def test_what_is_printed_is_what_is_written(ran: Ran) -> None:
    found, lines = ran.found, ran.out.splitlines()
    predictions, speed = found["predictions"], found["speed"]
    assert (predictions["images"], predictions["left_out"], speed["batch"]) == (40, 0, 2)
    assert found["calibration"]["images"] == 24
    cells = {line[:50].split(", before")[0]: line.split()[-4:] for line in lines}
    top1 = [
        f"{predictions['correct'][side]} ({predictions['top1'][side]:.2%})" for side in ("before", "after")
    ]
    assert " ".join(cells["top-1 of 40 images"]) == " ".join(top1)
    sizes = [f"{found['weights_bytes'][side] / 2**20:.2f}" for side in ("before", "after")]
    assert cells["MiB of weights"][-2:] == sizes
    speeds = [f"{speed[side]['images_per_second']:,.1f}" for side in ("before", "after")]
    assert cells["images/s in batches of 2"][-2:] == speeds
    assert any(line.startswith(f"same prediction for {predictions['agree']} of 40 images") for line in lines)
    assert found["file"] == {"path": str(ran.file), "bytes": ran.file.stat().st_size}
    assert lines[-1] == f"wrote {ran.file}, {ran.file.stat().st_size / 2**20:.2f} MiB"


def test_every_convolution_has_a_line(ran: Ran) -> None:
    lines = {line.split()[0]: line.split() for line in ran.out.splitlines() if line.startswith("layer")}
    heads = lines.pop("layer")
    layers = ran.found["layers"]["convolutions"]
    assert [layer["layer"] for layer in layers] == list(lines) and len(lines) == 18
    down = next(layer for layer in layers if layer["layer"] == "layer2.0.conv1")
    assert (down["input"], down["filters"], down["kernel"], down["stride"]) == (
        [16, 32, 32],
        32,
        [3, 3],
        [2, 2],
    )
    assert lines["layer2.0.conv1"][1:5] == ["16x32x32", "32", "3x3", "2x2"]
    if onednn.quantized_unavailable():
        return
    ways = [head for head in heads if head in down["ms"]]
    assert len(ways) == 2 and heads.count("ms") == 2
    for layer in layers:
        assert lines[layer["layer"]][5:] == [*(f"{layer['ms'][w]:.3f}" for w in ways), layer["chosen"]]
        assert layer["chosen"] == min(layer["ms"], key=layer["ms"].__getitem__)
    chosen = sum(layer["chosen"] == "int8" for layer in layers)
    assert f"\n{chosen} of 18 convolutions are faster in 8 bits here" in ran.out


def test_counts_are_the_models_own(ran: Ran, archive: Path) -> None:
    x = torch.cat([x for x, _ in images.find(archive, "--evaluate").batches(40, "", CIFAR, IMAGENET_PIXELS)])
    labels = torch.arange(40) % CLASSES
    with torch.no_grad():
        before = net()(x).argmax(1)
    assert ran.found["predictions"]["correct"]["before"] == int((before == labels).sum())
    # untrained: some of its images have two classes that are as likely
    assert ran.found["predictions"]["agree"] >= 32


def test_the_file_gives_the_same_predictions_without_fusedres(
    ran: Ran, archive: Path, tmp_path: Path
) -> None:
    x = torch.cat([x for x, _ in images.find(archive, "--evaluate").batches(40, "", CIFAR, IMAGENET_PIXELS)])
    quantised = fusedres.quantize_for_inference(net(), x[:24], torch.float32)
    with fusedres.backend("reference"):
        expected = quantised(x)
    torch.save({"x": x, "expected": expected}, tmp_path / "io.pt")
    code = """
import sys, torch
sys.modules["fusedres"] = None
torch.set_num_threads(1)
given = torch.load("io.pt", weights_only=True)
net = torch.export.load(sys.argv[1]).module()
out = torch.cat([net(part) for part in given["x"].split([1, 7, 32])])
assert (out - given["expected"]).norm() < 0.02 * given["expected"].norm()
print(int((out.argmax(1) == given["expected"].argmax(1)).sum()))
"""
    argv = [sys.executable, "-c", code, str(ran.file)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 38  # a rounding may decide between two classes that are as likely


def test_a_folder_with_images_that_cannot_be_read(quantize: Any, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    good = [*save_images(folder / "b", 2), *save_images(folder / "a", 2, size=40)]
    (folder / "a" / "notes.txt").write_text("no image")
    (folder / "a" / "1.jpg").write_text("no image either")
    (folder / "b" / "2.png").write_bytes(good[0].read_bytes()[:100])
    out, err = quantize("--calibration", folder)
    assert f"4 images of {folder} (2 left out)" in out
    assert "same prediction for" in out and "top-1" not in out and "wrote" not in out
    notes = err.splitlines()
    assert [note.startswith("fusedres: note: left out: ") for note in notes] == [True, True]
    assert str(folder / "a" / "1.jpg") in notes[0] and str(folder / "b" / "2.png") in notes[1]


def test_a_folder_for_each_class(quantize: Any, archive: Path, tmp_path: Path) -> None:
    for index in range(CLASSES):
        save_images(tmp_path / "classes" / f"class {index}", 1 + index % 2)
    (tmp_path / "classes" / "class 3" / "1.png").write_text("damaged")
    out, _ = quantize("--calibration", archive, "--evaluate", tmp_path / "classes")
    assert "top-1 of 14 images" in out and "(1 left out)" in out
    found = images.find(tmp_path / "classes", "--evaluate", CLASSES)
    assert [path.parent.name for path in found.items] == [f"class {label}" for label in found.labels]
    batches = list(found.batches(4, "", CIFAR, IMAGENET_PIXELS))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 1, 2, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9]
    assert sum(len(x) for x, _ in batches) == 14


def test_an_imagenet_net(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_images(tmp_path / "images", 2, size=300)
    torch.manual_seed(0)
    torch.save(seasoned(fusedres.ResNet18(num_classes=7)).state_dict(), tmp_path / "net.pt")
    argv = ["quantize", "--model", "resnet18", "--checkpoint", tmp_path / "net.pt", "--threads", "1"]
    argv += ["--calibration", tmp_path / "images", "--batch", "1"]
    assert main([str(arg) for arg in argv]) == 0
    out = capsys.readouterr().out
    assert "19 convolutions in 8 bits" in out and f"of 2 images of {tmp_path / 'images'}" in out


def test_the_dtype_is_the_best_that_the_cpu_has(quantize: Any, archive: Path, tmp_path: Path) -> None:
    expected = "fp32" if onednn.unavailable(torch.bfloat16) else "bf16"
    out, _ = quantize("--calibration", archive, "--calibration-images", "4")
    assert f"the first and the classifier in {expected}, calibrated on 4 images" in out


def test_without_fast_8_bits(quantize: Any, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    out, _ = quantize("--calibration", archive, "--calibration-images", "4", "--layers")
    assert "note: this CPU has no VNNI, so convolutions run in floating point" in out
    assert "are faster in 8 bits" not in out


def test_a_forced_backend(quantize: Any, refused: Any, archive: Path) -> None:
    given = ("--calibration", archive, "--calibration-images", "4")
    with fusedres.backend("reference"):
        assert "note: FUSEDRES_BACKEND is reference, so convolutions run in floating" in quantize(*given)[0]
    with fusedres.backend("cuda"):
        assert "backend 'cuda' can't serve bn_act on cpu" in refused(*given, status=1)


@pytest.mark.parametrize("depth", [20, 56])
def test_trained_weights_on_the_test_images(depth: int, data: Path, tmp_path: Path) -> None:
    argv = ["quantize", "--model", f"resnet{depth}", "--checkpoint", data / WEIGHTS[depth]]
    argv += ["--calibration", data / "cifar10_train_first10k.npz", "--evaluate", data / "cifar10_test.npz"]
    argv += ["--calibration-images", "256", *QUICK, "--json", tmp_path / "found.json"]
    assert main([str(arg) for arg in argv]) == 0
    predictions = json.loads((tmp_path / "found.json").read_text())["predictions"]
    assert predictions["images"] == 10_000
    expected = {20: 9_173, 56: 9_339}[depth]
    assert predictions["correct"]["before"] == expected
    assert abs(predictions["correct"]["after"] - expected) <= 30
    assert predictions["agree"] > 9_800


# images


def test_images_of_an_archive_are_those_of_files(tmp_path: Path) -> None:
    save_images(tmp_path / "images", 2, size=300)
    for format in (IMAGENET, CIFAR):
        for size in (300, format.size):
            np.savez(tmp_path / "images.npz", images=pixels(2, size))
            (of_archive,) = images.find(tmp_path / "images.npz", "").batches(5, "", format, IMAGENET_PIXELS)
            assert of_archive[0].shape == (2, 3, format.size, format.size) and of_archive[1] is None
            if size == 300:
                (of_files,) = images.find(tmp_path / "images", "").batches(5, "", format, IMAGENET_PIXELS)
                assert torch.equal(of_archive[0], of_files[0])
            else:  # as it is, but normalised
                plain = torch.from_numpy(pixels(2, size)).permute(0, 3, 1, 2) / 255
                mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
                assert torch.equal(of_archive[0], (plain - mean) / std)


def test_the_first_images_are_taken(tmp_path: Path) -> None:
    paths = save_images(tmp_path, 3)
    assert images.find(tmp_path, "").first(2).items == paths[:2]
    assert len(images.find(tmp_path, "").first(9)) == 3


# what it refuses


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "--calibration"),
        (("--calibration", "a"), "--checkpoint --weights"),
        (("--calibration", "a", "--weights", "b", "--checkpoint", "c"), "not allowed with"),
        (("--model", "resnet21"), "resnet21"),
        (("--calibration", "a", "--checkpoint", "b", "--device", "cuda"), "--device"),
        (("--calibration-images", "0"), "at least 1, got '0'"),
        (("--batch", "0"), "at least 1, got '0'"),
        (("--dtype", "int8"), "int8"),
    ],
)
def test_a_bad_command_line(argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = fails(capsys, "quantize", *argv)
    assert status == 2 and said in line


def test_outputs_that_cannot_be_written(refused: Any, archive: Path, tmp_path: Path) -> None:
    assert "--out must end in .pt2" in refused("--calibration", archive, "--out", tmp_path / "net.pt")
    for option in ("--out", "--json"):
        missing = tmp_path / "no" / "net.pt2"
        assert "there is no directory" in refused("--calibration", archive, option, missing)
    (tmp_path / "folder.pt2").mkdir()
    assert "is a directory" in refused("--calibration", archive, "--out", tmp_path / "folder.pt2")


def test_a_disk_that_is_full(
    checkpoint: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    argv = ["quantize", "--model", "resnet20", "--checkpoint", checkpoint, "--calibration", archive, *QUICK]
    argv += ["--calibration-images", "2", "--out", tmp_path / "net.pt2"]
    assert main([str(arg) for arg in argv]) == 1
    err = capsys.readouterr().err
    assert err == f"fusedres: error: can't write {tmp_path / 'net.pt2'}: [Errno 28] No space left on device\n"
    assert not list(tmp_path.iterdir())
    assert files.check_writable(tmp_path / "net.pt2") is None


def test_weights_that_are_another_nets(refused: Any, checkpoint: Path, archive: Path, tmp_path: Path) -> None:
    given = ("--calibration", archive)
    for model in ("resnet32", "resnet56", "resnet18"):
        assert f"has no weights for {model}" in refused(*given, model=model, status=1)
    assert "there is no checkpoint" in refused(*given, weights=tmp_path / "missing.pt")
    assert "--zeros is for CIFAR's nets" in refused(*given, "--zeros", "end", model="resnet50")
    broken = net().state_dict()
    broken["bn1.running_var"][0] = float("nan")
    torch.save(broken, tmp_path / "nan.pt")
    said = refused(*given, weights=tmp_path / "nan.pt", status=1)
    assert "has values that are not finite, in bn1.running_var" in said


def test_pretrained_weights_are_imagenets(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("quantize", "--model", "resnet20", "--weights", "DEFAULT", "--calibration", archive)
    status, line = fails(capsys, *argv)
    assert status == 2 and "torchvision has no weights of resnet20" in line


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"labels": np.zeros(2, np.int64)}, "has no array images"),
        ({"images": pixels(2)}, "has no array labels"),
        ({"images": pixels(2)[:0], "labels": np.zeros(0, np.int64)}, "has no images"),
        (
            {"images": pixels(2)[0], "labels": np.zeros(2, np.int64)},
            "uint8 [N, H, W, 3], got uint8 [32, 32, 3]",
        ),
        ({"images": pixels(2)[..., :2], "labels": np.zeros(2, np.int64)}, "got uint8 [2, 32, 32, 2]"),
        ({"images": pixels(2)[:, :0], "labels": np.zeros(2, np.int64)}, "got uint8 [2, 0, 32, 3]"),
        ({"images": pixels(2) / 255, "labels": np.zeros(2, np.int64)}, "got float64 [2, 32, 32, 3]"),
        ({"images": pixels(2), "labels": np.zeros(2)}, "must be integers [2], got float64 [2]"),
        ({"images": pixels(2), "labels": np.zeros(3, np.int64)}, "must be integers [2], got int64 [3]"),
        (
            {"images": pixels(2), "labels": np.array([0, CLASSES])},
            "from 0 to 9, the net's classes, got 0 to 10",
        ),
        ({"images": pixels(2), "labels": np.array([-1, 0])}, "from 0 to 9, the net's classes, got -1 to 0"),
        ({"images": np.array([{}, 1], dtype=object), "labels": np.zeros(2, np.int64)}, "is no .npz"),
    ],
)
def test_an_archive_that_does_not_fit(
    arrays: dict[str, Any], said: str, refused: Any, archive: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "given.npz", **arrays)
    assert said in refused("--calibration", archive, "--evaluate", tmp_path / "given.npz")
    if "images" in said or "uint8" in said:
        assert said in refused("--calibration", tmp_path / "given.npz")


def test_paths_without_images(refused: Any, archive: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    empty, text, damaged = tmp_path / "empty", tmp_path / "text.txt", tmp_path / "damaged.npz"
    empty.mkdir()
    text.write_text("no images")
    damaged.write_bytes(archive.read_bytes()[:2000])
    for option in ("--calibration", "--evaluate"):
        given = ("--calibration", archive, option)
        assert f"{option}: there is no" in refused(*given, tmp_path / "missing")
        assert f"{option} must be a folder of images or an .npz" in refused(*given, text)
        assert "is no .npz that numpy reads" in refused(*given, damaged)
    assert "has no images (.bmp .jpeg" in refused("--calibration", empty)
    given = ("--calibration", archive, "--evaluate")
    assert "a subfolder for each of the net's 10 classes, got 0" in refused(*given, empty)
    for index in range(CLASSES):
        (empty / str(index)).mkdir()
    assert "has no images" in refused(*given, empty)


def test_a_folder_of_which_no_image_can_be_read(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("PIL.Image")
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_text("no image")
    argv = ["quantize", "--model", "resnet20", "--checkpoint", checkpoint, "--calibration", tmp_path]
    assert main([str(arg) for arg in argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 3
    assert err.splitlines()[-1] == f"fusedres: error: none of the images in {tmp_path} can be read"


def test_without_pillow(refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "large.npz", images=pixels(2, 64))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for path in (tmp_path, tmp_path / "large.npz"):
        assert "needs pillow: pip install pillow" in refused("--calibration", path, status=1)
