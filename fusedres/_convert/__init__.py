"""Fused forwards for the ResNets of other libraries: swapped in, listed, and swapped back.

A block, or a net with a stem, gets a class derived from its own whose forward is fused; nothing else of it
changes. A library is imported here only if the model's owner has imported it.
"""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import nn

from fusedres._convert.kind import Kind
from fusedres.detection.trunk import Trunk
from fusedres.models.resnet import ResNet
from fusedres.nn import Residual, unfused_stem_reason

M = TypeVar("M", bound=nn.Module)
Filter = Callable[[str, nn.Module], bool]

# the module of a library that has its blocks, and ours that has them fused
_LIBRARIES = {
    "torchvision.models.resnet": "fusedres._convert.torchvision",
    "timm.models.resnet": "fusedres._convert.timm",
}
_NOT_YET = "not converted: fusedres.convert(model) does it"
_STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Entry:
    """A residual block or a stem, and whether it runs as one Function.

    Args:
        name: in the model; of a stem, that of the net that it belongs to and "stem".
        fused: whether it does, whatever its input; the stem of ResNet-C and -D runs as two.
        reason: why not; None if it does.
    """

    name: str
    fused: bool
    reason: str | None

    def __str__(self) -> str:
        return f"{self.name}: {'fused' if self.fused else self.reason}"


def convert(model: M, filter_fn: Filter | None = None, inplace: bool = True, strict: bool = False) -> M:
    """Give torchvision's and timm's residual blocks and stems fused forwards, wherever they are in a model.

    Parameters, buffers, keys and results stay. A block that can't run as one Function stays what it is;
    :func:`coverage` says why. Converting again changes nothing. A model of which nothing can be fused gives a
    warning.

    Args:
        model: a net of torchvision or timm, or a model that has one in it, as detectors do.
        filter_fn: whether to convert a block or a net's stem, by its name, as in :func:`coverage`, and its
            module; None for all.
        inplace: whether the model itself is changed, or a deep copy.
        strict: raise, and change nothing, if something that the filter wants stays as it is.

    Returns:
        the model, or the copy.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``strict``, and something can't be fused or there is nothing to fuse.
    """
    _check(model)
    if not inplace:
        model = copy.deepcopy(model)
    found = list(_found(model))
    wanted = [part for part in found if not part.has_ours]
    if filter_fn is not None:
        wanted = [part for part in wanted if filter_fn(part.name, part.module)]
    skipped = [part for part in wanted if part.why is not None]
    why = None
    if not found:
        why = f"{type(model).__name__} has no residual block or stem of torchvision or timm"
    elif skipped:
        why = f"{len(skipped)} of {len(wanted)} can't be fused, first {skipped[0].name}: {skipped[0].why}"
    if why is not None and strict:
        raise ValueError(why)
    if why is not None and len(skipped) == len(found):
        warnings.warn(f"{why}: nothing is converted", stacklevel=2)
    for part in wanted:
        if part.why is None and part.fused is not None:
            part.module.__class__ = part.fused
    return model


def revert(model: M) -> M:
    """Undo :func:`convert`, in place: every class is the library's again.

    A model that was not converted stays as it is.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: something gave a converted module a class of its own since, as FSDP2 does; nothing is
            changed.
    """
    _check(model)
    originals = {kind.fused: original for original, kind in _kinds().items()}
    ours: tuple[type[nn.Module], ...] = tuple(originals)
    converted = [(name, module) for name, module in model.named_modules() if isinstance(module, ours)]
    for name, module in converted:
        if type(module) not in originals:
            now = type(module).__name__
            raise ValueError(f"{name or 'the model'} was made a {now} since: revert before that")
    for _, module in converted:
        module.__class__ = originals[type(module)]
    return model


def coverage(model: nn.Module) -> list[Entry]:
    """Every residual block and stem of a model, ours, torchvision's and timm's, and whether it is fused.

    What an input then decides, as its dtype, size or device, :func:`fusedres.explain` tells.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check(model)
    reasons = {part.name: part.why or (None if part.has_ours else _NOT_YET) for part in _found(model)}
    return [Entry(name, why is None, why) for name, why in reasons.items()]


def register_with_timm() -> list[str]:
    """Add timm's plain ResNets, converted, to its models: ``timm.create_model("fused_resnet50")``.

    Arguments and pretrained weights are those of the models without the prefix.

    Returns:
        their names.

    Raises:
        ImportError: there is no timm.
    """
    try:
        registry: Any = importlib.import_module("fusedres._convert.timm_registry")
    except ModuleNotFoundError as error:
        raise ImportError(f"register_with_timm needs timm: pip install timm ({error})") from error
    return registry.register()  # type: ignore[no-any-return]


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be an nn.Module, got {given}")


def _kinds() -> dict[type[nn.Module], Kind]:
    """Classes of the libraries that are imported."""
    kinds: dict[type[nn.Module], Kind] = {}
    for library, ours in _LIBRARIES.items():
        if library in sys.modules:
            kinds |= importlib.import_module(ours).KINDS
    return kinds


class _Part(NamedTuple):
    """A residual block or a stem.

    Args:
        name: as in :class:`Entry`.
        module: the block, or the net that the stem belongs to.
        has_ours: whether its forward is ours: of our own nets, or converted.
        fused: the class that it is converted to; None if there is none.
        why: why it doesn't run as one Function; None if it does, or would.
    """

    name: str
    module: nn.Module
    has_ours: bool
    fused: type[nn.Module] | None
    why: str | None


def _found(model: nn.Module) -> Iterator[_Part]:
    """Every residual block and stem: ours, a library's, and what is in a block's place in a library's net."""
    kinds = _kinds()
    kinds |= {kind.fused: kind for kind in kinds.values()}
    blocks: set[nn.Module] = set()  # of the nets so far
    for name, module in model.named_modules():
        net: Any = module
        kind = next((kinds[base] for base in type(module).__mro__ if base in kinds), None)
        if kind is None:
            if isinstance(module, Residual):
                yield _Part(name, net, True, None, module.unfused_reason())
            elif isinstance(module, ResNet) or (isinstance(module, Trunk) and hasattr(module, "maxpool")):
                why = unfused_stem_reason(net.conv1, net.bn1, net.relu, net.maxpool)
                yield _Part(_stem_name(name), module, True, None, why)
            elif module in blocks:
                yield _Part(name, module, False, None, _foreign(module))
            continue
        if kind.is_net:
            if not hasattr(module, "conv1"):
                continue  # a getter of another net's layers
            blocks |= {block for stage in _STAGES for block in _children(getattr(module, stage, None))}
            name = _stem_name(name)
        has_ours = isinstance(module, kind.fused)
        why = kind.unfused_reason(module) if has_ours or type(module) in kinds else _foreign(module)
        yield _Part(name, module, has_ours, kind.fused, why)


def _children(stage: object) -> list[nn.Module]:
    """The blocks of a stage; a module without children, as dropout, is none."""
    if not isinstance(stage, nn.Sequential):
        return []
    return [child for child in stage if any(True for _ in child.children())]


def _foreign(module: nn.Module) -> str:
    return f"its class, {type(module).__name__}, is not exactly one of torchvision's or timm's"


def _stem_name(net: str) -> str:
    return f"{net}.stem" if net else "stem"
