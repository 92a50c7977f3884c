"""The gate before a figure: fused and eager must compute the same.

Each side is compared with eager PyTorch in a wider type (fp64 for fp32, fp32 for bf16 and fp16) on
the very batch that is timed. The error of a tensor is |t - reference| / |reference| in the Euclidean
norm; the fused side's may be twice that of eager, plus a floor. Gradients need a higher one, even in
fp32: rounding flips the mask of a ReLU at a few places, other ones on either side.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedres.cli.bench import workload as work
from fusedres.cli.bench.workload import Forward, Workload

FACTOR = 2.0
OUTPUT_FLOOR = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.002}
GRADIENT_FLOOR = 0.05

Observed = dict[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """Relative errors by tensor: logits, loss and running statistics; gradients by parameter."""

    outputs: dict[str, float]
    gradients: dict[str, float]

    @property
    def worst_output(self) -> float:
        return max(self.outputs.values())

    @property
    def worst_gradient(self) -> float | None:
        return max(self.gradients.values(), default=None)


@dataclass(frozen=True)
class Failure:
    """The tensor that fails by most."""

    name: str
    error: float
    eager: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.name} errs by {self.error:.2g}, allowed {self.allowed:.2g} (eager {self.eager:.2g})"


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def reference(eager: nn.Module, workload: Workload, mode: str) -> tuple[Observed, Observed]:
    """Outputs and gradients of a copy of ``eager`` in the wider type."""
    wide = reference_dtype(workload.dtype)
    return observe(copy.deepcopy(eager).to(wide), workload.to(wide), mode)


def observe(model: nn.Module, workload: Workload, mode: str) -> tuple[Observed, Observed]:
    """Outputs and gradients of one step; the weights stay, running statistics move in training."""
    if mode == "inference":
        return infer(model, workload)
    logits, loss = work.loss(model, workload)
    loss.backward()  # type: ignore[no-untyped-call]
    outputs = {"logits": logits.detach(), "loss": loss.detach() / workload.loss_scale}
    model = getattr(model, "_orig_mod", model)  # behind torch.compile: the names without its prefix
    outputs |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad / workload.loss_scale
            parameter.grad = None
    return outputs, gradients


def infer(forward: Forward, workload: Workload) -> tuple[Observed, Observed]:
    """The logits of one forward; there are no gradients."""
    with torch.inference_mode():
        return {"logits": forward(workload.images)}, {}


def errors(observed: tuple[Observed, Observed], expected: tuple[Observed, Observed]) -> Errors:
    """Errors of ``observed``; a tensor that is missing, or isn't finite, errs by infinity."""
    outputs, gradients = (
        {name: _relative(got.get(name), want) for name, want in wanted.items()}
        for got, wanted in zip(observed, expected, strict=True)
    )
    return Errors(outputs, gradients)


def _relative(got: Tensor | None, want: Tensor) -> float:
    if got is None or got.shape != want.shape:
        return float("inf")
    wide = want.double()
    error = (got.double() - wide).norm() / wide.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float(error) if bool(error.isfinite()) else float("inf")


def failure(fused: Errors, eager: Errors, dtype: torch.dtype) -> Failure | None:
    """What the fused side gets wrong; None if it is as right as eager PyTorch."""
    failures = []
    for kind, ours, theirs, floor in (
        ("the output", fused.outputs, eager.outputs, OUTPUT_FLOOR[dtype]),
        ("the gradient of", fused.gradients, eager.gradients, GRADIENT_FLOOR),
    ):
        for name, error in ours.items():
            allowed = FACTOR * theirs[name] + floor
            if not error <= allowed:
                failures.append(Failure(f"{kind} {name}", error, theirs[name], allowed))
    return max(failures, key=lambda f: f.error / f.allowed, default=None)
