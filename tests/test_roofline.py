"""The traffic model: its shapes are the nets', its passes move what the tensors passed to operators hold."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from typing import Any

import pytest
import roofline
import torch
from shapes import Conv, layers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedres
from fusedres.cli.bench.eager import EagerResNet
from fusedres.cli.roofline import LEVELS, nets, passes
from fusedres.plan import traffic

BATCH, SIZE = 2, 64
Moved = Counter[tuple[str, int]]  # of an op, and the bytes of a call


class Observed(TorchDispatchMode):
    """The bytes of full tensors that each call of an operator gets and gives."""

    def __init__(self, namespace: str, names: dict[str, str] | None = None) -> None:
        super().__init__()
        self.namespace, self.names, self.moved = namespace, names, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._opname.rstrip("_") if self.names is None else self.names.get(str(func))
        if func.namespace == self.namespace and name is not None:
            self.moved[name, self.bytes_of(func, args, out)] += 1
        return out

    def bytes_of(self, func: Any, args: Any, out: Any) -> int:
        seen = sum(_bytes(t) for t in tree_leaves((args, out)) if isinstance(t, Tensor) and t.dim() == 4)
        if func._opname == "bn_act_backward_reduce_":  # writes du over the gradient
            seen += _bytes(args[0])
        return seen - _unread(func._opname, args)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _unread(op: str, args: Any) -> int:
    """Of what a call gets: the pixels that a strided 1x1 doesn't see, and a weight passed for its shape."""
    if op == "conv_fwd":
        x, weight, stride = args[0], args[5], args[6]
        return _skipped(x, stride) if weight.shape[2] == 1 else 0
    if op == "conv_wgrad":
        x, weight, stride = args[4], args[7], args[8]
        return _bytes(weight) + (_skipped(x, stride) if weight.shape[2] == 1 else 0)
    return _bytes(args[2]) if op == "stem_wgrad" else 0


def _skipped(x: Tensor, stride: int) -> int:
    return _bytes(x) - x[:, :, ::stride, ::stride].numel() * x.element_size()


def modelled(level: str, model: str, dtype: str) -> Moved:
    found: Moved = Counter()
    for placed in passes(level, model, BATCH, SIZE, dtype):
        work = placed.work
        # the image that stem_conv packs and reads again is passed once
        again = sum(t.bytes for t in work.writes if t.name == "packed")
        found[work.op, work.bytes - again] += 1
    return found


@pytest.mark.parametrize(("model", "size"), [("resnet18", 75), ("resnet50", 75), ("resnet152", 224)])
def test_shapes_are_the_nets(model, size):
    ours = nets.net(model, 1, size)
    counted = Counter(Conv(c.channels, c.filters, c.side, c.stride, c.height, c.width) for c in ours.convs)
    assert counted == {layer: n for layer, n in layers(model, size).items() if isinstance(layer, Conv)}
    with torch.device("meta"):
        net = EagerResNet(model)
    assert ours.weights == sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert [b.name for b in ours.blocks] == [
        n for n, _ in net.named_modules() if n.count(".") == 1 and "layer" in n
    ]


@pytest.mark.parametrize(("model", "dtype"), [("resnet18", "float32"), ("resnet50", "bfloat16")])
def test_blocks_pass_what_is_counted(model, dtype):
    """Every call of our ops in a training step, against the level of block Functions."""
    net, x = getattr(fusedres, model)(), torch.randn(BATCH, 3, SIZE, SIZE)
    net.to(memory_format=torch.channels_last).train()
    x = x.contiguous(memory_format=torch.channels_last)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with fusedres.backend("reference"), Observed("fusedres") as observed:
        with autocast:
            loss = net(x).sum()
        loss.backward()
    ours = {key: n for key, n in modelled("block", model, dtype).items() if key[0] in traffic.OPS}
    vectors = ("bn_update_running", "global_avg_pool", "global_avg_pool_backward", "cast_weights")
    assert {k: n for k, n in observed.moved.items() if k[0] not in vectors} == {
        k: n for k, n in ours.items() if k[0] not in vectors
    }


# PyTorch's operators, by the model's names of them
ATEN = {
    "aten.convolution.default": "convolution",
    "aten.native_batch_norm.default": "batch_norm",
    "aten.relu_.default": "relu_",
    "aten.add_.Tensor": "add_",
    "aten.max_pool2d_with_indices.default": "max_pool",
    "aten.max_pool2d_with_indices_backward.default": "max_pool_backward",
    "aten.threshold_backward.default": "threshold_backward",
    "aten.native_batch_norm_backward.default": "batch_norm_backward",
    "aten.convolution_backward.default": "convolution_backward",
    "aten.add.Tensor": "add",
}


class ObservedAten(Observed):
    """Of PyTorch's operators, with what they read again or don't read."""

    def bytes_of(self, func: Any, args: Any, out: Any) -> int:
        name = ATEN[str(func)]
        if name == "batch_norm":  # the statistics, then the values
            return 2 * _bytes(args[0]) + _bytes(out[0])
        if name == "batch_norm_backward":
            return 2 * (_bytes(args[0]) + _bytes(args[1])) + _bytes(out[0])
        if name == "max_pool_backward":  # passes the input, and reads the index
            return _bytes(args[0]) + _bytes(args[-1]) + _bytes(out)
        if name == "convolution":
            return sum(map(_bytes, (args[0], args[1], out))) - self._unseen(args[0], args[1], args[3])
        if name == "convolution_backward":
            dy, x, weight, stride = args[0], args[1], args[2], args[4]
            of_weight = _bytes(dy) + _bytes(x) - self._unseen(x, weight, stride) + _bytes(weight)
            return of_weight + (_bytes(dy) + _bytes(weight) + _bytes(x) if args[-1][0] else 0)
        return super().bytes_of(func, args, out)

    @staticmethod
    def _unseen(x: Tensor, weight: Tensor, stride: list[int]) -> int:
        return _skipped(x, stride[0]) if weight.shape[2] == 1 else 0


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_eager_passes_what_is_counted(model):
    """Every operator of an eager training step but the classifier's and the average pool's."""
    net, x = EagerResNet(model).train(), torch.randn(BATCH, 3, SIZE, SIZE)
    with ObservedAten("aten", ATEN) as observed:
        net(x).sum().backward()
    expected: Moved = Counter()
    both: dict[tuple[str, str], int] = {}
    for block, layer, _, work in passes("eager", model, BATCH, SIZE, "float32"):
        if work.op in ("convolution_dgrad", "convolution_wgrad"):  # one call
            both[block, layer] = both.get((block, layer), 0) + work.bytes
        elif work.op in ATEN.values():
            expected[work.op, work.bytes] += 1
    expected.update(("convolution_backward", moved) for moved in both.values())
    observed.moved = Counter({k: n for k, n in observed.moved.items() if k[1]})  # additions of 4D tensors
    assert observed.moved == expected


def per_image(level: str, *kinds: str) -> float:
    found = passes(level, "resnet50", 256, 224, "bfloat16")
    return sum(placed.work.bytes_of(kind) for placed in found for kind in kinds) / 256 / 1e6


@pytest.mark.parametrize(
    ("level", "megabytes"),
    # of the design, whose kernels read images that are cast already; 277 stands there for dBN separate: see
    # the test below
    [("block", 272), ("across", 239), ("joint", 177)],
)
def test_figures_of_the_design(level, megabytes):
    assert round(per_image(level, traffic.ACTIVATION, traffic.PARAMETER)) == megabytes


def test_figures_of_the_design_without_parameters():
    assert round(per_image("conv", traffic.ACTIVATION), 1) == 51.5
    assert per_image("eager", traffic.ACTIVATION) == pytest.approx(472, rel=3e-3)
    flop = sum(placed.work.flop for placed in passes("conv", "resnet50", 256, 224, "bfloat16"))
    assert round(flop / 256 / 1e9, 2) == 8.18


def test_a_separate_dbn_writes_and_reads_a_gradient_for_each_raw_output():
    """Written once and read twice in place of du and y twice: one tensor more, of a projection du less."""
    convs = nets.net("resnet50", 1, 224).blocks
    raw = sum(traffic.around(conv, "bfloat16")["y"].bytes for block in convs for conv in block.convs)
    more = per_image("dbn", traffic.ACTIVATION) - per_image("block", traffic.ACTIVATION)
    assert more == pytest.approx(raw / 1e6)


@pytest.mark.parametrize("model", nets.DEPTHS)
def test_more_fusion_moves_less_and_computes_the_same(model):
    for mode in ("train", "inference"):
        levels = [name for name, level in LEVELS.items() if level.mode == mode]
        moved, flop = [], set()
        for level in levels:
            found = passes(level, model, 4, 96, "float16")
            moved.append(sum(placed.work.bytes for placed in found))
            flop.add(sum(placed.work.flop for placed in found))
        assert moved == sorted(moved, reverse=True) and len(flop) == 1


def test_the_command(capsys, tmp_path):
    path = tmp_path / "out.json"
    ceilings = ["--bandwidth", "1000", "--peak", "500"]
    assert roofline.main(["--batch", "8", "--dtype", "fp16", *ceilings, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1,000.0 GB/s, 500.00 TFLOP/s (given)" in out
    report = json.loads(path.read_text())
    assert report["levels"].keys() == LEVELS.keys() and report["kind"] == "roofline"
    for name, level in report["levels"].items():
        parts = (level["blocks"], level["layers"], level["passes"])
        for key in ("flop", "floor_s"):
            assert [sum(row[key] for row in rows) for rows in parts] == pytest.approx([level[key]] * 3)
        moved = sum(level["bytes"].values())
        # no faster than by all bytes, or by all FLOP
        assert level["floor_s"] >= max(moved / 1e12, level["flop"] / 500e12) * (1 - 1e-9), name
        for row in level["passes"]:
            tensors = [*row["reads"], *row["writes"]]
            assert sum(tensor["bytes"] for tensor in tensors) == sum(row["bytes"].values()), row


@pytest.mark.parametrize("detail", roofline.DETAILS)
def test_details(detail, capsys):
    assert roofline.main(["--level", "block", "--detail", detail, "--batch", "1", "--image-size", "64"]) == 0
    out = capsys.readouterr().out
    assert {"block": "layer4.2", "layer": "conv3 backward", "pass": "-> dx", "net": "block*"}[detail] in out


def test_bad_input(capsys):
    for argv, said in (
        (["--bandwidth", "-1"], "above 0"),
        (["--json", "no/such/place.json"], "no directory no/such"),
        (["--model", "resnet51"], "resnet51"),
    ):
        with pytest.raises(SystemExit) as exit:
            roofline.main(argv)
        assert exit.value.code == 2 and said in capsys.readouterr().err


def test_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setattr(roofline, "_COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(roofline, "_products", lambda device: (64,))
    monkeypatch.setattr(roofline, "_SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = roofline.measured(torch.float32)
    assert found["bandwidth"] > 0 and found["peak"] > 0 and "threads" in found["source"]


def test_the_floors_of_gpu_check_are_of_the_same_contracts():
    conv_cases = importlib.import_module("gpu_check_conv_cases")
    layer = conv_cases.Layer(Conv(256, 512, 1, 2, 56, 56), "projection", False)
    block = nets.net("resnet50", 4, 224).blocks[3]
    sizes = {**traffic.around(block.projection, "bfloat16")}
    expected = traffic.moved("conv_fwd", "projection", sizes).bytes
    assert conv_cases.bytes_moved("conv_fwd", layer, 4, torch.bfloat16) == expected


def test_a_prediction_says_what_it_assumes(capsys):
    """Longer than the floor by what is assumed, and no more."""
    assert roofline.main(["--level", "block", "--level", "compile"]) == 0
    out = capsys.readouterr().out
    found, ceilings = passes("block", "resnet50", 256, 224, "bfloat16"), roofline._known(torch.bfloat16)
    seconds = roofline.predicted(found, ceilings)
    floor = roofline.rows(found, ceilings, "net")[0]["floor_s"]
    assert floor / 0.9 < seconds < 1.3 * floor / 0.85
    assert "predicted, not measured, if memory reaches 90% of its ceiling, arithmetic 85%" in out
    assert f"block: {1e3 * seconds:.1f} ms, {256 / seconds:,.0f} img/s" in out and "compile:" not in out
