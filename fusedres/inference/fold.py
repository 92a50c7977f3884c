"""From a trained model to a graph of convolutions that hold what stood around them.

The model is traced by torch.fx, so that what it computes is seen and not guessed from its class. Then a
convolution takes in the batch norm behind it, the residual add, the ReLU and the stem's pooling wherever
nothing else reads what lies between.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedres.inference.layers import ConvBiasAct, Stem
from fusedres.nn.fuse import altered, is_frozen

_RELUS: tuple[Callable[..., Any], ...] = (F.relu, torch.relu, torch.relu_)
_ADDS: tuple[Callable[..., Any], ...] = (operator.add, operator.iadd, torch.add)
_BATCH_NORMS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
# they do nothing in eval mode
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)
_POOL = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}


class _Tracer(fx.Tracer):
    """Looks into every module but PyTorch's own and torchvision's frozen batch norm."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_frozen(m) or super().is_leaf_module(m, module_qualified_name)


def fold_batch_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias with the batch norm behind it taken in, computed in float64.

    y = gamma * (conv(x) + b - mean) / sqrt(var + eps) + beta (Ioffe and Szegedy 2015, section 3.1).

    Args:
        weight: [K, C / groups, R, S].
        bias: [K], or None.
        norm: with running statistics of K channels.

    Returns:
        weight, [K, C / groups, R, S], and bias, [K], both float64.
    """
    settings: Any = norm
    rstd = torch.rsqrt(settings.running_var.double() + settings.eps)
    scale = rstd if settings.weight is None else rstd * settings.weight.double()
    shift = (
        -settings.running_mean.double() if bias is None else bias.double() - settings.running_mean.double()
    )
    shift = shift * scale
    if settings.bias is not None:
        shift = shift + settings.bias.double()
    return weight.double() * scale[:, None, None, None], shift


def fold(model: nn.Module) -> fx.GraphModule:
    """The traced model with its convolutions as :class:`ConvBiasAct` and :class:`Stem`, in float64 where
    a batch norm was folded; shares nothing with ``model``.

    Raises:
        ValueError: a hook would not be called, a batch norm has no running statistics or doesn't follow a
            convolution; names the module.
        TypeError: the model can't be traced, or has no nn.Conv2d; says why.
    """
    for name, module in model.named_modules():
        why = altered(module)
        if why is not None:
            raise ValueError(
                f"{name or 'model'} {why}, which an optimised model would not run: remove it first"
            )
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever the model's own code does with a proxy
        raise TypeError(f"model can't be traced by torch.fx: {error}") from error
    for node in graph.nodes:
        node.type = None  # an annotation kept as a string can't be pickled
    traced = fx.GraphModule(model, graph)
    modules = dict(traced.named_modules())
    _drop_nothings(graph, modules)
    _fold_all(traced, graph, modules)
    if not any(isinstance(module, ConvBiasAct) for module in traced.modules()):
        raise TypeError("model must have convolutions that are nn.Conv2d, got none")
    for node in graph.nodes:
        if node.op == "call_module":
            norm = modules[node.target]
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) or is_frozen(norm):
                raise ValueError(f"{node.target} doesn't follow a convolution alone, so it can't be folded")
    _reuse_residuals(graph, traced)
    graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    graph.lint()
    traced.recompile()
    return copy.deepcopy(traced)


def _drop_nothings(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module" and type(modules[node.target]) in _NOTHING:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_batch_norm(module: nn.Module | None) -> bool:
    return module is not None and (type(module).forward in _BATCH_NORMS or is_frozen(module))


def pads_zeros(node: fx.Node) -> bool:
    """Whether a node of a traced graph is F.pad with zeros."""
    settings = (*node.args[2:], *node.kwargs.values())
    return node.target is F.pad and all(value in ("constant", None, 0) for value in settings)


class _Run:
    """The operators behind a convolution that it takes in, as far as each is the only reader."""

    def __init__(self, conv: fx.Node, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.nodes = [conv]

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    def reader(self) -> fx.Node | None:
        """The only one that reads the last operator's result; None if there are more or none."""
        return next(iter(self.last.users)) if len(self.last.users) == 1 else None

    def module(self, node: fx.Node | None) -> nn.Module | None:
        return self.modules[node.target] if node is not None and node.op == "call_module" else None  # type: ignore[index]

    def take_norm(self) -> nn.Module | None:
        reader = self.reader()
        norm = self.module(reader)
        if not _is_batch_norm(norm):
            return None
        self.nodes.append(reader)  # type: ignore[arg-type]
        return norm

    def take_add(self, order: dict[fx.Node, int]) -> fx.Node | None:
        """The other summand, if it is there before this one."""
        add = self.reader()
        if add is None or not (
            (add.op == "call_function" and add.target in _ADDS)
            or (add.op == "call_method" and add.target in ("add", "add_"))
        ):
            return None
        if len(add.args) != 2 or add.kwargs or not all(isinstance(a, fx.Node) for a in add.args):
            return None
        other = add.args[1] if add.args[0] is self.last else add.args[0]
        if other is self.last or order[other] > order[self.last]:  # type: ignore[index]
            return None
        self.nodes.append(add)
        return other  # type: ignore[return-value]

    def take_relu(self) -> bool:
        reader = self.reader()
        if reader is None:
            return False
        found = (
            type(self.module(reader)) is nn.ReLU
            or (reader.op == "call_function" and reader.target in _RELUS)
            or (reader.op == "call_method" and reader.target in ("relu", "relu_"))
        )
        if found:
            self.nodes.append(reader)
        return found

    def take_pool(self) -> bool:
        reader = self.reader()
        pool: Any = self.module(reader)
        found = (
            type(pool) is nn.MaxPool2d
            and all(getattr(pool, name) in (value, (value, value)) for name, value in _POOL.items())
            and not pool.ceil_mode
            and not pool.return_indices
        )
        if found:
            self.nodes.append(reader)  # type: ignore[arg-type]
        return found


def _fold_all(traced: fx.GraphModule, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    order = {node: index for index, node in enumerate(graph.nodes)}
    folded: set[str] = set()
    for node in list(graph.nodes):
        if node.op != "call_module" or type(modules[node.target]).forward is not nn.Conv2d.forward:
            continue
        if node.target in folded:
            raise ValueError(f"{node.target} is called more than once, which can't be folded")
        folded.add(node.target)
        run = _Run(node, modules)
        layer, residual = _take(run, node.target, order)
        traced.set_submodule(node.target, layer)
        with graph.inserting_after(run.last):
            call = graph.call_module(node.target, (node.args[0], *(() if residual is None else (residual,))))
        run.last.replace_all_uses_with(call)
        order[call] = order[run.last]
        for done in reversed(run.nodes):
            graph.erase_node(done)


def _take(run: _Run, name: str, order: dict[fx.Node, int]) -> tuple[ConvBiasAct, fx.Node | None]:
    conv: Any = run.modules[name]
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"{name} must be padded by a number of zeros, got {conv.padding_mode}, {conv.padding}"
        )
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    norm: Any = run.take_norm()
    if norm is not None:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                f"{run.last.target} has no running statistics (track_running_stats=False), so it depends on "
                "the batch and can't be folded: train it with them"
            )
        weight, bias = fold_batch_norm(weight, bias, norm)
    residual = run.take_add(order)
    relu = run.take_relu()
    kind: type[ConvBiasAct] = Stem if residual is None and relu and run.take_pool() else ConvBiasAct
    layer = kind(weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups, relu=relu)
    return layer, residual


def _reuse_residuals(graph: fx.Graph, traced: fx.GraphModule) -> None:
    """Let a convolution write over the residual that nobody reads after it.

    Only if another layer of ours made it, and all that read it are layers of ours: of those it is known
    that they return new memory, and no view.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}

    def is_layer(node: Any) -> bool:
        return node.op == "call_module" and isinstance(traced.get_submodule(node.target), ConvBiasAct)

    for node in graph.nodes:
        if not is_layer(node) or len(node.args) < 2:
            continue
        x, residual = node.args
        last = max(residual.users, key=order.__getitem__)
        if last is node and x is not residual and is_layer(residual) and all(map(is_layer, residual.users)):
            node.args = (x, residual, True)
