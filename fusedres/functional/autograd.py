"""What the autograd Functions share, and when one is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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


def _batched(grad: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


class _Once(torch.autograd.Function):
    """Gradients that raise when they are differentiated with respect to what they depend on."""

    @staticmethod
    def forward(ctx: Any, gradients: Any, *sources: Tensor) -> Any:
        if isinstance(gradients, Tensor):
            return gradients.detach()
        return tuple(None if g is None else g.detach() for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "a gradient that a fused backward gave (with create_graph=True) can't be differentiated again; "
            "under torch.func.grad everything runs by PyTorch's operators, and can"
        )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward by kernels, from ``backward(ctx, saved tensors, gradient, ...)``.

    It is run by the implementation forced on the forward, wherever it is called. Unlike
    torch.autograd.function.once_differentiable it raises, too, when the gradient alone is differentiated
    (torch.autograd.functional.jvp), and when torch.autograd.grad asks for some of the inputs: there a
    penalty would be left out in silence.
    """

    @functools.wraps(backward)
    def run(ctx: Any, grad: Tensor, *more: Any) -> Any:
        if not torch.compiler.is_compiling() and _batched(grad):
            raise NotImplementedError(
                "a fused backward takes one gradient at a time, not a batch of them (is_grads_batched=True, "
                "vectorize=True); under torch.func.jacrev everything runs by PyTorch's operators, and can"
            )
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint gives them a single time
        with ops.backend(ctx.backend) if ctx.backend != ops.forced_backend() else nullcontext():
            if not torch.is_grad_enabled():
                return backward(ctx, saved, grad, *more)
            with torch.no_grad():
                gradients = backward(ctx, saved, grad, *more)
        inputs = (getattr(node, "variable", None) for node, _ in ctx.next_functions)
        sources = [t for t in (grad, *saved, *inputs) if t is not None and t.requires_grad]
        return _Once.apply(gradients, *(sources or [grad.detach().requires_grad_()]))

    return run


def parameter_gradients(
    sums: Sequence[Tensor | None], needed: Sequence[bool], dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """weight's and bias's gradients for each batch norm, out of the sums of the backward."""
    places = [(s, row) for s in sums for row in (1, 0)]
    return [
        s[row].to(dtype) if need and s is not None else None
        for (s, row), need, dtype in zip(places, needed, dtypes, strict=True)
    ]
