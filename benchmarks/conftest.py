"""``pytest benchmarks --benchmark-only``: a quick profile of under ten minutes; ``--full``: everything."""

from __future__ import annotations

from collections.abc import Callable

import compare
import pytest
import shapes
import torch
from compare import Case, Figures
from pytest_benchmark.fixture import BenchmarkFixture

QUICK_ROUNDS, FULL_ROUNDS = 5, 20
MODELS = ("resnet18", "resnet50")
ALL_MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

Measure = Callable[..., None]


class _Clock:
    """A timer for pytest-benchmark that goes on by what was measured already."""

    __name__ = "seconds_in_turns"
    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = _Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: every layer and net, more rounds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=clock))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    largest = None if full else 1
    values = {
        "norm": lambda: shapes.norms(MODELS, largest),
        "conv": lambda: shapes.convs(MODELS, largest),
        "block": lambda: shapes.blocks(MODELS, range(1, 5) if full else (3,)),
        "model": lambda: ALL_MODELS if full else MODELS,
        "backward": lambda: (False, True) if full else (True,),
    }
    names = {"backward": lambda value: "forward+backward" if value else "forward"}
    for name in values.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, values[name](), ids=names.get(name, str))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def seen() -> dict[str, dict[str, Figures]]:
    """The figures of every group so far: its sides are measured together, and reported one by one."""
    return {}


@pytest.fixture
def measure(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    device: torch.device,
    seen: dict[str, dict[str, Figures]],
) -> Measure:
    """Report one side of a group, after its sides were checked and timed in turns."""

    def run(group: str, side: str, make: Callable[[], Case], rounds: int | None = None) -> None:
        if group not in seen:
            usual = FULL_ROUNDS if request.config.getoption("--full") else QUICK_ROUNDS
            seen[group] = compare.figures(make(), rounds or usual, device)
        found = seen[group][side]
        if found.failure is not None:
            raise found.failure
        benchmark.group = group
        benchmark.extra_info.update(found.facts or {})
        seconds = iter(found.seconds)

        def replay() -> None:
            clock.now += next(seconds)

        benchmark.pedantic(replay, rounds=len(found.seconds))

    return run
