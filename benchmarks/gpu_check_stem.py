"""The part for the stem: each of its ops by each implementation that has it, beside PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_check_cases import EPS, Inputs, Outputs, _activation, _batch, _parameters, _wide
from gpu_check_conv_cases import Call
from gpu_check_convs import any_installed, measure
from gpu_check_ops import Timer, copy_gbps
from gpu_check_run import Check, Record
from shapes import IMAGE_SIZE
from torch import Tensor

import fusedres
from fusedres import plan
from fusedres.ops import stats_dtype
from fusedres.plan import traffic

_OPS = torch.ops.fusedres
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FILTERS, _TINY_IMAGE = 64, 32
_ENOUGH = 1.0  # seconds, for an op in a dtype


def stem(check: Check) -> None:
    """A gate for each op, dtype and implementation, then its time beside cuDNN's and the floor's."""
    if not any_installed(check):
        return
    timer = Timer(check)
    gbps, _ = copy_gbps(check, timer)
    batch = _batch(check.device, check.tiny)
    size = _TINY_IMAGE if check.tiny else IMAGE_SIZE
    torch.manual_seed(0)
    facts = {"variant": f"7x7/2 3x{size}x{size} -> {_FILTERS}", "count": 1, "batch": batch}
    for dtype in _DTYPES:
        for call in calls(batch, size, check.device, dtype):
            if not check.tiny and check.left() < _ENOUGH:
                check.record("out of time")
                return
            measure(check, call, dtype, facts, timer, gbps)


def calls(batch: int, size: int, device: str, dtype: torch.dtype) -> Iterator[Call]:
    """The stem's ops on ``batch`` images, as a net calls them."""
    conv = plan.Conv(batch, 3, size, size, _FILTERS, 7, 2)
    half = (size + 1) // 2
    t = Inputs(x=_activation((batch, 3, size, size), dtype, device, mean=0.5))
    t.dy = _activation((batch, _FILTERS, half, half), dtype, device)
    weight = torch.randn(_FILTERS, 3, 7, 7, device=device) / 147**0.5
    t.weight = weight.to(dtype, memory_format=torch.channels_last)
    t.gamma, t.beta = _parameters(_FILTERS, device)
    with fusedres.backend("reference"):
        t.pixels = _OPS.stem_conv(t.x, t.weight, None, None, EPS, False, dtype)[2]
    # 16 bits: the reference computes in float32, and rounds where the kernels do
    wide = _wide(t) if dtype == torch.float32 else t
    short = str(dtype).removeprefix("torch.")
    sizes = {**traffic.around(conv, short), **traffic.pooled(conv.out_shape, short)}
    sizes |= traffic.images(conv, short)

    def call(op: str, moved: str, run: Any, **more: Any) -> Call:
        number = sum(sizes[name].bytes for name in moved.split())
        return Call(op, conv, number, traffic.flop(conv), lambda: run(t), lambda: run(wide)[0], **more)

    def plain() -> Tensor:
        return F.conv2d(t.x, t.weight, None, 2, 3)

    def composed() -> Outputs:
        y = plain()
        return y, _OPS.bn_stats(y, t.gamma, t.beta, EPS)

    def gradient() -> Tensor:
        arguments = (None, [2, 2], [3, 3], [1, 1], False, [0, 0], 1, [False, True, False])
        return torch.ops.aten.convolution_backward(t.dy, t.x, t.weight, *arguments)[1]

    yield call(
        "stem_conv",
        "x packed weight y",
        lambda t: _OPS.stem_conv(t.x, t.weight, t.gamma, t.beta, EPS, True, t.x.dtype)[:2],
        plain=plain,
        composed=composed,
        summed=lambda y: _OPS.bn_stats(y, t.gamma.to(stats_dtype(y)), t.beta.to(stats_dtype(y)), EPS),
    )
    yield call(
        "stem_wgrad",
        "dy pixels dweight",
        lambda t: (_OPS.stem_wgrad(t.dy, t.pixels, t.weight, size, size),),
        plain=gradient,
        composed=lambda: (gradient(),),
    )
    yield call(
        "stem_bias_act",
        "x weight pooled",
        lambda t: (_OPS.stem_bias_act(t.x, t.weight, t.beta, None, None, True, t.x.dtype),),
        plain=plain,
        composed=lambda: (_OPS.bias_relu_maxpool(plain(), t.beta),),
    )


def show_stem(records: list[Record]) -> list[str]:
    """Each op's time, against the floor and PyTorch's."""
    lines = []
    for record in records:
        what = f"{record['name']:<14}{record.get('implementation', ''):<10}{record.get('dtype', ''):<9}"
        if "ms" in record:
            lines.append(
                f"{what}{1e3 * record['ms']:.1f} us, {record['share_of_floor']:.0%} of the floor "
                f"({record['bound']}), {record['times_plain']:.2f}x PyTorch's convolution, "
                f"{record['times_composed']:.2f}x with the ops"
            )
        elif "reason" in record:
            lines.append(f"{record['implementation']}: not measured, {record['reason']}")
        elif record["name"] == "out of time":
            lines.append("out of time, the rest was not measured")
    return lines
