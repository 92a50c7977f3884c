"""Residual blocks in one launch, where that is faster than their convolutions one by one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fusedres import autotune, ops
from fusedres.inference import gpu
from fusedres.inference.bound import Bound
from fusedres.inference.layers import ConvBiasAct, Stem
from fusedres.inference.prepared import Prepared

_OPS: Any = torch.ops.fusedres


class Block(NamedTuple):
    """1x1, 3x3, 1x1 of stride 1, whose input is added to the last one's output.

    Args:
        nodes, layers: of the three convolutions.
        source: what the block gets.
    """

    nodes: tuple[fx.Node, ...]
    layers: tuple[ConvBiasAct, ...]
    source: fx.Node


def find(net: fx.GraphModule, first: fx.Node) -> Block | None:
    """The block that begins with a node; None if none does."""
    nodes: list[fx.Node] = []
    layers: list[ConvBiasAct] = []
    node = first
    for side in (1, 3, 1):
        if node.op != "call_module":
            return None
        layer = net.get_submodule(str(node.target))
        if not isinstance(layer, ConvBiasAct) or not _fits(layer, side):
            return None
        nodes.append(node)
        layers.append(layer)
        if len(nodes) == 3:
            break
        if len(node.users) != 1 or len(node.all_input_nodes) != 1:
            return None
        node = next(iter(node.users))
        if node.args[0] is not nodes[-1]:
            return None
    source = first.args[0]
    if not isinstance(source, fx.Node) or len(node.args) < 2 or node.args[1] is not source:
        return None
    if layers[0].weight.shape[1] != layers[2].weight.shape[0]:
        return None
    return Block(tuple(nodes), tuple(layers), source)


def _fits(layer: ConvBiasAct, side: int) -> bool:
    return (
        not isinstance(layer, Stem)
        and tuple(layer.weight.shape[2:]) == (side, side)
        and layer.stride == layer.dilation == (1, 1)
        and layer.padding == (side // 2, side // 2)
        and layer.groups == 1
        and layer.bias is not None
        and layer.relu
    )


def bind(block: Block, x: Tensor, prepared: Prepared) -> Bound | None:
    """``block`` in one launch on inputs of ``x``'s shape; None if its convolutions are faster."""
    weights = [gpu.channels_last(layer, prepared) for layer in block.layers]
    biases = [gpu.float32_bias(layer, prepared) for layer in block.layers]
    parameters = tuple(t for pair in zip(weights, biases, strict=True) for t in pair)
    whole = _OPS.bottleneck_infer.default
    conv = ops.bottleneck_shape(x, weights[1])
    one_by_one: list[Bound] = []

    def run(fused: bool) -> Tensor:
        if fused:
            return whole(x, *parameters)  # type: ignore[no-any-return]
        t = x
        for i, layer in enumerate(block.layers):
            more = (x,) if i == 2 else ()
            if len(one_by_one) == i:
                one_by_one.append(gpu.bind_conv(layer, t, x if more else None, prepared))
            t = one_by_one[i].run(t, *more, *one_by_one[i].constants)
        return t

    if not autotune.fused("bottleneck_infer", x, conv, run):
        return None
    implementation, reason, _ = gpu.choice("bottleneck_infer", x, conv)
    return Bound(whole, parameters, implementation, reason)
