"""Does a backward hold the only reference to the gradient it was given?

If so it may write its result over it: no fresh tensor, so no page faults and less memory. The
engine and Python hold a few references of their own, a number that differs between versions of
torch, so it is measured once on a gradient known to be owned and compared with after that.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor


def references(grad: Tensor) -> tuple[int, int, int]:
    """Holders of the tensor in C++, of its storage, and of its Python object."""
    if torch.compiler.is_compiling():
        return (0, 0, 0)
    private: Any = torch._C
    try:
        # by address: a Python object for the storage would itself be a holder, and stay one
        storage = private._storage_Use_Count(private._storage_address(grad))
        holders: int = grad._use_count()  # type: ignore[attr-defined]
    except (AttributeError, NotImplementedError):  # gone one day, or without a storage: never owned
        return (0, 0, 0)
    return (holders, storage, sys.getrefcount(grad))


class _Probe(torch.autograd.Function):
    """As many outputs as BNAct has, and a backward that is called the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[tuple[int, int, int]]) -> Tensor:
        ctx.seen = seen
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        holders = references(grad)
        ctx.seen.append(holders)
        return grad, None


@functools.cache
def _of_an_owned_gradient() -> tuple[int, int, int]:
    seen: list[tuple[int, int, int]] = []
    with torch.enable_grad():
        x = torch.ones(2, requires_grad=True)
        out = _Probe.apply(x, seen)
        (out * 2).backward(torch.ones(2))
    return seen[0]


def owned(grad: Tensor, holders: tuple[int, int, int]) -> bool:
    """Whether ``grad`` may be overwritten.

    Args:
        grad: the gradient that a backward was given.
        holders: ``references(grad)``, called by the backward itself with nothing else on its stack.
    """
    return (
        type(grad) is Tensor
        and not torch.is_grad_enabled()
        and holders != (0, 0, 0)
        and holders == _of_an_owned_gradient()
        and grad._base is None
    )
