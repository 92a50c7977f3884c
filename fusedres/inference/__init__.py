"""A trained model made for inference alone: folded, one pass a convolution, packed for the machine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedres.inference.fold import fold
from fusedres.inference.graph import When
from fusedres.inference.model import OptimizedResNet

__all__ = ["OptimizedResNet", "optimize_for_inference"]

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
        dtype: to compute in; None for the model's own.
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
