"""``fusedres train``: runs that are killed, interrupted, shared out, out of room; and bad input."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fusedres
from fusedres.cli import main
from fusedres.training import checkpoint, recipe
from fusedres.training.data import Order, open_data

numpy = pytest.importorskip("numpy")
safetensors = pytest.importorskip("safetensors.torch")
CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Noise with a class in its brightness: 64 images of 8x8 px to train on, 12 to test on."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = numpy.random.default_rng(0)
    for part, count in (("train", 64), ("test", 12)):
        labels = numpy.arange(count) % 3
        pixels = generator.integers(0, 120, (count, 8, 8, 3)) + 60 * labels[:, None, None, None]
        numpy.savez(folder / f"{part}.npz", images=pixels.astype(numpy.uint8), labels=labels)
    return folder


def options(images: Path, **others: object) -> list[str]:
    """Of a small run: 8 steps of 8 images in an epoch."""
    chosen = {"recipe": "cifar-paper", "data": images, "model": "resnet8", "batch": 8, "threads": 1} | others
    small = ("augmentation.crop=8", "augmentation.pad=1", "validation=0")
    found = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    return ["train", *found, *(f"--set={change}" for change in small)]


def started(*argv: str, module: tuple[str, ...] = ("-m", "fusedres")) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *module, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    try:
        status = main([str(arg) for arg in argv])
    except SystemExit as exit:  # argparse's
        status = int(exit.code or 0)
    err = capsys.readouterr().err
    assert status != 0
    assert err.startswith("fusedres: error: ") and err.count("\n") == 1, err
    return status, err


def timeless(csv: Path) -> list[list[str]]:
    """The rows of a log without what a clock said."""
    return [line.split(",")[:9] for line in csv.read_text().splitlines()]


def test_learns_and_saves(images, tmp_path, capsys):
    out, report = tmp_path / "out", tmp_path / "out.json"
    assert main(options(images, epochs=3, out=out, json=report)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet8, fp32, 64 training and 12 test images of 3 classes"
    losses = [float(found[1]) for line in lines if (found := re.search(r"loss ([\d.]+)", line))]
    assert len(losses) == 3 and losses[2] < losses[0]
    history = json.loads(report.read_text())["history"]
    assert f"final test accuracy {1 - history[-1]['test_error']:.2%}" in lines[-2]
    weights = safetensors.load_file(out / "model.safetensors")
    net = fusedres.CifarResNet(8, num_classes=3)
    net.load_state_dict({name: value for name, value in weights.items() if "normalisation" not in name})
    # what was saved is what was tested
    run = recipe.load(str(out / "recipe.yaml"))
    (x, labels), *_ = open_data(str(images), run, 0, CPU).test.batches(12, 0, 1)
    error = float((net.eval()(x).argmax(1) != labels).float().mean())
    assert error == pytest.approx(history[-1]["test_error"])


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs sklearn")
def test_digits_need_nothing_else(capsys):
    assert main(["train", "--epochs", "1", "--batch", "128", "--model", "resnet8"]) == 0
    assert "1,437 training and 360 test images of 10 classes" in capsys.readouterr().out


def test_killed_in_the_middle_of_an_epoch(images, tmp_path):
    """SIGKILL, --resume: the files of a run that was never killed, to the bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    long = {"epochs": 40, "save_every": 3}
    assert main(options(images, out=whole, **long)) == 0
    running = started(*options(images, out=killed, **long))
    deadline = time.monotonic() + 60
    while not (killed / "log.csv").exists() or len(timeless(killed / "log.csv")) < 4:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    # until a checkpoint in the middle of an epoch is the last
    while (state := checkpoint.load(killed / "last.pt"))["progress"]["step"] == 0:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    running.kill()
    running.communicate()
    state = checkpoint.load(killed / "last.pt")
    assert 0 < state["progress"]["iteration"] < 320
    assert not (killed / "model.safetensors").exists()
    assert main(["train", "--resume", str(killed), "--threads", "1"]) == 0
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert timeless(killed / "log.csv") == timeless(whole / "log.csv")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(images, tmp_path, number):
    """Stops after the step under way, saves, says how to go on; and goes on."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(options(images, out=whole, epochs=30)) == 0
    running = started(*options(images, out=stopped, epochs=30))
    assert running.stdout is not None
    running.stdout.readline()
    running.stdout.readline()  # the first epoch is done
    running.send_signal(number)
    err = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert err == f"fusedres: interrupted, --resume {stopped} goes on\n"
    assert 8 <= checkpoint.load(stopped / "last.pt")["progress"]["iteration"] < 240
    assert main(["train", "--resume", str(stopped), "--threads", "1"]) == 0
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_that_is_done_stays_so(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(options(images, epochs=1, out=out)) == 0
    before = (out / "model.safetensors").read_bytes()
    final = capsys.readouterr().out.splitlines()[-2]
    assert main(["train", "--resume", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == final
    assert (out / "model.safetensors").read_bytes() == before


def test_two_processes(images, tmp_path):
    """Gradients are averaged over the processes: written out, each half with its own statistics."""
    out = tmp_path / "out"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fusedres")
    running = started(*options(images, epochs=1, out=out), module=torchrun)
    said, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert said.count("2 processes") == 1 and said.count("final test accuracy") == 1

    run = recipe.load(str(out / "recipe.yaml"))
    data = open_data(str(images), run, 0, CPU)
    torch.manual_seed(0)
    net = fusedres.CifarResNet(8, num_classes=3).to(memory_format=torch.channels_last)
    parameters = list(net.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    shares = [data.train.batches(Order(64, 8, 0, 0, rank=rank, processes=2)) for rank in range(2)]
    # the milestones of 64,000 iterations in 8 steps
    rates = [0.1] * 4 + [0.01] * 2 + [0.001] * 2
    losses = []
    for rate, halves in zip(rates, zip(*shares, strict=True), strict=True):
        gradients = []
        for rank, (x, labels) in enumerate(halves):
            # statistics are those of the first process
            model = net if rank == 0 else copy.deepcopy(net)
            loss = F.cross_entropy(model.train()(x), labels)
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        with torch.no_grad():
            for p, momentum, one, two in zip(parameters, momenta, *gradients, strict=True):
                momentum.mul_(0.9).add_((one + two) / 2 + 1e-4 * p)
                p -= rate * momentum
    weights = safetensors.load_file(out / "model.safetensors")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=2e-4, rtol=2e-3, msg=name)
    with torch.inference_mode():
        (x, labels), *_ = data.test.batches(12, 0, 1)
        logits = net.eval()(x)
    assert f"({int((logits.argmax(1) == labels).sum())} of 12)" in said
    with (out / "log.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    # over both processes
    assert float(row["train_loss"]) == pytest.approx(sum(losses) / 16, rel=1e-2)
    assert float(row["test_loss"]) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-2)


ENDS = """
from pathlib import Path

import torch

from fusedres.training.distributed import Processes, joined


def threads():
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop")


processes, device = Processes(count=2), torch.device("cpu")
with joined(processes, device):
    model = processes.wrap(torch.nn.Linear(2, 2), device)
    model(torch.ones(1, 2)).sum().backward()
    total = processes.total(torch.ones(2))
    during = threads()
print(during, threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_threads_that_had_tensors_of_python_end():
    """Else one that lets go of such a tensor while Python ends aborts the process: rarely."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDS],
        env={**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    during, after = map(int, ended.stdout.split())
    # the reducer's, which sums tensors of C++ alone, stay
    assert during == 4 and after == 2


def test_no_room_for_a_checkpoint(images, tmp_path):
    """Files may have 100 kB from some step on, as on a full disk: one line, the last checkpoint as it was."""
    out = tmp_path / "out"
    assert main(options(images, epochs=2, out=out)) == 0
    (out / "model.safetensors").unlink()
    state = torch.load(out / "last.pt", weights_only=True)
    state["run"]["recipe"]["epochs"] = 4
    checkpoint.save(out / "last.pt", {k: v for k, v in state.items() if k != "version"})
    before = (out / "last.pt").read_bytes()
    limited = [
        "bash",
        "-c",
        f'ulimit -f 100; exec {sys.executable} -m fusedres train --resume "$0"',
        str(out),
    ]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("fusedres: error: can't write") and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and f"--resume {out} goes on" in done.stderr
    assert (out / "last.pt").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["last.pt", "log.csv", "recipe.yaml"]
    assert main(["train", "--resume", str(out)]) == 0


def test_the_loss_blows_up(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(options(images, epochs=30, lr=1e30, out=out)) == 1
    err = capsys.readouterr().err
    assert "the loss is no longer finite" in err and "try a smaller --lr" in err and err.count("\n") == 1
    assert not (out / "model.safetensors").exists()


def test_files_that_can_not_be_written(images, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        status, line = fails(capsys, *options(images, out=out))
        assert status == 2 and "can't write" in line


def test_runs_that_can_not_be_gone_on_with(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(options(images, epochs=1, out=out)) == 0
    capsys.readouterr()
    status, line = fails(capsys, *options(images, epochs=1, out=out))
    assert status == 2 and f"{out} has a run already: --resume {out} goes on with it" in line
    status, line = fails(capsys, "train", "--resume", out, "--lr", 0.5)
    assert status == 2 and "--lr can't be given with --resume" in line
    status, line = fails(capsys, "train", "--resume", tmp_path)
    assert status == 1 and "there is no checkpoint" in line
    archive = images / "train.npz"
    content = archive.read_bytes()
    with numpy.load(archive) as arrays:
        numpy.savez(archive, images=arrays["images"][:32], labels=arrays["labels"][:32])
    status, line = fails(capsys, "train", "--resume", out)
    assert status == 2 and "began with 64 training images of 3 classes, now" in line and "has 32 of 3" in line
    archive.write_bytes(content)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:4000])
    status, line = fails(capsys, "train", "--resume", out)
    assert status == 1 and "last.pt is damaged, or no checkpoint" in line


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (("--recipe", "cifar"), 2, "the recipe must be one of cifar-paper"),
        (("--set", "batch"), 2, "--set must be KEY=VALUE, got 'batch'"),
        (("--set", "bacth=4"), 2, "unknown key bacth, did you mean batch?"),
        (("--set", "batch=[4"), 2, "--set batch: while parsing"),
        (("--batch", "4096"), 2, "batch must be at most the 64 training images, got 4096"),
        (("--accumulate", "5"), 2, "batch must be a multiple of 5"),
        (("--model", "plain8", "--shortcut", "B"), 2, "plain8 is a plain net, without shortcuts"),
        (("--data", "nowhere"), 1, "there is no folder nowhere; the data must be digits or a folder"),
        (("--set", "validation=64"), 1, "validation must be less than the 64 training images"),
        (("--sync-bn",), 2, "--sync-bn needs GPUs"),
        (("--tensorboard",), 2, "--tensorboard needs --out"),
        (("--lr", "0"), 2, "above 0, got '0'"),
        (("--batch", "0"), 2, "at least 1, got '0'"),
        (("--epochs", "2", "--iterations", "3"), 2, "not allowed with"),
    ],
)
def test_bad_input(images, capsys, argv, status, message):
    if torch.cuda.is_available() and argv == ("--sync-bn",):
        pytest.skip("there are GPUs")
    found, line = fails(capsys, *options(images), *argv)
    assert found == status and message in line


def test_a_recipe_is_needed(images, capsys):
    status, line = fails(capsys, "train", "--data", images)
    assert status == 2 and "--recipe is needed with --data" in line and "cifar-paper" in line


def test_labels_out_of_range(images, capsys):
    numpy.savez(images / "test.npz", images=numpy.zeros((4, 8, 8, 3), numpy.uint8), labels=numpy.full(4, 3))
    status, line = fails(capsys, *options(images))
    assert status == 1 and "labels to test on must be from 0 to 2, as those to train on, got 3" in line
