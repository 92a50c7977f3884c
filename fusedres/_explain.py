"""Which implementation runs each layer of a model, and why."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres import ops, plan
from fusedres.inference import OptimizedResNet
from fusedres.nn import unfused_block_reason, unfused_reason

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
        implementation: "triton", "cuda", "cpu", "reference", "aten" for PyTorch's own operators, or
            "onednn" or "cudnn" for a convolution of theirs with what follows it.
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


class _Call(NamedTuple):
    """An op of a forward, before it is known what runs it.

    Args:
        layer: the module whose parameters it takes.
        op: its name.
        shape: of its first argument.
        conv: of a convolution.
        before: the norm that a fused convolution does on its way in, if any.
        behind: the norm whose statistics it leaves, if any.
    """

    layer: str
    op: str
    shape: tuple[int, ...]
    conv: plan.Conv | None = None
    before: str | None = None
    behind: str | None = None


class _Recorder(TorchDispatchMode):
    """Ops in the order of their calls, with the layer whose parameter or statistics they take."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.kept: list[Any] = []  # so that no other tensor gets the id of one that is named
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, ours = func._opname, func.namespace == "fusedres"
        if name == "conv_fwd":
            self._convolution(args, out)
        elif name == "stem_conv":
            x, weight, *norm, _, statistics, dtype = args
            self.names[id(out[1])] = behind = self._layer(norm)
            conv = ops.stem_shape(x, weight, dtype)
            layer = self._layer([weight])
            self.calls.append(_Call(layer, name, tuple(x.shape), conv, None, behind if statistics else None))
        elif (ours and name not in _PART_OF_ANOTHER) or name in _ATEN:
            shape = tuple(_tensors(args)[0].shape)
            own = _shape_of(args) if name == "convolution" else None
            self.calls.append(_Call(self._layer(args), name if ours else _ATEN[name], shape, own))
        if name in ("bn_stats", "bn_running_stats"):
            self.names[id(out)] = self._layer(args)
        self.kept.append((args, out))
        return out

    def _convolution(self, args: Any, out: Any) -> None:
        x, stats, _, _, _, weight, stride, *norm, _, statistics = args
        before = None if stats is None else self._layer([stats])
        behind = self._layer(norm) if statistics else None
        self.names[id(out[1])] = behind or ""
        conv = ops.conv_shape(x, weight, stride, pending=stats is not None)
        self.calls.append(_Call(self._layer([weight]), "conv_fwd", tuple(x.shape), conv, before, behind))

    def _layer(self, args: Iterable[Any]) -> str:
        return next((self.names[id(t)] for t in _tensors(args) if id(t) in self.names), "")


def _named(choice: plan.Choice) -> str:
    """An implementation; of PyTorch's own, where no kernel could serve, with the reason."""
    if choice.implementation == "aten" and not choice.open:
        return f"aten ({choice.reason})"
    return choice.implementation


def _shape_of(args: Any) -> plan.Conv | None:
    """Of a call of aten::convolution; None if its axes differ."""
    x, weight, _, stride, _, dilation, _, _, groups = args
    if len(set(stride)) > 1 or len(set(dilation)) > 1 or x.dim() != 4:
        return None
    return ops.conv_shape(x, weight, stride[0], dilation[0], groups, pending=False)


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    return [t for t in args if isinstance(t, Tensor)]


def explain(
    model: nn.Module,
    input_size: Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """Which implementation runs each layer of a forward, and why; print it for a table.

    Nothing is computed: a copy of the model runs on shapes alone; an optimised model runs once, on zeros,
    since measurements decide there. The backend that is forced where this is called is the one that is
    explained.

    Args:
        model: a model, in the mode (training or not) that is to be explained, or an optimised one.
        input_size: of a batch, as (16, 3, 224, 224).
        dtype: of the activations; the first floating-point parameter's by default.
        device: where the model is to run; the first parameter's by default.

    Returns:
        A list of :class:`Step`.

    Raises:
        ValueError: an input size that isn't [N, C, H, W]; or a dtype or device that
            an optimised model isn't for.
        RuntimeError: a forced backend can't serve the model.
    """
    if len(input_size) != 4 or any(not isinstance(n, int) or n < 1 for n in input_size):
        raise ValueError(f"input_size must be four positive integers, [N, C, H, W], got {input_size!r}")
    if isinstance(model, OptimizedResNet):
        return _optimised(model, input_size, dtype, device)
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
    asked = _Asked(dtype, device, forced, dict(twin.named_modules()))
    return Explanation(step for call in recorder.calls for step in asked.steps(call))


def _optimised(
    model: OptimizedResNet,
    input_size: Sequence[int],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Explanation:
    own = next(model.parameters())
    if dtype not in (None, model.dtype) or torch.device(device or own.device) != own.device:
        raise ValueError(
            f"an optimised model runs in {model.dtype} on {own.device}, got {dtype} on {device}: explain "
            "one that is optimised for those"
        )
    x = torch.zeros(*input_size, dtype=model.dtype, device=own.device)
    return Explanation(Step(*choice) for choice in model.choices(x))


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without values, in float32."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, dtype=dtype, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


class _Asked(NamedTuple):
    """What the question is about, beside the calls."""

    dtype: torch.dtype
    device: torch.device
    forced: str
    modules: dict[str, nn.Module]

    def steps(self, call: _Call) -> list[Step]:
        """What runs a call: one step, or those of which it is composed."""
        if call.op in ("conv_fwd", "stem_conv"):
            return self._convolution(call)
        if call.op == "convolution":
            return [Step(call.layer, call.op, call.shape, "aten", self._unfused_convolution(call))]
        step = self._step(call.layer, call.op, call.shape)
        whole = step.implementation != "aten" or step.reason.startswith("the norm")
        if whole or call.op != "bn_relu_maxpool":
            return [step]
        pool = Step("", "max pool", call.shape, "aten", "PyTorch's own")
        return [self._step(call.layer, "bn_act", call.shape), pool]

    def _convolution(self, call: _Call) -> list[Step]:
        layer, forward, shape, conv, before, behind = call
        of = {
            op: self._choice(op, conv) for op in (plan.STEM_OPS if forward == "stem_conv" else plan.CONV_OPS)
        }
        implementation, reason, _ = of.pop(forward)
        if {choice.implementation for choice in of.values()} != {implementation}:
            reason += "".join(f"; {op}: {_named(choice)}" for op, choice in of.items())
        if implementation == "aten":
            steps = [] if before is None else [self._step(before, "bn_act", shape)]
            steps.append(Step(layer, "convolution", shape, "aten", reason))
            if behind is not None and conv is not None:
                steps.append(self._step(behind, "bn_stats", conv.out_shape))
            return steps
        steps = [] if before is None else [Step(before, "bn_act", shape, implementation, f"inside {layer}")]
        steps.append(Step(layer, forward, shape, implementation, reason))
        if behind is not None and conv is not None:
            steps.append(Step(behind, "bn_stats", conv.out_shape, implementation, f"inside {layer}"))
        return steps

    def _choice(self, op: str, conv: plan.Conv | None) -> plan.Choice:
        return ops.choice(op, self.device, self.dtype, self.forced, conv)

    def _unfused_convolution(self, call: _Call) -> str:
        if call.conv is not None:
            outside = plan.outside_contract(call.conv)
            if outside is not None:
                return outside
        parts = call.layer.split(".")
        for end in range(len(parts) - 1, 0, -1):
            why = unfused_block_reason(self.modules[".".join(parts[:end])])
            if why is not None:
                return why
        return "not in a fused block"

    def _step(self, layer: str, op: str, shape: tuple[int, ...]) -> Step:
        module = self.modules.get(layer)
        why = None
        if module is not None and (op == "batch norm" or op.startswith("bn_")):
            # what the shapes alone didn't tell: torchvision's FrozenBatchNorm2d is plain in 16 bits
            x = torch.empty(shape, dtype=self.dtype, device="meta") if op.startswith("bn_") else None
            why = unfused_reason(module, None, x)
        if op not in plan.ALL_OPS:
            own = "not in a fused block" if op == "batch norm" else "PyTorch's own"
            return Step(layer, op, shape, "aten", why or own)
        if why is not None:
            return Step(layer, op, shape, "aten", why)
        implementation, reason, _ = self._choice(op, None)
        least = ops.served_from(op, self.device, self.dtype, self.forced)
        values = torch.Size(shape).numel()
        if least is not None and len(shape) == 4 and values < least:
            implementation, reason = "aten", f"{values:,} values, {implementation} pays from {least:,}"
        return Step(layer, op, shape, implementation, reason)
