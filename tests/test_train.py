"""The training loop: its steps against plain PyTorch, and a run that is stopped and gone on with."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres.training import checkpoint, log, recipe, runner
from fusedres.training.data import Order, open_data
from fusedres.training.loop import Trainer
from fusedres.training.run import Run

numpy = pytest.importorskip("numpy")
CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path: Path) -> str:
    """Noise with a class in its brightness: 48 images of 8x8 px to train on, 12 to test on."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = numpy.random.default_rng(0)
    for part, count in (("train", 48), ("test", 12)):
        labels = numpy.arange(count) % 3
        pixels = generator.integers(0, 120, (count, 8, 8, 3)) + 60 * labels[:, None, None, None]
        numpy.savez(folder / f"{part}.npz", images=pixels.astype(numpy.uint8), labels=labels)
    return str(folder)


def planned(images: str, changes: dict[str, Any] | None = None, **settings: Any) -> Run:
    small = {"model": "resnet8", "batch": 8, "augmentation.crop": 8, "augmentation.pad": 1, "validation": 0}
    length = {"iterations": None, "epochs": 2, "schedule": {"kind": "cosine"}}
    return Run(recipe.load("cifar-paper", small | length | (changes or {})), images, **settings)


def trainer(run: Run) -> Trainer:
    return Trainer(run, open_data(run.data, run.recipe, run.seed, CPU), CPU)


def trained(run: Run) -> Trainer:
    found = trainer(run)
    for _ in found:
        pass
    return found


def same(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


class Plain(nn.Module):
    """ResNet-8 as anyone writes it, for the weights of ours: none of our code."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        x = F.relu(net.bn1(net.conv1(x)))
        for stage, stride in ((net.layer1, 1), (net.layer2, 2), (net.layer3, 2)):
            block = stage[0]
            out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
            short = x[:, :, ::stride, ::stride]
            x = F.relu(out + F.pad(short, (0, 0, 0, 0, 0, out.shape[1] - short.shape[1])))
        return net.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "optimizer": {"lr": 0.1, "nesterov": True, "weight_decay": 0.1, "decay_norms": False},
            "label_smoothing": 0.1,
            "ema": 0.9,
        },
    ],
    ids=["paper", "modern"],
)
def test_steps_are_those_of_plain_pytorch(images, changes):
    """SGD, schedule, loss, decay and average written out, on the images that the loop sees."""
    run = planned(images, changes)
    ours = trainer(run)
    theirs = Plain(ours.model)
    averages = {name: value.clone() for name, value in theirs.net.state_dict().items()}
    momenta: dict[str, Tensor] = {}
    batches = []
    for epoch in range(2):
        batches += list(ours.data.train.batches(Order(48, 8, 0, epoch)))
    for _ in ours:
        pass
    for iteration, (x, labels) in enumerate(batches):
        lr = 0.1 * (1 + math.cos(math.pi * iteration / 12)) / 2
        theirs.train()
        log_p = F.log_softmax(theirs(x), 1)
        smoothing = run.recipe.label_smoothing
        loss = -(1 - smoothing) * log_p[torch.arange(8), labels].mean() - smoothing * log_p.mean()
        theirs.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in theirs.net.named_parameters():
                decays = run.recipe.optimizer.decay_norms or p.dim() > 1
                g = p.grad + run.recipe.optimizer.weight_decay * decays * p
                momenta[name] = 0.9 * momenta[name] + g if name in momenta else g
                p -= lr * (g + 0.9 * momenta[name] if run.recipe.optimizer.nesterov else momenta[name])
            for name, value in theirs.net.state_dict().items():
                if value.is_floating_point():
                    # the average begins with the weights after the first step
                    averages[name] = value.clone() if iteration == 0 else 0.9 * averages[name] + 0.1 * value
    kept = averages if run.recipe.ema else theirs.net.state_dict()
    for name, value in ours.kept.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, kept[name], atol=2e-4, rtol=2e-3, msg=name)


def test_what_an_epoch_comes_to(images):
    ours = trainer(planned(images))
    first, last = [epoch for epoch in ours if epoch is not None]
    assert (first.number, first.iteration, last.number, last.iteration) == (1, 6, 2, 12)
    # tested again, written out
    model = ours.model.eval()
    with torch.inference_mode():
        (x, labels), *_ = ours.data.test.batches(12, 0, 1)
        logits = model(x)
    assert last.test_error == pytest.approx(float((logits.argmax(1) != labels).float().mean()))
    assert last.test_loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert last.correct == int((logits.argmax(1) == labels).sum()) and last.tested == 12
    assert last.train_loss < first.train_loss
    assert [log.Epoch(**epoch) for epoch in ours.state_dict()["history"]] == [first, last]


def test_a_number_of_iterations_ends_within_an_epoch(images):
    ours = trainer(planned(images, {"epochs": None, "iterations": 8}))
    epochs = [epoch for epoch in ours if epoch is not None]
    assert [epoch.iteration for epoch in epochs] == [6, 8]
    assert epochs[1].train_loss > 0 and ours.progress.iteration == 8


def test_the_same_seed_the_same_weights(images):
    one, two, other = (trained(planned(images, seed=seed)).model for seed in (0, 0, 1))
    assert same(one, two) and not same(one, other)


def test_accumulation_is_the_mean_over_the_parts(images):
    """With frozen statistics the gradient of a batch is the mean of its parts'."""
    gradients = []
    for accumulate in (1, 4):
        ours = trainer(planned(images, accumulate=accumulate))
        ours.model.eval()
        x, labels = next(iter(ours.data.train.batches(Order(48, 8, 0, 0))))
        loss, wrong = ours._gradients(x, labels)
        gradients.append([p.grad for p in ours.model.parameters()])
        expected = F.cross_entropy(ours.model(x), labels, reduction="sum").detach()
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        assert int(wrong) == int((ours.model(x).argmax(1) != labels).sum())
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_recomputed_activations_change_nothing(images, backend):
    with fusedres.backend(backend):
        one, two = trained(planned(images)), trained(planned(images, recompute=True))
    assert same(one.model, two.model)
    assert one.model.layer1[0].bn1.num_batches_tracked == 12


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_learn(images, precision):
    ours = trainer(planned(images, {"epochs": 4}, precision=precision))
    epochs = [epoch for epoch in ours if epoch is not None]
    assert epochs[-1].train_loss < epochs[0].train_loss
    assert ours.scaler.is_enabled() == (precision == "fp16")
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())


def test_the_rate_rises_once_the_net_has_learned(images):
    schedule = {"kind": "steps", "warm_until": 0.6, "warm_window": 3}
    ours = trainer(planned(images, {"epochs": 8, "schedule": schedule, "optimizer.lr": 0.1}))
    rates = []
    for _ in ours:
        rates.append(ours.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.01) and rates[-1] == pytest.approx(0.1)
    assert sorted(rates) == rates and 3 <= rates.index(rates[-1]) < 40


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"batch": 64}, {}, "batch must be at most the 48 training images, got 64"),
        ({}, {"accumulate": 3}, "batch must be a multiple of 3, processes times accumulate, got 8"),
    ],
)
def test_runs_that_do_not_fit(images, changes, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(planned(images, changes, **settings))


def test_nothing_that_is_not_finite_is_kept(images):
    ours = trainer(planned(images))
    next(iter(ours))
    with torch.no_grad():
        ours.model.fc.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="no longer finite, in epoch 1, iteration 1"):
        ours.state_dict()


# a run that is stopped


MODERN = {"ema": 0.9, "schedule": {"kind": "plateau", "patience": 1, "warm_until": 0.5, "warm_window": 4}}


@pytest.mark.parametrize("stop", [1, 4, 6, 9])
@pytest.mark.parametrize("settings", [{}, {"precision": "fp16"}], ids=["fp32", "fp16"])
def test_goes_on_bit_for_bit(images, tmp_path, stop, settings):
    """Stopped after any step, saved, loaded: the weights, averages and records of a run never stopped."""
    run = planned(images, MODERN, **settings)
    whole = trained(run)
    first = trainer(run)
    for step, _ in enumerate(first, 1):
        if step == stop:
            break
    checkpoint.save(tmp_path / "last.pt", first.state_dict())
    second = trainer(run)
    torch.rand(3)  # other random numbers in between
    second.load_state_dict(checkpoint.load(tmp_path / "last.pt"))
    for _ in second:
        pass
    assert same(second.model, whole.model) and same(second.kept, whole.kept)
    assert second.scaler.state_dict() == whole.scaler.state_dict()
    for one, two in zip(second.history, whole.history, strict=True):
        timeless = {"images_per_second": 0, "seconds": 0}
        assert dataclasses.replace(one, **timeless) == dataclasses.replace(two, **timeless)


def test_what_a_run_leaves(images, tmp_path):
    run = planned(images, {"ema": 0.9})
    out = tmp_path / "out"
    history = list(runner.train(run, open_data(images, run.recipe, 0, CPU), runner.Settings(CPU, out)))
    assert {path.name for path in out.iterdir()} == {"last.pt", "log.csv", "model.safetensors", "recipe.yaml"}
    state = checkpoint.load(out / "last.pt")
    assert Run.from_state_dict(state["run"]) == run
    assert recipe.load(str(out / "recipe.yaml")) == run.recipe
    rows = (out / "log.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[0].startswith("number,iteration,lr,train_loss,train_error")
    assert float(rows[2].split(",")[6]) == history[-1].test_error
    import safetensors.torch

    weights = safetensors.torch.load_file(out / "model.safetensors")
    normalisation = {name: weights.pop(f"normalisation.{name}") for name in ("mean", "std")}
    net = fusedres.CifarResNet(8, num_classes=3)
    net.load_state_dict(weights)
    # the average, not the last weights
    assert not torch.equal(net.fc.weight, state["model"]["fc.weight"])
    assert torch.equal(net.fc.weight, state["averaged"]["module.fc.weight"])
    assert torch.equal(normalisation["mean"], state["normalisation"]["mean"])


def test_tensorboard(images, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = planned(images, {"epochs": 8})
    data = open_data(images, run.recipe, 0, CPU)
    history = list(runner.train(run, data, runner.Settings(CPU, tmp_path, board=True)))
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    errors = found.Scalars("epoch/test_error")
    assert [e.step for e in errors] == [epoch.iteration for epoch in history]
    assert [e.value for e in errors] == pytest.approx([epoch.test_error for epoch in history])
    assert [e.step for e in found.Scalars("step/loss")] == [20, 40]


@pytest.mark.parametrize("length", [0, 100, 5000])
def test_a_truncated_checkpoint(images, tmp_path, length):
    path = tmp_path / "last.pt"
    checkpoint.save(path, trainer(planned(images)).state_dict())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(checkpoint.CheckpointError, match="last.pt is damaged, or no checkpoint"):
        checkpoint.load(path)


def test_files_that_are_no_run(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint"):
        checkpoint.load(path)
    torch.save(fusedres.CifarResNet(8).state_dict(), path)
    with pytest.raises(checkpoint.CheckpointError, match="has weights, but no run to go on with"):
        checkpoint.load(path)
    torch.save({"run": {}, "optimizer": {}, "version": 99}, path)
    with pytest.raises(checkpoint.CheckpointError, match="is of version 99, this fusedres reads 1"):
        checkpoint.load(path)


def test_depth_1202_takes_a_step():
    """The paper's deepest net, on a batch of two: forward, backward and all gradients."""
    net = fusedres.CifarResNet(1202).to(memory_format=torch.channels_last)
    loss = F.cross_entropy(net(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())
    torch.optim.SGD(net.parameters(), 0.01).step()
    assert net.fc.weight.isfinite().all()
