"""Which implementation runs for an op: pure rules, a leaf of the import graph.

:func:`choose` looks at facts alone (op, device, dtype, what is installed, what was forced) and
returns a :class:`Choice` with its reason. It imports no kernels and asks no device anything. What was
measured on this device stands in :data:`MEASURED`, where ``autotune`` puts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fusedres.plan.conv import (
    BLOCK_OPS,
    CONV_BIAS_OPS,
    CONV_OPS,
    INT8_OPS,
    STEM_BIAS_OPS,
    STEM_OPS,
    Conv,
    likely,
    outside_contract,
    outside_cuda,
    outside_kernels,
)

__all__ = [
    "ALL_OPS",
    "AVGPOOL_OPS",
    "BACKENDS",
    "BLOCK_OPS",
    "BN_OPS",
    "CANDIDATES",
    "COMPOSED",
    "CONV_BIAS_OPS",
    "CONV_CANDIDATES",
    "CONV_OPS",
    "DEVICE",
    "IMPLEMENTATIONS",
    "INT8_OPS",
    "LEAST_VALUES",
    "LEAST_VALUES_OF",
    "MAXPOOL_OPS",
    "MEASURED",
    "OPS",
    "STEM_BIAS_OPS",
    "STEM_OPS",
    "Choice",
    "Conv",
    "Key",
    "Measured",
    "Problem",
    "able",
    "choose",
    "covers",
    "least_values",
    "outside_contract",
    "refusal",
]

IMPLEMENTATIONS = ("triton", "cuda", "cpu", "reference")
BACKENDS = ("auto", *IMPLEMENTATIONS)

BN_OPS = (
    "bn_stats",
    "bn_running_stats",
    "bn_update_running_",
    "bn_act",
    "bn_act_backward_reduce",
    "bn_act_backward_apply",
)
MAXPOOL_OPS = (
    "bn_relu_maxpool",
    "bn_relu_maxpool_backward_reduce",
    "bn_relu_maxpool_backward_apply",
    "bias_relu_maxpool",
)
AVGPOOL_OPS = ("global_avg_pool", "global_avg_pool_backward")
# each a convolution (or three), so that a measurement may decide between ours and PyTorch's
CONVOLUTIONS = (*CONV_OPS, *CONV_BIAS_OPS, *BLOCK_OPS, *INT8_OPS, *STEM_OPS, *STEM_BIAS_OPS)
ALL_OPS = (*BN_OPS, *MAXPOOL_OPS, *AVGPOOL_OPS, "cast_weights", "quantize_int8", *CONVOLUTIONS)
# a few ops save passes over what others, and PyTorch's own, do as well: where an implementation hasn't
# got one of these the callers take those, also if it is forced
COMPOSED = frozenset(ALL_OPS) - frozenset(BN_OPS)
KERNEL_DTYPES = ("float32", "bfloat16", "float16")
INT8_DTYPES = ("int8",)
MIN_CAPABILITY = (8, 0)

# the ops that each implementation has, and the kind of device it runs on
OPS = {
    "cpu": frozenset(BN_OPS + MAXPOOL_OPS),
    "triton": frozenset(BN_OPS + CONV_OPS + CONV_BIAS_OPS + INT8_OPS + STEM_OPS) | {"quantize_int8"},
    "cuda": frozenset(
        BN_OPS + MAXPOOL_OPS + AVGPOOL_OPS + CONV_BIAS_OPS + BLOCK_OPS + STEM_OPS + STEM_BIAS_OPS
    )
    | {"cast_weights", "conv_fwd", "conv_dgrad"},
}
DEVICE = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
# in the order of preference on a device: CUDA first, since
# less Python stands before its launch
CANDIDATES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# of convolutions until they are measured: Triton's use the tensor cores of 9.0 and 10.0 as those are meant to
# be used (wgmma, tcgen05), CUDA's the instructions of 8.0
CONV_CANDIDATES = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
# Values of an activation from which a CPU kernel pays: below, the call costs more than it saves, since
# PyTorch's second pass finds a small tensor in the cache. From whole steps of ResNet-18 and 50 at batch
# 1 to 16 on two cores, in float32 and bfloat16.
LEAST_VALUES = {"cpu": 1 << 20}
# by op where it is another: PyTorch's pool is the slower one in the cache, too; from single calls on one core
LEAST_VALUES_OF = {("cpu", "bias_relu_maxpool"): 1 << 15}


class Problem(NamedTuple):
    """What the rules may look at."""

    op: str
    device: str  # torch.device.type
    dtype: str  # of the activation, without "torch."
    capability: tuple[int, int] | None = None  # of a CUDA device
    interpreted: bool = False  # Triton kernels run on the CPU (TRITON_INTERPRET=1)
    built_for: tuple[str, ...] | None = None  # CMAKE_CUDA_ARCHITECTURES of the CUDA kernels; None: any
    conv: Conv | None = None  # None for the ops that have none, or for a question about any
    device_name: str | None = None  # of a CUDA device


class Key(NamedTuple):
    """What a measurement of a convolution belongs to."""

    device_name: str
    op: str
    dtype: str
    conv: Conv


class Measured(NamedTuple):
    """What was measured for a convolution.

    Args:
        best: the implementation to take.
        us: microseconds of each way that was tried.
        settings: of the kernel, as its module writes them down.
    """

    best: str
    us: dict[str, float]
    settings: list[Any]

    @property
    def reason(self) -> str:
        return "measured " + ", ".join(f"{name} {us:.0f} us" for name, us in sorted(self.us.items()))


MEASURED: dict[Key, Measured] = {}


class Choice(NamedTuple):
    """An implementation's name, and why it was chosen.

    ``aten`` stands for PyTorch's own operators: what runs where no kernel does. ``open`` says that both
    could serve, so that a measurement may decide.
    """

    implementation: str
    reason: str
    open: bool = False


def lacks(name: str, problem: Problem) -> str | None:
    """Which kernel implementation ``name`` hasn't got, that others have; None if it has."""
    if problem.op not in OPS[name]:
        return f"{name} has no kernel for {problem.op}"
    if name == "cuda" and problem.conv is not None and outside_kernels(problem.op, problem.conv) is None:
        return outside_cuda(problem.op, problem.conv, problem.dtype, problem.capability)
    return None


def refusal(name: str, problem: Problem, unavailable: Mapping[str, str]) -> str | None:
    """Why implementation ``name`` can't serve ``problem``; None if it can."""
    if name == "reference":
        return None
    if name in unavailable:
        return unavailable[name]
    lacking = lacks(name, problem)
    if lacking is not None:
        return lacking
    dtypes = INT8_DTYPES if problem.op in INT8_OPS else KERNEL_DTYPES
    if problem.dtype not in dtypes:
        *most, last = dtypes
        there = f"there are {', '.join(most)} and {last}" if most else f"there is {last}"
        return f"no kernel for {problem.dtype} ({there})"
    if problem.conv is not None:
        why = outside_contract(problem.conv) or outside_kernels(problem.op, problem.conv)
        if why is not None:
            return why
    if name == "triton" and problem.interpreted:
        return None if problem.device == "cpu" else "TRITON_INTERPRET=1 interprets on the CPU alone"
    if problem.device != DEVICE[name]:
        return f"{name} kernels don't run on a {problem.device} device"
    if problem.device == "cuda" and (problem.capability or (0, 0)) < MIN_CAPABILITY:
        have = ".".join(map(str, problem.capability or (0, 0)))
        return f"the GPU has compute capability {have}, kernels need 8.0"
    return _not_built_for(problem) if name == "cuda" else None


def _not_built_for(problem: Problem) -> str | None:
    capability, built_for = problem.capability, problem.built_for
    if capability is None or built_for is None or any(covers(arch, capability) for arch in built_for):
        return None
    have = ".".join(map(str, capability))
    return f"built for {', '.join(built_for)}, the GPU has compute capability {have}"


def covers(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for ``architecture``, as "80", "90a" or "86-real", run on a GPU.

    A plain number brings PTX, which every later GPU compiles; "-real" brings code for its own major version
    alone, "a" for that very chip.
    """
    number, _, kind = architecture.partition("-")
    digits = number.rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    if digits != number:
        return capability == (major, minor)
    if kind == "real":
        return capability[0] == major and capability[1] >= minor
    return capability >= (major, minor)


def least_values(implementation: str, op: str = "bn_act") -> int:
    """The smallest activation that ``implementation`` is better at than PyTorch's own operators."""
    if (implementation, op) in LEAST_VALUES_OF:
        return LEAST_VALUES_OF[implementation, op]
    return LEAST_VALUES.get(implementation, 0)


def choose(problem: Problem, unavailable: Mapping[str, str], forced: str = "auto") -> Choice:
    """The implementation for ``problem``.

    Args:
        problem: the facts.
        unavailable: implementation name -> reason, for those that can't be loaded here.
        forced: "auto", or the implementation that has to serve.

    Raises:
        RuntimeError: the forced implementation can't serve; says why.
    """
    if forced == "reference" and problem.conv is not None:
        outside = outside_contract(problem.conv)
        if outside is not None:
            return Choice("aten", outside)
    if forced != "auto":
        why = refusal(forced, problem, unavailable)
        if why is not None:
            if forced not in unavailable and problem.op in COMPOSED and why == lacks(forced, problem):
                return Choice("aten", why)
            raise RuntimeError(f"backend {forced!r} can't serve {problem.op} on {problem.device}: {why}")
        return Choice(forced, "forced")
    order = _order(problem)
    refusals = {name: refusal(name, problem, unavailable) for name in order}
    serving = [name for name in order if refusals[name] is None]
    reasons = [f"{name}: {why}" for name, why in refusals.items() if why is not None]
    if not serving:
        return Choice("aten", "; ".join(reasons) or f"no kernels for {problem.device} devices")
    if _is_convolution(problem):
        return _fused_or_not(serving, problem)
    name = serving[0]
    reasons = reasons[: order.index(name)]
    reasons.append(f"{'next' if reasons else 'first'} choice on {problem.device}")
    least = least_values(name, problem.op)
    if least:
        reasons.append(f"from {least:,} values of an activation, below them aten")
    return Choice(name, "; ".join(reasons))


def able(problem: Problem, unavailable: Mapping[str, str]) -> list[str]:
    """The implementations with a kernel for ``problem``, in the order of preference."""
    return [name for name in _order(problem) if refusal(name, problem, unavailable) is None]


def _is_convolution(problem: Problem) -> bool:
    return problem.op in CONVOLUTIONS


def _order(problem: Problem) -> tuple[str, ...]:
    return (CONV_CANDIDATES if _is_convolution(problem) else CANDIDATES).get(problem.device, ())


def _fused_or_not(serving: Sequence[str], problem: Problem) -> Choice:
    """Which of ``serving``, or PyTorch's own, serves a convolution with what goes with it."""
    if problem.conv is not None and problem.device_name is not None:
        measured = MEASURED.get(Key(problem.device_name, problem.op, problem.dtype, problem.conv))
        if measured is not None and measured.best in (*serving, "aten"):
            return Choice(measured.best, measured.reason, open=True)
    pays, why = likely(problem.op, problem.conv, problem.dtype)
    return Choice(serving[0] if pays else "aten", why, open=True)
