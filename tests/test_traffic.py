"""What whole blocks move through memory, counted from the kernels' own loads and stores."""

from __future__ import annotations

import os

import pytest
import torch
from chain_case import ChainCase, call
from torch.utils._pytree import tree_leaves

import fusedres

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter: TRITON_INTERPRET=1"
)


def traffic_of(case: ChainCase) -> dict[str, tuple[int, int]]:
    """Values loaded and stored by each op, of activations alone."""
    from traffic import Traffic

    filters = {conv.weight.data_ptr() for conv in case.convs}
    x = case.x.requires_grad_()
    for conv in case.convs:
        conv.weight.requires_grad_()
    with fusedres.backend("triton"), Traffic(filters) as traffic:
        call(x, case.convs, *case.rest(case.dtype)).backward(case.grad)
    size = x.element_size()
    return {
        op: (traffic.loaded.get(op, 0) // size, traffic.stored.get(op, 0) // size)
        for op in sorted({*traffic.loaded, *traffic.stored})
    }


def values(case: ChainCase) -> tuple[int, list[int]]:
    """Of the input, and of the raw output of each convolution."""
    n, channels, h, w = case.x.shape
    counts = []
    size = (h, w)
    for i, conv in enumerate(case.convs):
        start = (h, w) if case.shortcut == "projection" and i == len(case.convs) - 1 else size
        size = tuple((s - 1) // conv.stride + 1 for s in start)
        counts.append(n * conv.weight.shape[0] * size[0] * size[1])
    return case.x.numel(), counts


def test_basic_block_with_an_identity():
    case = ChainCase("basic", torch.float32, size=(2, 6, 5))
    x, (y1, y2) = values(case)
    z = y2
    assert traffic_of(case) == {
        "conv_fwd": (x + y1, y1 + y2),
        "bn_act": (y2 + x, z),
        # g, z and y2; du
        "bn_act_backward_reduce": (z + z + y2, y2),
        # the second: du, y2, y1. The first: du1, y1, x
        "conv_wgrad": ((y2 + y2 + y1) + (y1 + y1 + x), 0),
        # the second: du, y2, y1 for the mask and the sums. The first: du1, y1, and du as the shortcut's
        "conv_dgrad": ((y2 + y2 + y1) + (y1 + y1 + y2), y1 + x),
    }


def test_bottleneck_with_a_projection():
    case = ChainCase("bottleneck, projection of stride 1", torch.float32, size=(2, 5, 5))
    x, (y1, y2, y3, yd) = values(case)
    z = y3
    assert traffic_of(case) == {
        "conv_fwd": (x + y1 + y2 + x, y1 + y2 + y3 + yd),
        "bn_act": (y3 + yd, z),
        "bn_act_backward_reduce": (z + z + y3 + yd, y3),
        "conv_wgrad": ((y3 + y3 + y2) + (y2 + y2 + y1) + (y1 + y1 + x) + (y3 + yd + x), 0),
        "conv_dgrad": (
            (y3 + y3 + y2) + (y2 + y2 + y1) + (y1 + y1 + x) + (y3 + yd),
            y2 + y1 + x + x,
        ),
    }


def test_bottleneck_of_stride_two():
    """What a strided 1x1 doesn't see is never loaded, and its gradient is the smaller by it."""
    case = ChainCase("bottleneck, projection", torch.float32, size=(2, 6, 6))
    x, (y1, y2, y3, yd) = values(case)
    z, seen = y3, x // 4
    assert traffic_of(case) == {
        "conv_fwd": (x + y1 + y2 + seen, y1 + y2 + y3 + yd),
        "bn_act": (y3 + yd, z),
        "bn_act_backward_reduce": (z + z + y3 + yd, y3),
        "conv_wgrad": ((y3 + y3 + y2) + (y2 + y2 + y1) + (y1 + y1 + x) + (y3 + yd + seen), 0),
        "conv_dgrad": (
            (y3 + y3 + y2) + (y2 + y2 + y1) + (y1 + y1 + seen) + (y3 + yd),
            y2 + y1 + x + seen,
        ),
    }


def test_nothing_but_these_is_run_on_activations():
    """No op of PyTorch's reads or writes one meanwhile, so that the count is the whole."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Others(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            big = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.numel() >= 300]
            if func.namespace == "aten" and big and not func.is_view:
                self.seen.append(func._opname)
            return func(*args, **(kwargs or {}))

    case = ChainCase("bottleneck, projection", torch.float32, size=(2, 6, 6))
    with fusedres.backend("triton"):
        x = case.x.requires_grad_()
        with Others() as others:
            out = call(x, case.convs, *case.rest(case.dtype))
            torch.autograd.grad(out, x, case.grad)
    assert set(others.seen) <= {"detach", "empty_like", "new_empty", "empty", "detach_"}, others.seen
