"""A trained model made for inference alone: folded, one pass a convolution, packed for the machine."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fusedres.inference import onednn
from fusedres.inference.calibrate import quantize_net
from fusedres.inference.fold import fold
from fusedres.inference.graph import When
from fusedres.inference.model import OptimizedResNet

__all__ = ["OptimizedResNet", "optimize_for_inference", "quantize_for_inference"]

# by name: importing torchvision takes a second, and who has such a model has imported it
_FAMILIES = {
    ("fusedres.models.resnet", "Network"),
    ("torchvision.models.resnet", "ResNet"),
    ("timm.models.resnet", "ResNet"),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def optimize_for_inference(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    example_input: Tensor | None = None,
    cuda_graph: When = "auto",
) -> OptimizedResNet:
    """A module that gives ``model``'s logits, as fast as this machine can.

    Batch norms are folded into the convolutions (in float64, then rounded once to ``dtype``); each
    convolution adds its bias and residual and applies the ReLU in its own pass. Any number of images and
    any size may follow each other. The result can be saved, copied and exported like any module; what is
    packed for a machine is made on first use and not saved. ``model`` itself is left alone.

    Args:
        model: a ResNet of fusedres, torchvision or timm, in eval mode.
        dtype: of the parameters, and to compute in; None for the model's own. A CPU without convolutions of
            a 16-bit dtype computes in float32, which is up to ten times as fast there.
        example_input: [N, C, H, W], as it will be called: what is done on first use is done now.
        cuda_graph: whether a GPU replays a captured graph: True, False, or "auto" for batches so small
            that launching is what takes the time.

    Returns:
        a module that takes [N, C, H, W] in the model's dtype or ``dtype`` and returns [N, classes] in
        the dtype of its input.

    Raises:
        ValueError: the model is in training mode, has a hook, or a batch norm without running statistics;
            an unknown dtype.
        TypeError: another architecture.
    """
    _check(model, dtype, cuda_graph)
    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = own if dtype is None else dtype
    # parameters that a load_state_dict can write to, whatever mode the caller is in
    with torch.inference_mode(False), torch.no_grad():
        net = fold(model).to(dtype).requires_grad_(False)
        optimised = OptimizedResNet(net, dtype, dict.fromkeys((own, dtype)), cuda_graph)
    if example_input is not None:
        optimised(example_input)
    return optimised


def quantize_for_inference(
    model: nn.Module, calibration: Tensor | Iterable[Tensor], dtype: torch.dtype | None = None
) -> OptimizedResNet:
    """As :func:`optimize_for_inference`, with all convolutions but the first in 8 bits.

    Weights are rounded to 8 bits with a step for every filter; activations with one step, chosen to lose
    least on the calibration images. Residual add, ReLU and rounding happen inside the convolution. Each layer
    runs in 8 bits or, where that is measured to be faster, in floating point between two conversions: on a
    CPU by oneDNN, and after ``.to("cuda")`` by a Triton kernel or cuDNN. ``model`` itself is left alone.

    Args:
        model: a ResNet of fusedres, torchvision or timm, in eval mode, on a CPU.
        calibration: [N, C, H, W] float32, or batches of it: images as the model will see; some hundred are
            enough. Kept in memory meanwhile.
        dtype: of the first convolution and the classifier; None for bfloat16 where the CPU has it, else
            float32.

    Returns:
        a module that takes [N, C, H, W] in float32 or ``dtype`` and returns [N, classes] in the dtype of
        its input.

    Raises:
        ValueError: as :func:`optimize_for_inference`; no calibration images; values that are not finite, in
            them or in what the model makes of them.
        TypeError: another architecture.
    """
    _check(model, dtype, False)
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise ValueError("model must be on the CPU to be quantised: call model.cpu()")
    batches = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
            raise ValueError("calibration must be floating-point images [N, C, H, W] or batches of them")
        if not batch.isfinite().all():
            raise ValueError("calibration has values that are not finite")
    if not sum(len(batch) for batch in batches):
        raise ValueError("calibration must have at least one image")
    if dtype is None:
        dtype = torch.float32 if onednn.unavailable(torch.bfloat16) else torch.bfloat16
    with torch.inference_mode(False), torch.no_grad():
        net = quantize_net(model, batches, dtype).requires_grad_(False)
        return OptimizedResNet(net, dtype, dict.fromkeys((torch.float32, dtype)), "auto")


def _check(model: object, dtype: object, cuda_graph: object) -> None:
    if isinstance(model, OptimizedResNet):
        raise TypeError("model is optimised already: give the one that it was made of")
    family = {(c.__module__, c.__qualname__) for c in type(model).__mro__}
    if not isinstance(model, nn.Module) or not family & _FAMILIES:
        raise TypeError(
            "model must be a ResNet of fusedres, torchvision or timm (of a wrapper like DataParallel its "
            f".module), got {type(model).__name__}; torch.compile takes other architectures"
        )
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"model must be in eval mode, {training[0]} is in training mode: call model.eval()")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
    if cuda_graph not in (True, False, "auto"):
        raise ValueError(f"cuda_graph must be True, False or 'auto', got {cuda_graph!r}")
