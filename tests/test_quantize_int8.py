"""Levels of an activation: by the Triton kernel and plain PyTorch; the compiled code."""

from __future__ import annotations

import os
import re

import pytest
import torch
from bn_case import LAYOUTS
from triton_code import SHARED_KIB, compile_for, usage

import fusedres

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
QUANTIZE = torch.ops.fusedres.quantize_int8
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def backend():
    """The kernel where Triton's interpreter runs it, else plain PyTorch."""
    with fusedres.backend("triton" if INTERPRETED else "reference"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 9, 7), (1, 64, 20, 17), (1, 3, 1, 1), (1, 24, 3, 5)], ids=str)
def test_levels(shape, dtype, layout):
    x = (torch.randn(shape) * 3).to(dtype).to(memory_format=LAYOUTS[layout])
    z = QUANTIZE(x, 0.05, -31)
    assert z.dtype == torch.int8 and z.shape == x.shape
    exact = x.double() / 0.05 - 31
    assert z.min() == -128 or exact.min() > -128
    assert ((z.double() - exact.clamp(-128, 127)).abs() <= 0.5 + 1e-4).all()
    assert torch.equal(QUANTIZE(x, 0.05, -31), z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_and_saturation(dtype):
    """A step that divides without rounding: every tie goes to the even level."""
    values = torch.tensor([-1e4, -129, -127.5, -2.5, -1.5, -0.5, -0.0, 0.5, 1.5, 2.5, 126.5, 127.5, 3e4])
    x = (values * 0.25).to(dtype).view(1, -1, 1, 1)
    assert QUANTIZE(x, 0.25, 0).flatten().tolist() == [-128, -128, -128, -2, -2, 0, 0, 0, 2, 2, 126, 127, 127]
    assert QUANTIZE(x, 0.25, 1).flatten().tolist() == [-128, -128, -126, -2, 0, 0, 1, 2, 2, 4, 127, 127, 127]


def test_an_empty_batch():
    assert QUANTIZE(torch.randn(0, 8, 5, 5), 0.1, 0).shape == (0, 8, 5, 5)


def test_refusals():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got \[3, 4, 4\]"):
        QUANTIZE(x[0], 0.1, 0)
    with pytest.raises(TypeError, match="x must be floating point, got torch.int32"):
        QUANTIZE(x.int(), 0.1, 0)
    for step in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="step must be greater than 0, got"):
            QUANTIZE(x, step, 0)


@pytest.mark.skipif(not INTERPRETED, reason="the kernel's own loads and stores: TRITON_INTERPRET=1")
def test_traffic():
    pytest.importorskip("triton")
    from traffic import Traffic

    x = torch.randn(2, 16, 9, 30).half().to(memory_format=torch.channels_last)
    with Traffic(set()) as traffic:
        QUANTIZE(x, 0.1, 0)
    assert traffic.loaded == {"quantize_int8": 2 * x.numel()}
    assert traffic.stored == {"quantize_int8": x.numel()}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", SHARED_KIB)
@pytest.mark.parametrize(
    "dtype", ["bf16", *(pytest.param(name, marks=pytest.mark.codegen) for name in ("fp16", "fp32"))]
)
def test_code(arch, dtype, tmp_path):
    pytest.importorskip("triton")
    from fusedres.kernels.triton.quantize_int8 import BLOCK, WARPS, quantize_int8_kernel

    kinds = {
        "x": f"*{dtype}",
        "scale": "fp32",
        "zero": "fp32",
        "z": "*i8",
        "values": "i32",
        "BLOCK": "constexpr",
    }
    divisible = {(list(kinds).index("values"),): [["tt.divisibility", 16]]}
    options = {"num_warps": WARPS}
    compiled = compile_for(arch, quantize_int8_kernel, kinds, {"BLOCK": BLOCK}, options, divisible)
    used = usage(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    accesses = set(re.findall(r"(?:ld|st)\.global[.\w]*", compiled.asm["ptx"]))
    assert accesses == {"ld.global.v4.b32", "st.global.v4.b32"}
