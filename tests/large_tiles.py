"""Launch settings with which a whole net takes seconds in Triton's interpreter.

There a program costs milliseconds of Python, whatever the size of its tile. So tiles are as large as the
matrices, up to a limit at which a layer of a net still has several and its reduction several steps. What is
shipped is for GPUs, and tested kernel by kernel on small shapes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import triton

from fusedres.kernels.triton import config, conv_config
from fusedres.kernels.triton.conv_config import ConvConfig, ConvProblem

LIMIT = 512  # rows, columns and steps of a tile


def module(name: str) -> ModuleType:
    """Of the Triton kernels; as an attribute of their package it may be the function of that name."""
    return importlib.import_module(f"fusedres.kernels.triton.{name}")


@contextlib.contextmanager
def large_tiles() -> Iterator[Counter[str]]:
    """Inside, kernels launch with large tiles; yields how often each convolution kernel did."""
    launches: Counter[str] = Counter()

    def choose(kernel: str, problem: ConvProblem, valid: list[ConvConfig]) -> ConvConfig:
        launches[kernel] += 1
        sides = (problem.rows, problem.columns, problem.inner)
        return ConvConfig(*(min(LIMIT, triton.next_power_of_2(n)) for n in sides), num_warps=8, num_stages=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_config, "chooser", choose)
        for kernel, configs in config.CONFIGS.items():
            patch.setitem(config.CONFIGS, kernel, (replace(configs[0], block_m=2 * LIMIT, block_c=64),))
        finalize = replace(config.FINALIZE, block_c=LIMIT)
        for name in ("config", "bn_stats", "bn_act_backward", "stem_conv"):
            patch.setattr(module(name), "FINALIZE", finalize)
        for name in ("conv_wgrad", "stem_wgrad"):
            patch.setattr(module(name), "FINALIZED", LIMIT * LIMIT)
        config.divide.cache_clear()
        yield launches
    config.divide.cache_clear()
