"""The sides of a comparison: how each one computes the workload, and what it took to get ready."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fusedres
from fusedres.cli.bench import check, peers, workload
from fusedres.cli.bench.check import Observed
from fusedres.cli.bench.workload import Forward, Step, Workload
from fusedres.cli.errors import CommandError, first_line

COMPILE = "compile"


@dataclass(frozen=True)
class Side:
    """One implementation in one mode.

    Args:
        description: what runs, with its version.
        step: what is timed.
        observe: outputs and gradients of one step.
        startup_s: seconds from the plain model to the first answer; None in training.
        profiled: whether PyTorch's profiler sees what it does.
    """

    description: str
    step: Step
    observe: Callable[[], tuple[Observed, Observed]]
    startup_s: float | None = None
    profiled: bool = True


def training(
    fused: nn.Module, eager: nn.Module, batch: Workload, *, kernels: str, origin: str, compiled: bool
) -> dict[str, Side]:
    """Both models, which are in training mode, and torch.compile of a copy of the eager one."""

    def side(model: nn.Module, description: str) -> Side:
        observe = functools.partial(check.observe, model, batch, "train")
        return Side(description, workload.training_step(model, batch), observe)

    sides = {
        "fused": side(fused, f"fusedres {fusedres.__version__}, {kernels} kernels"),
        "eager": side(eager, origin),
    }
    if compiled:
        model: Any = torch.compile(copy.deepcopy(eager))
        sides[COMPILE] = side(model, f"torch.compile, torch {torch.__version__}")
    return sides


def inference(
    fused: nn.Module, eager: nn.Module, batch: Workload, *, origin: str, compiled: bool, with_peers: bool
) -> tuple[dict[str, Side], list[str]]:
    """What can be made of both models, which are in evaluation mode, and notes on what can't.

    Each takes fp32 images and returns fp32 logits, and converts what it needs to in between.

    Raises:
        CommandError: torch.compile fails.
    """
    dtype = batch.dtype
    bits = str(dtype).removeprefix("torch.")
    sides = {
        "fused": prepare(
            f"fusedres {fusedres.__version__}, optimize_for_inference to {bits}",
            lambda: fusedres.optimize_for_inference(fused, dtype),
            batch,
        ),
        "eager": prepare(f"{origin}, converted to {bits}", lambda: Converted(eager, dtype), batch),
        "folded": prepare(
            "eager with its batch norms folded into the convolutions",
            lambda: Converted(folded(eager), dtype),
            batch,
        ),
    }
    if compiled:
        description = f"torch.compile of eager with freezing, torch {torch.__version__}"
        try:
            sides[COMPILE] = prepare(description, lambda: frozen(eager, batch), batch)
        except Exception as error:  # anything can go wrong in there, a missing compiler to begin with
            raise CommandError(f"torch.compile failed: {first_line(error)}") from error
    notes = []
    for peer in peers.PEERS if with_peers else ():
        try:
            peer.check(dtype)
            make = functools.partial(peer.build, eager, batch)
            sides[peer.name] = prepare(peer.description(dtype), make, batch, profiled=False)
        except CommandError as error:
            notes.append(f"{peer.title} is left out: {error}")
        except Exception as error:  # its own failure leaves the other sides as they are
            notes.append(f"{peer.title} is left out: it failed, {type(error).__name__}: {first_line(error)}")
    return sides, notes


def prepare(description: str, make: Callable[[], Forward], batch: Workload, profiled: bool = True) -> Side:
    """A side for inference; the first call is part of its start-up, for much is left to it."""
    start = time.perf_counter()
    forward = make()
    step = workload.inference_step(forward, batch)
    step()
    if batch.device.type == "cuda":
        torch.cuda.synchronize()
    startup_s = time.perf_counter() - start
    return Side(description, step, functools.partial(check.infer, forward, batch), startup_s, profiled)


class Converted(nn.Module):
    """A copy of a model whose weights are converted once, as nobody would leave to autocast in inference.

    Shapes:
        [N, 3, H, W] -> [N, classes], in the images' dtype
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).to(images.dtype)  # type: ignore[no-any-return]


def folded(model: nn.Module) -> nn.Module:
    """A copy with every batch norm folded into the convolution that is registered right before it."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, conv), (norm_name, norm) in zip(children, children[1:], strict=False):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return model


def frozen(model: nn.Module, batch: Workload) -> Forward:
    """torch.compile with the weights as constants, for which it folds and packs them."""
    from torch._inductor import config  # takes a second

    # the setting counts when the first call compiles, and is put back for who else compiles
    with config.patch(freezing=True), torch.inference_mode():
        compiled: Forward = torch.compile(Converted(model, batch.dtype))
        compiled(batch.images)
    return compiled
