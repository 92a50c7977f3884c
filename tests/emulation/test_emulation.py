"""The emulation itself: planted faults are found in every schedule, right kernels give what they must.

    env $(python tests/emulation/build.py --env) pytest tests/emulation

The sanitizers have to be there when Python starts, so these tests need a process of their own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulation import build
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(bool(build.unavailable()), reason=build.unavailable()),
    pytest.mark.skipif(
        not build.is_set(), reason="needs the environment that tests/emulation/build.py --env prints"
    ),
]

SEEDS = range(8)
THREADS = 64
WARP = 32


@pytest.fixture(scope="session")
def path() -> Path:
    return build.build("_planted", [build.HERE / "planted.cu"], ["FUSEDRES_BIND_CUDA"])


@pytest.fixture(scope="session")
def module(path: Path) -> ModuleType:
    return build.load(path)


@pytest.fixture
def planted(module: ModuleType) -> Iterator[ModuleType]:
    module.seed(0)
    module.preempt(True)
    module.reset()
    yield module
    module.unwatch_all()


@pytest.fixture(params=[True, False], ids=["preempted", "whole"])
def schedules(request: pytest.FixtureRequest, planted: ModuleType) -> Iterator[int]:
    """Many orders of threads, to be walked through by a test."""

    def each() -> Iterator[int]:
        for seed in SEEDS:
            planted.seed(seed)
            yield seed

    planted.preempt(request.param)
    return each()


def numbers(size: int) -> Tensor:
    """Sums of them are exact."""
    return torch.randint(-100, 100, (size,)).float()


def run(planted: ModuleType, kernel: str, x: Tensor, size: int, n: int = 0, **launch: object) -> Tensor:
    """What the kernel makes of x; every byte of x and of the output is watched."""
    out = torch.full((size,), float("nan"))
    planted.unwatch_all()
    planted.watch("input", x.data_ptr(), x.nbytes)
    planted.watch("output", out.data_ptr(), out.nbytes)
    planted.run(kernel, x.data_ptr(), out.data_ptr(), n, **launch)
    return out


# ---- right kernels


def test_block_sum(planted, schedules):
    rounds, blocks = 3, 5
    x = numbers(blocks * rounds * THREADS)
    for _ in schedules:
        out = run(planted, "block_sum", x, blocks, rounds, grid=(blocks, 1, 1))
        assert torch.equal(out, x.view(blocks, -1).sum(1))


def test_warp_calls(planted, schedules):
    x = numbers(WARP)
    lanes = torch.arange(WARP)
    segment = lanes // 8 * 8
    up = torch.where(lanes % 16 >= 3, lanes - 3, lanes)
    xor = torch.where((lanes ^ 12) < segment + 8, lanes ^ 12, lanes)
    for _ in schedules:
        out = run(planted, "warp_calls", x, 8 * WARP, block=(WARP, 1, 1)).view(8, WARP)
        assert torch.equal(out[0], x.sum().expand(WARP))
        assert out[1, 0] == x.sum()
        assert torch.equal(out[2], torch.ones(WARP))
        assert torch.equal(out[3], x[segment + (lanes + 1) % 8])
        assert torch.equal(out[4], x[up])
        assert torch.equal(out[5], x[xor])
        assert torch.equal(out[6], torch.where(lanes % 2 == 0, x[2], 0))
        assert torch.equal(out[7], torch.full((WARP,), 2.0))  # any, not all


def test_warp_barrier(planted, schedules):
    x = numbers(THREADS)
    for _ in schedules:
        assert torch.equal(run(planted, "warp_reverse", x, THREADS), x.view(2, WARP).flip(1).view(-1))


def test_a_barrier_amid_divergent_code_is_one_for_all(planted, schedules):
    x = numbers(1)
    for _ in schedules:
        out = run(planted, "barrier_amid_divergent_code", x, THREADS)
        assert torch.equal(out, x.expand(THREADS))


def test_launches_are_counted(planted):
    x = numbers(4 * 10)
    out = run(planted, "copy", x, 40, 10, grid=(2, 1, 1), block=(3, 1, 1))
    assert torch.equal(out, x)
    assert planted.launches() == [{"grid": (2, 1, 1), "block": (3, 1, 1), "shared_bytes": 0}]


def test_only_a_preempting_schedule_interrupts(planted):
    def interrupted() -> float:
        out = torch.full((1 + THREADS,), float("nan"))
        planted.run("preempted", 0, out.data_ptr(), 0)
        return out[1:].sum().item()

    assert interrupted() > 0
    planted.preempt(False)
    assert interrupted() == 0


def test_a_seed_fixes_the_schedule(planted):
    def schedule(seed: int) -> str:
        planted.seed(seed)
        with pytest.raises(RuntimeError) as error:
            run(planted, "written_twice", numbers(1), THREADS, 5)
        return str(error.value)

    assert [schedule(seed) for seed in SEEDS] == [schedule(seed) for seed in SEEDS]
    assert len({schedule(seed) for seed in SEEDS}) > 1


# ---- traffic


def test_traffic_of_a_copy(planted):
    n = 1000
    x = numbers(4 * n)
    nothing = {"read": 0, "distinct_read": 0, "written": 0, "distinct_written": 0}
    run(planted, "copy", x, 4 * n, n, grid=(3, 1, 1))
    assert planted.traffic() == {
        "input": nothing | {"read": 16 * n, "distinct_read": 16 * n},
        "output": nothing | {"written": 16 * n, "distinct_written": 16 * n},
        "other": nothing,
    }


def test_traffic_since_the_last_reset(planted):
    n = 100
    x, out = numbers(4 * n), torch.empty(4 * n)
    planted.watch("input", x.data_ptr(), x.nbytes)
    for _ in range(2):
        planted.reset()
        planted.run("copy", x.data_ptr(), out.data_ptr(), n)
        planted.run("copy", x.data_ptr(), out.data_ptr(), n // 2, grid=(2, 1, 1))
        read, other = planted.traffic()["input"], planted.traffic()["other"]
        assert (read["read"], read["distinct_read"]) == (24 * n, 16 * n)
        assert (other["read"], other["written"]) == (0, 24 * n)
        block = {"block": (THREADS, 1, 1), "shared_bytes": 0}
        assert planted.launches() == [{"grid": (1, 1, 1)} | block, {"grid": (2, 1, 1)} | block]


def test_watched_buffers_are_apart(planted):
    x = numbers(8)
    planted.watch("a", x.data_ptr(), 16)
    with pytest.raises(ValueError, match="b must be a buffer of its own, got one that shares memory with a"):
        planted.watch("b", x.data_ptr() + 12, 16)
    with pytest.raises(ValueError, match="shares the name"):
        planted.watch("a", x.data_ptr() + 16, 16)


# ---- faults that are errors

THREAD = r"thread \(\d+, 0, 0\) of block \(0, 0, 0\)"
RACE = r"of shared memory that (thread .* with no barrier in between|nobody wrote in this block)"
FAULTS = [
    # kernel, n, message
    ("block_sum_without_barrier", 1, RACE),
    ("block_sum_without_barrier_before_reuse", 2, "of shared memory that .* with no barrier in between"),
    ("warp_reverse_without_barrier", 0, RACE),
    ("shared_read_after_write", 0, f"reads .* of shared memory that {THREAD} wrote with no barrier"),
    ("shared_write_after_read", 0, f"writes .* of shared memory that {THREAD} read with no barrier"),
    ("shared_write_after_many_reads", 5, f"writes .* of shared memory that {THREAD} read with no barrier"),
    ("shared_write_after_reads_of_warps", 5, "of shared memory that .* with no barrier in between"),
    ("shared_written_twice", 40, f"writes .* of shared memory that {THREAD} wrote with no barrier"),
    ("shared_race_of_warps", 0, f"writes .* of shared memory that {THREAD} read with no barrier"),
    ("shared_not_written", 0, f"^{THREAD} reads byte .* of shared memory that nobody wrote in this block"),
    ("shared_out_of_bounds", 1, r"thread \(63, 0, 0\) .* writes 4 bytes of shared memory out of bounds"),
    ("shared_too_large", 0, "has 65536 bytes of shared memory, where nvcc allows 49152"),
    (
        "barrier_after_exit",
        5,
        r"\(5, 0, 0\), one of 59, ended; .* one of 5, waits in __syncthreads at planted",
    ),
    ("barrier_in_branches", 5, f"^{THREAD} waits in __syncthreads at .*: a barrier in divergent code"),
    ("shuffle_reads_unnamed_lane", 0, "reads from lane 16 in __shfl_xor_sync .* mask 0xffff doesn't name it"),
    ("shuffle_from_unnamed_lane", 0, "waits in __shfl_xor_sync with mask 0xffff .* name its own lane"),
    ("shuffle_without_a_lane", 5, r"\(5, 0, 0\), .* ended; .* one of 31, waits in __shfl_xor_sync with mask"),
    (
        "shuffle_beside_ballot",
        5,
        r"\(5, 0, 0\) waits in __ballot_sync .* one of 31, waits in __shfl_xor_sync",
    ),
    ("shuffle_beside_barrier", 33, r"one of 31, waits in __syncthreads at .*; thread .* waits in __syncwarp"),
    ("shuffle_of_odd_width", 5, "and width 5, which must be a power of two up to 32"),
    ("written_twice", 5, f"^{THREAD} writes byte .* of output, which {THREAD} wrote in the same launch"),
    ("read_after_write", 5, r"\(0, 0, 0\) .* reads byte 0 of output, which thread \(5, .* wrote in the same"),
    ("write_after_read", 5, r"\(5, 0, 0\) .* writes byte 0 of output, which thread \(0, .* read in the same"),
    ("write_after_many_reads", 5, r"\(5, 0, 0\) .* writes byte 0 of output, which .* read in the same"),
]


@pytest.mark.parametrize("kernel, n, message", FAULTS, ids=[kernel for kernel, _, _ in FAULTS])
def test_fault(planted, schedules, kernel, n, message):
    x = numbers(2 * THREADS)
    for _ in schedules:
        with pytest.raises(RuntimeError, match=message):
            run(planted, kernel, x, 2 * THREADS, n)
        # what the abandoned threads left behind does no harm
        assert run(planted, "block_sum", x, 1, 2) == x.sum()


def test_blocks_may_not_meet(planted, schedules):
    for _ in schedules:
        with pytest.raises(RuntimeError, match="which thread .* of block .* wrote in the same launch"):
            run(planted, "written_twice", numbers(1), THREADS, THREADS, grid=(2, 1, 1))


def test_a_mask_names_no_lanes_that_are_not_there(planted):
    with pytest.raises(RuntimeError, match="which names lanes that the block doesn't have"):
        run(planted, "warp_calls", numbers(WARP), 8 * WARP, block=(WARP - 1, 1, 1))


def test_access_across_the_end_of_a_buffer(planted):
    x, out = numbers(16), torch.empty(16)
    planted.watch("first part", x.data_ptr(), 40)
    with pytest.raises(RuntimeError, match="reads 16 bytes across an end of first part"):
        planted.run("copy", x.data_ptr(), out.data_ptr(), 4)


@pytest.mark.parametrize(
    "launch",
    [
        {"grid": (0, 1, 1)},
        {"grid": (1, 65536, 1)},
        {"grid": (1, 1, 65536)},
        {"grid": (1 << 31, 1, 1)},
        {"block": (1, 0, 1)},
        {"block": (1025, 1, 1)},
        {"block": (32, 33, 1)},
        {"block": (1, 1, 65)},
    ],
    ids=str,
)
def test_refused_launch(planted, launch):
    with pytest.raises(RuntimeError, match="copy was not launched: invalid configuration argument"):
        planted.run("copy", 0, 0, 0, **launch)
    assert planted.launches() == []


def test_largest_block(planted):
    x = numbers(4 * 1024)
    assert torch.equal(run(planted, "copy", x, 4096, 1024, block=(1024, 1, 1)), x)


# ---- faults that are the end of the process

OVERFLOW = "heap-buffer-overflow"
DEATHS = {
    "read out of bounds": ("run('copy', at(1000), at(2000), 251)", f"{OVERFLOW}.*READ of size 16"),
    "write out of bounds": ("run('copy', at(2000), at(1000), 251)", f"{OVERFLOW}.*WRITE of size 16"),
    "shared memory": ("run('shared_out_of_bounds_unseen', 0, 0, 1)", f"{OVERFLOW}.*WRITE of size 4"),
    "local memory": ("run('local_out_of_bounds', 0, at(1000), 4)", "index 4 out of bounds"),
    "misaligned": ("run('copy', at(1000) + 4, at(1000), 1)", "misaligned address .* 16 byte alignment"),
    "signed overflow": ("run('signed_overflow', 0, at(1000), 1 << 30)", "signed integer overflow"),
}
PROGRAM = """
import sys
import torch
sys.path.insert(0, {tests!r})
from emulation import build
from pathlib import Path
tensors = []
def at(size):
    tensors.append(torch.zeros(size))
    return tensors[-1].data_ptr()
run = build.load(Path({path!r})).run
{call}
print("survived")
"""


def outcome(path: Path, call: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(tests=str(build.HERE.parent), path=str(path), call=call)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("call, report", DEATHS.values(), ids=DEATHS)
def test_death(path, call, report):
    done = outcome(path, call)
    assert done.returncode != 0 and "survived" not in done.stdout
    assert re.search(report, done.stderr, re.DOTALL), done.stderr
    assert "planted.cu" in done.stderr


def test_death_names_the_thread(path):
    assert "in thread (58, 0, 0) of block (0, 0, 0)" in outcome(path, DEATHS["read out of bounds"][0]).stderr


def test_no_death_within_bounds(path):
    assert outcome(path, "run('copy', at(1000), at(1000), 250)").stdout == "survived\n"
