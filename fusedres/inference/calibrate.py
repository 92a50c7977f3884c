"""Post-training quantisation: from a trained net and some of its inputs to 8-bit convolutions.

Jacob et al. 2018, section 2; the steps are those that lose least on the inputs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusedres.inference.fold import fold, pads_zeros
from fusedres.inference.layers import ConvBiasAct
from fusedres.inference.quantized import LEVELS, Dequantize, Quantize, QuantizedConv, Scale

_BINS = 2048
# thresholds that are tried, as parts of the largest value
_THRESHOLDS = torch.linspace(0.2, 1.0, 81, dtype=torch.float64)


class Range:
    """Which values an activation takes, over all calibration images."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def see(self, x: Tensor) -> None:
        low, high = (value.item() for value in x.aminmax())
        if not math.isfinite(high - low):
            raise ValueError("model gives values that are not finite on the calibration images")
        self.low, self.high = min(self.low, low), max(self.high, high)

    def count(self, x: Tensor) -> None:
        self.counts += torch.histc(x.float(), _BINS, self.low, self.high).double()

    def scale(self) -> Scale:
        """The step that loses least: rounding errors inside, and what is cut off outside (in squares).

        0 is always a level: padding adds zeros, and a ReLU makes many.
        """
        width = (self.high - self.low) / _BINS
        if width == 0.0:
            return Scale(1.0, 0)
        values = self.low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width
        best, loss = Scale(1.0, 0), float("inf")
        for threshold in _THRESHOLDS.tolist():
            step = threshold * (self.high - self.low) / LEVELS
            scale = Scale(step, round(-self.low / (self.high - self.low) * LEVELS))
            kept = (torch.round(values / step) + scale.zero).clamp(0, LEVELS)
            lost = (self.counts * ((kept - scale.zero) * step - values).square()).sum().item()
            if lost < loss:
                best, loss = scale, lost
        return best


class _Watch(fx.Interpreter):
    """Runs the folded net and shows every activation to its range."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.ranges: dict[str, Range] = {}
        self.counting = False

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dim() == 4:
            seen = self.ranges.setdefault(n.name, Range())
            (seen.count if self.counting else seen.see)(value)
        return value


def calibrate(net: fx.GraphModule, images: Iterable[Tensor]) -> dict[str, Scale]:
    """The scale of every activation of ``net``, by its node's name."""
    batches = list(images)
    watch = _Watch(net)
    for watch.counting in (False, True):
        for batch in batches:
            watch.run(batch.float().contiguous(memory_format=torch.channels_last))
    return {name: seen.scale() for name, seen in watch.ranges.items()}


def quantize_net(model: nn.Module, images: Iterable[Tensor], dtype: torch.dtype) -> fx.GraphModule:
    """The folded net with all convolutions but the first in 8 bits, the rest in ``dtype``.

    The first reads images, whose channels have little in common; it and the classifier are some hundredths
    of the work.
    """
    net = fold(model).float()
    scales = calibrate(net, images)
    graph = net.graph
    layers: dict[str, ConvBiasAct] = {
        name: layer for name, layer in net.named_modules() if isinstance(layer, ConvBiasAct)
    }
    convolutions = [node for node in graph.nodes if node.op == "call_module" and node.target in layers]
    quantised: dict[fx.Node, Scale] = {}

    def in_bits(node: fx.Node, user: fx.Node) -> Scale:
        """Makes sure that ``user`` reads ``node`` in 8 bits."""
        if node in quantised:
            return quantised[node]
        name, scale = f"{node.name}_quantize", scales[node.name]
        if not hasattr(net, name):
            net.add_module(name, Quantize(scale))
            with graph.inserting_after(node):
                call = graph.call_module(name, (node,))
            node.replace_all_uses_with(call, lambda u: u is not call and u in eight_bits)
            quantised[call] = scale
        return scale

    eight_bits = set(convolutions[1:])
    for node in list(graph.nodes):
        if node in eight_bits:
            x, *residual = (in_bits(i, node) for i in node.args[:2])
            layer = QuantizedConv(
                layers[node.target], x, residual[0] if residual else None, scales[node.name]
            )
            net.set_submodule(node.target, layer)
            quantised[node] = scales[node.name]
        elif _moves(node) and quantised.get(node.args[0], Scale(1.0, 1)).zero == 0:
            quantised[node] = quantised[node.args[0]]
        else:
            for given in [i for i in node.all_input_nodes if i in quantised]:
                name = f"{given.name}_dequantize"
                net.add_module(name, Dequantize(quantised[given], dtype))
                with graph.inserting_before(node):
                    call = graph.call_module(name, (given,))
                node.replace_input_with(given, call)
    graph.lint()
    net.recompile()
    return net.to(dtype)


def _moves(node: fx.Node) -> bool:
    """Whether values are moved and none changed; a zero that is added has a level."""
    return node.target is operator.getitem or pads_zeros(node)
