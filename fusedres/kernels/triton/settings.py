"""Launch settings under trial, and those that were found better than the first valid ones.

``autotune`` runs a convolution under one :func:`trial` after the other and says which it prefers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from fusedres.kernels import NoSuchSetting
from fusedres.kernels.triton import conv_config
from fusedres.kernels.triton.conv_config import ConvConfig, ConvProblem

# kernel and problem -> the setting that it ran with, or is to run with
Settings = dict[tuple[str, ConvProblem], ConvConfig]


@contextlib.contextmanager
def trial(index: int) -> Iterator[Settings]:
    """Inside, kernels launch with their valid setting number ``index``; yields which those were.

    Raises:
        NoSuchSetting: (by a launch inside) there is none.
    """
    seen: Settings = {}

    def choose(kernel: str, problem: ConvProblem, valid: list[ConvConfig]) -> ConvConfig:
        if index >= len(valid):
            raise NoSuchSetting(f"{kernel} has {len(valid)} settings for {problem}")
        seen[kernel, problem] = valid[index]
        return valid[index]

    before, conv_config.chooser = conv_config.chooser, choose
    try:
        yield seen
    finally:
        conv_config.chooser = before


def prefer(settings: Mapping[tuple[str, ConvProblem], ConvConfig]) -> None:
    """From now on launch with these, where they are valid."""
    conv_config.PREFERRED.update(settings)


def dump(settings: Settings) -> list[Any]:
    """As plain data, for a file."""
    return [[kernel, list(problem), asdict(config)] for (kernel, problem), config in settings.items()]


def parse(data: list[Any]) -> Settings:
    """Back from plain data.

    Raises:
        TypeError, ValueError: it isn't what :func:`dump` gives.
    """
    return {(kernel, ConvProblem(*problem)): ConvConfig(**config) for kernel, problem, config in data}
