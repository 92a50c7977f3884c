"""timm's plain ResNets, converted, among timm's models: ``timm.create_model("fused_resnet50")``."""

from __future__ import annotations

import re
import sys
from collections import deque
from typing import Any

import timm
from timm.models._pretrained import DefaultCfg
from timm.models._registry import get_pretrained_cfg, register_model

from fusedres._convert import convert

PREFIX = "fused_"
# from 18 layers on, of blocks that have nothing but convolutions, batch norms and ReLUs
_PLAIN = re.compile(r"resnet(?:18|[2-9]\d|\d{3})[cdst]?|wide_resnet\d+_\d|resnext\d+d?_\d+x\d+d")

default_cfgs: dict[str, Any] = {}  # where timm looks for what is known of the weights


def register() -> list[str]:
    """Register every plain ResNet that is not yet; the names of all, with the prefix."""
    names = [name for name in timm.list_models(module="resnet") if _PLAIN.fullmatch(name)]
    for name in names:
        if not timm.is_model(PREFIX + name):
            _register(name)
    return [PREFIX + name for name in names]


def _register(name: str) -> None:
    entry = timm.model_entrypoint(name)

    def make(pretrained: bool = False, **arguments: Any) -> Any:
        return convert(entry(pretrained=pretrained, **arguments))

    make.__name__ = make.__qualname__ = PREFIX + name
    make.__module__ = __name__
    make.__doc__ = f"timm's {name} with fused forwards."
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    own = get_pretrained_cfg(name)
    # its own tag, timm's default, comes first
    tags = sorted(tags, key=lambda tag: tag != (own.tag if own else None))
    if tags:
        cfgs: Any = {tag: get_pretrained_cfg(f"{name}.{tag}") for tag in tags}
        default_cfgs[PREFIX + name] = DefaultCfg(tags=deque(tags), cfgs=cfgs)
    elif own is not None:
        default_cfgs[PREFIX + name] = DefaultCfg(tags=deque([""]), cfgs={"": own})
    setattr(sys.modules[__name__], PREFIX + name, make)
    register_model(make)
