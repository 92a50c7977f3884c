"""What the autograd Functions share, and when one is needed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fusedres import ops
from fusedres.functional.batch_norm import BatchNorm


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work, which a pointer kernel can't follow."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def serves(op: str, x: Tensor, *norms: BatchNorm | None) -> bool:
    """Whether kernels take ``x``, rather than PyTorch's own operators, which know one process only."""
    if op == "bn_act" and any(norm is not None and norm.group is not None for norm in norms):
        return not transformed()
    least = ops.served_from(op, x.device, x.dtype, ops.forced_backend())
    if least is None or x.numel() < max(least, 1) or transformed():
        return False
    dtype = ops.stats_dtype(x)
    return all(norm is None or norm.kept_in(dtype) for norm in norms)


def differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def not_differentiable_again(grad: Tensor) -> Tensor:
    """With create_graph=True what comes out of a backward has to raise when it is differentiated.

    Without this a penalty on a gradient that doesn't depend on later layers would be ignored in silence.
    """
    return grad.detach().requires_grad_() if torch.is_grad_enabled() else grad


def backend_of(ctx: Any) -> AbstractContextManager[None]:
    """The implementation forced on the forward serves the backward too, wherever that is called."""
    return ops.backend(ctx.backend) if ctx.backend != ops.forced_backend() else nullcontext()


def parameter_gradients(
    sums: Sequence[Tensor | None], needed: Sequence[bool], dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """weight's and bias's gradients for each batch norm, out of the sums of the backward."""
    places = [(s, row) for s in sums for row in (1, 0)]
    return [
        s[row].to(dtype) if need and s is not None else None
        for (s, row), need, dtype in zip(places, needed, dtypes, strict=True)
    ]
