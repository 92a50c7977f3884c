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
from typing import Any, TypeVar

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
    :func:`coverage` says why. Converting again changes nothing.

    Args:
        model: a net of torchvision or timm, or a model that has one in it, as detectors do.
        filter_fn: whether to convert a block or a net's stem, by its name, as in :func:`coverage`, and its
            module; None for all.
        inplace: whether the model itself is changed, or a deep copy.
        strict: raise, and change nothing, if something that the filter wants stays as it is.

    Returns:
        the model, or the copy.

    Raises:
        ValueError: ``strict``, and something can't be fused or there is nothing to fuse.
    """
    if not inplace:
        model = copy.deepcopy(model)
    chosen: list[tuple[nn.Module, type[nn.Module]]] = []
    skipped, found = [], False
    for name, module, kind in _candidates(model):
        found = True
        if isinstance(module, kind.fused) or (filter_fn is not None and not filter_fn(name, module)):
            continue
        why = kind.unfused_reason(module)
        if why is None:
            chosen.append((module, kind.fused))
        else:
            skipped.append(f"{name}: {why}")
    if strict and skipped:
        raise ValueError(f"{len(skipped)} of {len(skipped) + len(chosen)} can't be fused, first {skipped[0]}")
    if not found and not any(True for _ in _own(model)):
        nothing = f"{type(model).__name__} has no residual block or stem of torchvision or timm"
        if strict:
            raise ValueError(nothing)
        warnings.warn(f"{nothing}: nothing is converted", stacklevel=2)
    for module, fused in chosen:
        module.__class__ = fused
    return model


def revert(model: M) -> M:
    """Undo :func:`convert`, in place: every class is the library's again.

    A model that was not converted stays as it is.
    """
    originals = {kind.fused: original for original, kind in _kinds().items()}
    for module in model.modules():
        original = originals.get(type(module))
        if original is not None:
            module.__class__ = original
    return model


def coverage(model: nn.Module) -> list[Entry]:
    """Every residual block and stem of a model, ours, torchvision's and timm's, and whether it is fused.

    What an input then decides, as its dtype, size or device, :func:`fusedres.explain` tells.
    """
    entries = {name: _entry(name, why) for name, why in _own(model)}
    for name, module, kind in _candidates(model):
        why = kind.unfused_reason(module)
        if why is None and not isinstance(module, kind.fused):
            why = _NOT_YET
        entries[name] = _entry(name, why)
    return list(entries.values())


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


def _entry(name: str, why: str | None) -> Entry:
    return Entry(name, why is None, why)


def _kinds() -> dict[type[nn.Module], Kind]:
    """Classes of the libraries that are imported."""
    kinds: dict[type[nn.Module], Kind] = {}
    for library, ours in _LIBRARIES.items():
        if library in sys.modules:
            kinds |= importlib.import_module(ours).KINDS
    return kinds


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Kind]]:
    """What can be converted, or is: of exactly a library's class or ours for it."""
    kinds = _kinds()
    kinds |= {kind.fused: kind for kind in kinds.values()}
    for name, module in model.named_modules():
        kind = kinds.get(type(module))
        if kind is not None:
            yield _stem_name(name) if kind.is_net else name, module, kind


def _own(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Our own blocks and stems, and why they aren't fused."""
    foreign: set[type] = {kind.fused for kind in _kinds().values()}
    for name, module in model.named_modules():
        net: Any = module
        if isinstance(module, Residual) and type(module) not in foreign:
            yield name, module.unfused_reason()
        elif isinstance(module, ResNet) or (isinstance(module, Trunk) and hasattr(module, "maxpool")):
            yield _stem_name(name), unfused_stem_reason(net.conv1, net.bn1, net.relu, net.maxpool)


def _stem_name(net: str) -> str:
    return f"{net}.stem" if net else "stem"
