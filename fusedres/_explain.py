"""Which implementation runs each layer of a model, and why."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres import ops, plan
from fusedres.nn import unfused_reason

# what an op of PyTorch's is called in the table; others say nothing about a layer
_ATEN = {
    "convolution": "convolution",
    "native_batch_norm": "batch norm",
    "_native_batch_norm_legit": "batch norm",
    "_native_batch_norm_legit_no_training": "batch norm",
    "max_pool2d_with_indices": "max pool",
    "mean": "average pool",
    "_adaptive_avg_pool2d": "average pool",
    "addmm": "linear",
}
# vectors of a channel that go with an activation's op
_PART_OF_ANOTHER = ("bn_update_running_", "bn_running_stats")


class Step(NamedTuple):
    """One op of a forward.

    Args:
        layer: the module whose parameters it takes; "" for none.
        op: its name.
        shape: of its first argument.
        implementation: "triton", "cuda", "cpu", "reference", or "aten" for PyTorch's own operators.
        reason: why that one.
    """

    layer: str
    op: str
    shape: tuple[int, ...]
    implementation: str
    reason: str


class Explanation(list[Step]):
    """The steps of a forward; as a string, a table."""

    def __str__(self) -> str:
        rows = [("layer", "op", "input", "runs on", "because")]
        rows += [(s.layer, s.op, "x".join(map(str, s.shape)), s.implementation, s.reason) for s in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


class _Recorder(TorchDispatchMode):
    """Ops in the order of their calls, with the layer whose parameter or statistics they take."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.kept: list[Any] = []  # so that no other tensor gets the id of one that is named
        self.calls: list[tuple[str, str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, ours = func._opname, func.namespace == "fusedres"
        if (ours and name not in _PART_OF_ANOTHER) or name in _ATEN:
            shape = tuple(_tensors(args)[0].shape)
            self.calls.append((self._layer(args), name if ours else _ATEN[name], shape))
        if name in ("bn_stats", "bn_running_stats"):
            self.names[id(out)] = self._layer(args)
        self.kept.append((args, out))
        return out

    def _layer(self, args: Iterable[Any]) -> str:
        return next((self.names[id(t)] for t in _tensors(args) if id(t) in self.names), "")


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    return [t for t in args if isinstance(t, Tensor)]


def explain(
    model: nn.Module,
    input_size: Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """Which implementation runs each layer of a forward, and why; print it for a table.

    Nothing is computed: a copy of the model runs on shapes alone. The backend that is forced where this is
    called is the one that is explained.

    Args:
        model: a model, in the mode (training or not) that is to be explained.
        input_size: of a batch, as (16, 3, 224, 224).
        dtype: of the activations; the first floating-point parameter's by default.
        device: where the model is to run; the first parameter's by default.

    Returns:
        A list of :class:`Step`.

    Raises:
        ValueError: an input size that isn't [N, C, H, W].
        RuntimeError: a forced backend can't serve the model.
    """
    if len(input_size) != 4 or any(not isinstance(n, int) or n < 1 for n in input_size):
        raise ValueError(f"input_size must be four positive integers, [N, C, H, W], got {input_size!r}")
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtype, device = dtype or first.dtype, torch.device(device or first.device)
    forced = ops.forced_backend()
    twin = _on_meta(model)
    owners = {id(p): name.rpartition(".")[0] for name, p in twin.named_parameters()}
    owners |= {id(b): name.rpartition(".")[0] for name, b in twin.named_buffers()}
    recorder = _Recorder(owners)
    # on the meta device every op is called whose module glue finds nothing against it
    with torch.no_grad(), ops.backend("reference"), recorder:
        twin(torch.empty(*input_size, device="meta"))
    modules = dict(twin.named_modules())
    return Explanation(
        step
        for layer, op, shape in recorder.calls
        for step in _steps(layer, op, shape, dtype, device, forced, modules)
    )


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without values, in float32."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, dtype=dtype, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


# what an op does where no implementation has it in one pass
_COMPOSED_OF = {"bn_relu_maxpool": ("bn_act", "max pool")}


def _steps(
    layer: str,
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    forced: str,
    modules: dict[str, nn.Module],
) -> list[Step]:
    step = _step(layer, op, shape, dtype, device, forced, modules)
    if step.implementation != "aten" or op not in _COMPOSED_OF or step.reason.startswith("the norm"):
        return [step]
    whole, *rest = _COMPOSED_OF[op]
    return [
        _step(layer, whole, shape, dtype, device, forced, modules),
        *(Step("", name, shape, "aten", "PyTorch's own") for name in rest),
    ]


def _step(
    layer: str,
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    forced: str,
    modules: dict[str, nn.Module],
) -> Step:
    module = modules.get(layer)
    why = None
    if module is not None and (op == "batch norm" or op.startswith("bn_")):
        # what the shapes alone didn't tell: FrozenBatchNorm2d is plain in 16 bits
        x = torch.empty(shape, dtype=dtype, device="meta") if op.startswith("bn_") else None
        why = unfused_reason(module, None, x)
    if op not in plan.ALL_OPS:
        own = "not in a fused block" if op == "batch norm" else "PyTorch's own"
        return Step(layer, op, shape, "aten", why or own)
    if why is not None:
        return Step(layer, op, shape, "aten", why)
    implementation, reason = ops.choice(op, device, dtype, forced)
    least = ops.served_from(op, device, dtype, forced)
    values = torch.Size(shape).numel()
    if least is not None and len(shape) == 4 and values < least:
        implementation, reason = "aten", f"{values:,} values, {implementation} pays from {least:,}"
    return Step(layer, op, shape, implementation, reason)
