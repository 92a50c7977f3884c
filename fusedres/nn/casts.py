"""Convolutions under autocast: their weights cast all at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres import functional
from fusedres.nn.fuse import altered, traced


class _Casts(threading.local):
    """Weights that were cast for the forward under way in this thread, by their module's id."""

    def __init__(self) -> None:
        self.of: dict[int, Tensor] = {}


_casts = _Casts()


@contextlib.contextmanager
def _casts_of(casts: dict[int, Tensor]) -> Iterator[None]:
    before = _casts.of
    _casts.of = before | casts
    try:
        yield
    finally:
        _casts.of = before


def cast_weights(model: nn.Module, x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside, :func:`convolve` finds the weights of ``model``'s convolutions in autocast's dtype.

    Autocast casts each weight by itself, a launch for every layer; here all are cast at once, for as long
    as one forward, by plain tensors that no state_dict sees. Does nothing without autocast, where no
    kernel has it in one launch, or under a tracer.

    Args:
        model: its convolutions with plain float32 weights are taken.
        x: the input; says which device's autocast, and whether it is traced.
    """
    if torch.compiler.is_compiling() or traced(x) is not None:
        return contextlib.nullcontext()
    device = x.device
    if (
        not torch.amp.is_autocast_available(device.type)
        or not torch.is_autocast_enabled(device.type)
        or not functional.casts_weights(device)
    ):
        return contextlib.nullcontext()
    found = {id(m): m.weight for m in model.modules() if type(m) is nn.Conv2d and _castable(m, device)}
    casts = functional.cast_weights(list(found.values()), torch.get_autocast_dtype(device.type))
    return _casts_of(dict(zip(found, casts, strict=True)))


def _castable(conv: nn.Conv2d, device: torch.device) -> bool:
    weight = conv._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight.dim() == 4
        and weight.numel() > 0
        and weight.device == device
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and altered(conv) is None
    )


def _is_what_autocast_would_take(cast: Tensor, conv: Any, x: Tensor) -> bool:
    """Whether autocast and grad mode are here as where the cast was made."""
    device = x.device.type
    return (
        torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device) == cast.dtype
        and (cast.requires_grad or not (torch.is_grad_enabled() and conv.weight.requires_grad))
    )


def weight_of(conv: nn.Module, x: Tensor) -> Tensor:
    """The weight that :func:`cast_weights` made for ``conv`` if there is one, else its own."""
    weight = _casts.of.get(id(conv))
    if weight is not None and _is_what_autocast_would_take(weight, conv, x):
        return weight
    return conv._parameters["weight"]  # type: ignore[return-value]


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(x)``, with the weight that :func:`cast_weights` made for it if there is one."""
    if torch.compiler.is_compiling():
        return conv(x)  # type: ignore[no-any-return]
    weight = _casts.of.get(id(conv))
    if weight is None or not _is_what_autocast_would_take(weight, conv, x):
        return conv(x)  # type: ignore[no-any-return]
    settings: Any = conv
    return F.conv2d(
        x.to(weight.dtype),
        weight,
        None,
        settings.stride,
        settings.padding,
        settings.dilation,
        settings.groups,
    )
