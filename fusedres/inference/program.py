"""The folded graph as a list of calls, bound to a device and a shape: what runs.

A module's call and what it looks up take as long as a small convolution. Here everything that doesn't
depend on values is settled when the program is made, on its first input.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedres import ops
from fusedres.inference import block, gpu, gpu_int8, onednn
from fusedres.inference.bound import Bound
from fusedres.inference.fold import pads_zeros
from fusedres.inference.layers import ConvBiasAct, Stem
from fusedres.inference.prepared import Prepared
from fusedres.inference.quantized import Dequantize, Quantize, QuantizedConv

_ROUNDS = 4


class Step(NamedTuple):
    """``values[output] = run(*(values[i] for i in inputs), *constants)``"""

    run: Callable[..., Tensor]
    inputs: tuple[int, ...]
    constants: tuple[Any, ...]
    output: int


class Choice(NamedTuple):
    """What was settled for a node of the graph.

    Args:
        layer: the module's name; "" for a function.
        op: what is computed.
        shape: of the first input.
        implementation: "onednn", "triton", "cuda", "cudnn" or "aten".
        reason: why that one.
    """

    layer: str
    op: str
    shape: tuple[int, ...]
    implementation: str
    reason: str


class Program:
    """Made of a graph by running it once; then called on inputs of the same shape, dtype and device.

    Args:
        net: the folded graph, of one input and one output.
        prepared: what programs share of what is made of the parameters.
    """

    def __init__(self, net: fx.GraphModule, prepared: Prepared) -> None:
        self._net, self._prepared = net, prepared
        self.choices: list[Choice] = []
        # milliseconds of each way to run a layer that has several
        self.measured: dict[str, dict[str, float]] = {}
        self._steps: list[Step] = []
        self._slots = self._result = 0

    @classmethod
    def made(cls, net: fx.GraphModule, x: Tensor, prepared: Prepared) -> tuple[Program, Tensor]:
        """A program for inputs like ``x``, and its output for that one."""
        program = cls(net, prepared)
        out, program._result = program._make(x)
        return program, out

    def __call__(self, x: Tensor) -> Tensor:
        values: list[Any] = [None] * self._slots
        values[0] = x
        for run, inputs, constants, output in self._steps:
            if len(inputs) == 1:
                values[output] = run(values[inputs[0]], *constants)
            else:
                values[output] = run(*[values[i] for i in inputs], *constants)
        return values[self._result]  # type: ignore[no-any-return]

    def _make(self, x: Tensor) -> tuple[Tensor, int]:
        nodes = list(self._net.graph.nodes)
        last_use = {used: node for node in nodes for used in node.all_input_nodes}
        values: dict[fx.Node, Tensor] = {}
        slot: dict[fx.Node, int] = {}
        free: list[int] = []
        whole: dict[fx.Node, tuple[Bound, fx.Node] | None] = {}  # blocks in one launch, their nodes
        for node in nodes:
            inputs = node.all_input_nodes
            if node.op == "output":
                break
            whole.update(self._whole_block(node, values))
            if node in whole and whole[node] is None:
                continue
            if node.op == "placeholder":
                value, bound = x, None
            else:
                if node in whole:
                    bound, source = whole[node]  # type: ignore[misc]
                    inputs = [source]
                else:
                    bound = self._bind(node, [values[i] for i in inputs])
                tensors = [values[i] for i in inputs]
                choice = self._choice(node, bound, tensors)
                self.choices.append(choice._replace(op="bottleneck") if node in whole else choice)
                value = bound.run(*(values[i] for i in inputs), *bound.constants)
            taken = tuple(slot[i] for i in inputs)
            # what is read here for the last time makes room, first of all for the result
            for used in inputs:
                if last_use[used] is node:
                    free.append(slot[used])
                    del values[used]
            if not free:
                free.append(self._slots)
                self._slots += 1
            slot[node], values[node] = free.pop(), value
            if bound is not None:
                self._steps.append(Step(bound.run, taken, bound.constants, slot[node]))
        (result,) = inputs
        return values[result], slot[result]

    def _whole_block(
        self, node: fx.Node, values: dict[fx.Node, Tensor]
    ) -> dict[fx.Node, tuple[Bound, fx.Node] | None]:
        """If a block that begins here runs in one launch: at its last node how, None at the others."""
        forced = ops.forced_backend()
        found = block.find(self._net, node) if forced in ("auto", "cuda") else None
        if found is None or found.source not in values:
            return {}
        x = values[found.source]
        if (x.device.type != "cuda" and forced == "auto") or x.numel() == 0:
            return {}
        bound = block.bind(found, x, self._prepared)
        if bound is None:
            return {}
        return {**dict.fromkeys(found.nodes), found.nodes[-1]: (bound, found.source)}

    def _bind(self, node: fx.Node, tensors: list[Tensor]) -> Bound:
        if node.op == "get_attr":
            return Bound(lambda: _attribute(self._net, str(node.target)))
        if pads_zeros(node):
            return Bound(_pad, node.args[1:])
        run: Any = node.target
        if node.op == "call_method":
            run = getattr(torch.Tensor, str(node.target))
        elif node.op == "call_module":
            run = self._net.get_submodule(str(node.target))
            bound = self._bind_layer(run, node, tensors)
            if bound is not None:
                return bound
        first, rest = node.args[: len(tensors)], node.args[len(tensors) :]
        if first == tuple(node.all_input_nodes) and not node.kwargs and not _nodes_in(rest):
            return Bound(run, rest)
        return Bound(_anywhere(run, node))

    def _choice(self, node: fx.Node, bound: Bound, tensors: list[Tensor]) -> Choice:
        op = getattr(node.target, "__name__", str(node.target))
        layer = ""
        if node.op == "call_module":
            layer = str(node.target)
            module = self._net.get_submodule(layer)
            op = module.op if isinstance(module, ConvBiasAct | QuantizedConv) else type(module).__name__
            op += " + residual" if len(tensors) > 1 else ""
        shape = tuple(tensors[0].shape) if tensors else ()
        return Choice(layer, op, shape, bound.implementation, bound.reason)

    def _fastest(self, name: str, ways: dict[str, Bound], tensors: list[Tensor]) -> Bound | None:
        """The fastest of ``ways``; the first where timings must not decide."""
        if len(ways) < 2 or torch.are_deterministic_algorithms_enabled():
            return next(iter(ways.values()), None)
        took = dict.fromkeys(ways, math.inf)
        for _ in range(_ROUNDS):
            for way, bound in ways.items():
                given = [tensors[0], *(t.clone() for t in tensors[1:])]  # may be written over
                start = time.perf_counter()
                bound.run(*given, *bound.constants)
                took[way] = min(took[way], 1e3 * (time.perf_counter() - start))
        self.measured[name] = took
        times = ", ".join(f"{way} {ms:.2f} ms" for way, ms in took.items())
        return ways[min(took, key=took.__getitem__)]._replace(reason=f"measured {times}")

    def _bind_layer(self, layer: nn.Module, node: fx.Node, tensors: list[Tensor]) -> Bound | None:
        """What is better than calling the module; None if nothing is."""
        forced, x = ops.forced_backend(), tensors[0]
        if forced == "reference" or x.numel() == 0:
            return None
        residual = tensors[1] if len(tensors) > 1 else None
        reuse = len(node.args) > 2
        on_gpu = x.device.type == "cuda" or forced in ("triton", "cuda")
        if on_gpu and isinstance(layer, Quantize | QuantizedConv):
            return gpu_int8.bind(layer, tensors, self._read_as(node), self._prepared)
        if isinstance(layer, QuantizedConv):
            if x.device.type != "cpu":
                return None
            ways = onednn.quantized_candidates(
                layer, x, self._prepared, residual=residual is not None, reuse=reuse
            )
            return self._fastest(str(node.target), ways, tensors)
        if on_gpu and isinstance(layer, nn.AdaptiveAvgPool2d):
            return gpu.bind_average_pool(layer, x)
        if on_gpu and isinstance(layer, ConvBiasAct):
            if isinstance(layer, Stem):
                return gpu.bind_stem(layer, x, self._prepared)
            return gpu.bind_conv(layer, x, residual, self._prepared)
        if x.device.type != "cpu" or on_gpu or onednn.unavailable(x.dtype) is not None:
            return None
        if isinstance(layer, Stem):
            return onednn.bind_stem(layer, x, self._prepared)
        if isinstance(layer, ConvBiasAct):
            return onednn.bind_conv(layer, x, self._prepared, residual=residual is not None, reuse=reuse)
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            return onednn.bind_average_pool(layer, x)
        return onednn.bind_linear(layer, x, self._prepared) if isinstance(layer, nn.Linear) else None

    def _read_as(self, node: fx.Node) -> torch.dtype | None:
        """The dtype that all who read a layer's levels convert them to; None if one reads levels."""
        dtypes = set()
        for user in node.users:
            reader = self._net.get_submodule(str(user.target)) if user.op == "call_module" else None
            dtypes.add(reader.like.dtype if isinstance(reader, Dequantize) else None)
        return dtypes.pop() if len(dtypes) == 1 else None


def _pad(x: Tensor, pads: Sequence[int]) -> Tensor:
    """F.pad with zeros, in channels_last: of a strided image with an odd side it makes NCHW.

    Levels are padded where 0 is the lowest (see ``calibrate``).
    """
    zero = 0 if x.is_floating_point() else torch.iinfo(x.dtype).min
    return F.pad(x, pads, value=zero).contiguous(memory_format=torch.channels_last)


def _nodes_in(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(args, found.append)
    return found


def _attribute(net: fx.GraphModule, name: str) -> Any:
    found: Any = net
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _anywhere(run: Callable[..., Tensor], node: fx.Node) -> Callable[..., Tensor]:
    """A call whose tensors stand anywhere in its arguments."""

    def call(*tensors: Tensor) -> Tensor:
        given = dict(zip(node.all_input_nodes, tensors, strict=True))
        args: Any = fx.map_arg(node.args, given.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, given.__getitem__)
        return run(*args, **kwargs)

    return call
