"""benchmarks/gpu_check_convs.py: its cases are those of the nets, wrong kernels are seen, searches end."""

from __future__ import annotations

import inspect
import time
import warnings
from collections import Counter
from pathlib import Path

import gpu_check_convs
import pytest
import torch
from gpu_check_conv_cases import Layer, block_layers, bytes_moved, calls
from gpu_check_run import Check, Record, Results
from shapes import Conv, layers

import fusedres
from fusedres import autotune, ops, plan
from fusedres.kernels import reference

BATCH = 3
INNER = Layer(Conv(16, 24, 3, 1, 8, 8), "inner", False)
# every kind that a block has
KINDS = [
    INNER,
    Layer(Conv(16, 24, 3, 2, 8, 7), "inner", False),
    Layer(Conv(16, 24, 1, 1, 8, 8), "inner", False),
    Layer(Conv(16, 24, 1, 1, 8, 8), "first", False),
    Layer(Conv(16, 24, 1, 1, 8, 8), "first", True),
    Layer(Conv(16, 24, 3, 2, 7, 7), "first", True),
    Layer(Conv(16, 24, 1, 1, 8, 8), "projection", False),
    Layer(Conv(16, 24, 1, 2, 8, 7), "projection", False),
]


def run(part, folder: Path, seconds: float = 60.0) -> list[Record]:
    check = Check("part", "cpu", True, folder, time.monotonic() + seconds)
    part(check)
    return Results(folder).latest()


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_layers_are_all_but_the_stem(model):
    found = block_layers(model, 224)
    by_shape: Counter[Conv] = Counter()
    for layer, count in found.items():
        by_shape[layer.conv] += count
    expected = {layer: n for layer, n in layers(model).items() if isinstance(layer, Conv) and layer.size != 7}
    assert by_shape == expected
    places: Counter[str] = Counter()
    for layer, count in found.items():
        places[layer.place] += count
    blocks = {"resnet18": 8, "resnet50": 16}[model]
    projections = sum(count for conv, count in expected.items() if "1x1/2" in str(conv)) + (
        model == "resnet50"
    )
    assert places == {
        "first": blocks,
        "projection": projections,
        "inner": by_shape.total() - blocks - projections,
    }
    assert sum(count for layer, count in found.items() if layer.compact) == 3


@pytest.mark.parametrize(
    ("op", "layer", "values"),
    [
        ("conv_fwd", KINDS[0], (16 + 24) * 64 * BATCH + 16 * 24 * 9),
        # du and y; x and dx
        ("conv_dgrad", KINDS[0], (2 * 24 + 2 * 16) * 64 * BATCH + 16 * 24 * 9),
        ("conv_wgrad", KINDS[0], (2 * 24 + 16) * 64 * BATCH + 16 * 24 * 9),
        # du and y of 4 x 4; x and dx of 8 x 7
        ("conv_dgrad", KINDS[1], (2 * 24 * 16 + 2 * 16 * 56) * BATCH + 16 * 24 * 9),
        # dx and what is added: of every pixel, of every second
        ("conv_dgrad", KINDS[3], (2 * 24 + 2 * 16) * 64 * BATCH + 16 * 24),
        ("conv_dgrad", KINDS[4], ((2 * 24 + 16) * 64 + 16 * 16) * BATCH + 16 * 24),
        # every second pixel
        ("conv_fwd", KINDS[7], (16 + 24) * 16 * BATCH + 16 * 24),
        ("conv_dgrad", KINDS[7], (2 * 24 + 16) * 16 * BATCH + 16 * 24),
        ("conv_wgrad", KINDS[7], (2 * 24 + 16) * 16 * BATCH + 16 * 24),
    ],
)
def test_bytes_of_the_contract(op, layer, values):
    assert bytes_moved(op, layer, BATCH, torch.bfloat16) == 2 * values


@pytest.mark.parametrize("layer", KINDS, ids=str)
def test_pytorchs_way_gives_the_same(layer):
    for call in calls(layer, BATCH, "cpu", torch.float32):
        with fusedres.backend("reference"):
            fused = call.run()
        composed = call.composed()
        if call.op == "conv_dgrad" and layer.inner:  # there the mask is left to the next pass
            composed[0].mul_(fused[0] != 0)
        for ours, theirs in zip(fused, composed, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        plain = call.plain()
        assert isinstance(plain, torch.Tensor) and plain.shape == fused[0].shape


def _off(name: str, index: tuple[int, ...], factor: float):
    def spoil(arguments):
        arguments[name][index] *= factor

    return spoil


def _unwritten(name: str):
    return lambda arguments: arguments[name].fill_(float("nan"))


def _shifted(arguments):
    arguments["y"].copy_(arguments["y"].roll(1, 3))


VALUES, SUMS = "output 0: ", "sums over the stored values: output 0: "
# op, arguments that are others than the caller's, what happens to the results, what is said
WRONG = {
    "positions": ("conv_fwd", {}, _shifted, VALUES),
    "a value": ("conv_fwd", {}, _off("y", (0, 1, 2, 3), 2.0), VALUES),
    "no prologue": ("conv_fwd", {"stats": None}, None, VALUES),
    "no ReLU": ("conv_fwd", {"relu": False}, None, VALUES),
    "statistics": ("conv_fwd", {}, _off("y_stats", (1, 3), 1.01), SUMS),
    "no statistics": ("conv_fwd", {}, _unwritten("y_stats"), SUMS),
    "no mask": ("conv_dgrad", {"relu": False}, None, VALUES),
    "sums": (
        "conv_dgrad",
        {},
        _off("x_sums", (slice(None), 2), 1.1),
        SUMS,
    ),
    "no shortcut": ("conv_dgrad", {"add": None}, None, VALUES),
    "no norm behind": ("conv_wgrad", {"y_sums": None}, None, VALUES),
    "a dead filter": ("conv_wgrad", {}, _off("dweight", (5,), 0.0), VALUES),
    "nothing written": ("conv_wgrad", {}, _unwritten("dweight"), VALUES),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("op", "other", "after", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_is_recorded(op, other, after, said, dtype, tmp_path, monkeypatch):
    right = getattr(reference, op)

    def wrong(*arguments):
        bound = inspect.signature(right).bind(*arguments).arguments
        spoiled = ops.forced_backend() == "auto"  # and not the reference that it is held against
        right(**bound | (other if spoiled else {}))
        if spoiled and after is not None:
            after(bound)

    layer = KINDS[3] if "add" in other else INNER
    monkeypatch.setattr(reference, op, wrong)
    monkeypatch.setitem(gpu_check_convs.IMPLEMENTATIONS, "cpu", ("auto",))
    monkeypatch.setattr(gpu_check_convs, "_plan", lambda *_: [(layer, 2, dtype)])
    records = {record["name"]: record for record in run(gpu_check_convs.convs, tmp_path)}
    assert not records[op]["ok"] and "ms" not in records[op]
    assert records[op]["error"].startswith(said)
    assert [name for name in plan.CONV_OPS if records[name]["ok"]] == [o for o in plan.CONV_OPS if o != op]
    assert len(gpu_check_convs.show_convs(list(records.values()))) == 5


def test_statistics_are_checked_where_float32_is_multiplied_as_tf32_alone(tmp_path, monkeypatch):
    right = reference.conv_fwd

    def wrong(*arguments):
        right(*arguments)
        if ops.forced_backend() == "auto":
            inspect.signature(right).bind(*arguments).arguments["y_stats"][1, 3] *= 1.01

    monkeypatch.setattr(reference, "conv_fwd", wrong)
    monkeypatch.setattr(gpu_check_convs, "_serving", lambda *_, ieee=False: [] if ieee else ["auto"])
    monkeypatch.setattr(gpu_check_convs, "_plan", lambda *_: [(INNER, 2, torch.float32)])
    records = {record["name"]: record for record in run(gpu_check_convs.convs, tmp_path)}
    assert records["conv_fwd"]["error"].startswith(SUMS) and "ms" not in records["conv_fwd"]
    assert records["conv_dgrad"]["ok"] and records["conv_wgrad"]["ok"]


def test_a_kernel_that_raises_is_recorded(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(gpu_check_convs, "_plan", lambda *_: [(INNER, 2, torch.bfloat16)])
    monkeypatch.setattr(reference, "conv_dgrad", broken)
    records = {record["name"]: record for record in run(gpu_check_convs.convs, tmp_path)}
    assert records["conv_dgrad"]["error"] == "RuntimeError: an illegal instruction"
    assert records["conv_fwd"]["ok"] and records["conv_wgrad"]["ok"]


def test_without_the_kernels_it_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check_convs.IMPLEMENTATIONS, "cpu", ("triton",))
    monkeypatch.setattr(gpu_check_convs.kernels, "unavailable", lambda: {"triton": "not there"})
    (record,) = run(gpu_check_convs.convs, tmp_path)
    assert record["ok"] and record["reason"] == "not there"
    assert gpu_check_convs.show_convs([record]) == ["triton: not measured, not there"]


def test_the_largest_share_of_a_step_comes_first(tmp_path):
    planned = gpu_check_convs._plan(block_layers("resnet50", 224), 256)
    assert [dtype for _, _, dtype in planned].count(torch.bfloat16) == 23 and len(planned) == 29
    # five times 1024 channels of 14 x 14, and its shortcut's gradient; once 64 of 56 x 56
    names = [str(layer) for layer, _, dtype in planned if dtype == torch.bfloat16]
    assert names.index("first 1x1/1 1024x14x14 -> 256") < names.index("first 1x1/1 64x56x56 -> 64")
    records = run(gpu_check_convs.convs, tmp_path, seconds=-1)
    assert (records[-1]["name"], records[-1]["layers_left"]) == ("out of time", 29)


class TestSearch:
    """The part that searches for settings, where a step and its measurements are made up."""

    US = {"aten": 30.0, "a": 20.0, "b": 10.0}
    SETTINGS = [["kernel", [1], {}]]
    CONV = plan.Conv(8, 64, 14, 14, 64, 3, 1, pending=True)

    @pytest.fixture
    def step(self, monkeypatch):
        def step():
            for op in plan.CONV_OPS:
                measured = plan.Measured(
                    "triton", {"aten": 30.0, "a": 20.0, "b": 10.0}, [["kernel", [1], {}]]
                )
                autotune._searches[-1].watch(op, plan.Conv(8, 64, 14, 14, 64, 3, 1, pending=True), measured)
                if op == "conv_fwd":
                    warnings.warn("fusedres: conv_fwd can't be measured: no registers", stacklevel=1)
                    warnings.warn("something else", stacklevel=1)

        monkeypatch.setattr(ops, "choice", lambda *_: plan.Choice("triton", "", open=True))
        monkeypatch.setattr(gpu_check_convs.workload, "training_step", lambda model, batch: step)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def test_every_convolution_is_recorded(self, step, tmp_path):
        records = run(gpu_check_convs.tune, tmp_path)
        found = [record for record in records if "us" in record]
        assert [record["name"] for record in found] == list(plan.CONV_OPS)
        assert found[0]["best"] == "triton" and found[0]["us"] == self.US
        assert plan.Conv(**found[0]["conv"]) == self.CONV
        assert found[0]["settings"] == self.SETTINGS
        assert records[-1]["file"] == str(autotune.path("NVIDIA Test"))
        (wrong,) = [record for record in records if not record["ok"]]
        assert wrong["error"] == "fusedres: conv_fwd can't be measured: no registers"
        assert gpu_check_convs.show_tune(records)[0] == (
            "conv_fwd   1 of 1 fused, all together 3.00x PyTorch's own"
        )

    def test_it_ends_in_time_with_what_it_has(self, step, tmp_path):
        records = run(gpu_check_convs.tune, tmp_path, seconds=-1)
        assert [record["name"] for record in records] == ["conv_fwd", "out of time", "kept"]
        assert "out of time" in gpu_check_convs.show_tune(records)[-1] and not autotune._searches
