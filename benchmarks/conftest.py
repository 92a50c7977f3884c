"""``pytest benchmarks --benchmark-only``: a quick profile of under four minutes; ``--full``: everything."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import shapes
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fusedres import ops
from fusedres.cli import machine

QUICK_ROUNDS, FULL_ROUNDS = 5, 20
WARMUP_ROUNDS = 1

Measure = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: every layer and net, more rounds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    if "norm" in metafunc.fixturenames:
        models, largest = (("resnet18", "resnet50"), None) if full else (("resnet50", "resnet18"), 3)
        metafunc.parametrize("norm", shapes.norms(models, largest), ids=str)
    if "block" in metafunc.fixturenames:
        stages = range(1, 5) if full else (3,)
        metafunc.parametrize("block", shapes.blocks(("resnet18", "resnet50"), stages), ids=str)
    if "model" in metafunc.fixturenames:
        nets = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
        metafunc.parametrize("model", nets if full else ("resnet18", "resnet50"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def measure(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, device: torch.device) -> Measure:
    """Time a function of no arguments, and record what was timed beside the figures.

    What serves ``op`` is what "fused" stands for. With ``against``, a name and another step, that one runs
    before every round, and ``ratio`` is its time by this one's: above 1, this one is faster.
    """

    def run(
        step: Callable[[], object],
        group: str,
        implementation: str,
        dtype: torch.dtype,
        op: str = "bn_act",
        against: tuple[str, Callable[[], object]] | None = None,
        rounds: int | None = None,
        **facts: object,
    ) -> None:
        def timed(step: Callable[[], object] = step) -> None:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        others: list[float] = []

        def before() -> None:
            if against is not None:
                start = time.perf_counter()
                timed(against[1])
                others.append(time.perf_counter() - start)

        benchmark.group = group
        served = ops.choice(op, device, dtype, ops.forced_backend()).implementation
        benchmark.extra_info.update(
            implementation=f"fused ({served})" if implementation == "fused" else implementation,
            dtype=str(dtype).removeprefix("torch."),
            layout="channels_last",
            device=machine.device_name(device),
            threads=torch.get_num_threads(),
            versions=machine.versions(),
            **facts,
        )
        if rounds is None:
            rounds = FULL_ROUNDS if request.config.getoption("--full") else QUICK_ROUNDS
        benchmark.pedantic(timed, setup=before, rounds=rounds, warmup_rounds=WARMUP_ROUNDS)
        if against is not None and benchmark.stats is not None:
            other = statistics.median(others[WARMUP_ROUNDS:])
            benchmark.extra_info.update(against=against[0], ratio=other / benchmark.stats.stats.median)

    return run
