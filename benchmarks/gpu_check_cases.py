"""The cases of the ops: ResNet-50's layers, with inputs, reference and PyTorch's own counterpart."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from shapes import Conv, Norm, layers
from torch import Tensor

import fusedres
from fusedres.plan import traffic

EPS = 1e-5
BATCH, SMALLER_BATCH, TINY_BATCH = 256, 64, 4
_LEAST_MEMORY = 40 << 30  # bytes, for the large batch
_TINY_GROUPS = 4
# nearer to 0 than this the sign of a sum, and so a ReLU's mask, may depend on its rounding
_UNSURE = 1e-4
_POOL = (3, 2, 1)  # of the stem: size, stride, padding
_STEP = 0.03  # of levels
_OPS = torch.ops.fusedres

Outputs = tuple[Tensor, ...]
Inputs = SimpleNamespace

# what a whole pass consists of, where a normalised residual has statistics of its own
PASSES = {
    "bn_forward": ("bn_stats", "bn_act"),
    "bn_backward": ("bn_act_backward_reduce", "bn_act_backward_apply"),
    "stem_forward": ("bn_stats", "bn_relu_maxpool"),
    "stem_backward": ("bn_relu_maxpool_backward_reduce", "bn_relu_maxpool_backward_apply"),
}


def bytes_moved(op: str, shape: Sequence[int], dtype: torch.dtype, variant: str = "none") -> int:
    """Bytes that an op, or a pass of PASSES, has to move: each full tensor once, vectors not counted.

    Args:
        op: its name.
        shape: of the activation, [N, C, H, W]; for cast_weights [number of weights].
        dtype: of the activation, or of the casts of float32 weights.
        variant: the residual, where there may be one: "none", "plain" or "normalised".
    """
    if op in PASSES:
        moved = sum(bytes_moved(each, shape, dtype, _own_variant(each, variant)) for each in PASSES[op])
        again = op == "bn_forward" and variant == "normalised"
        return moved + again * bytes_moved("bn_stats", shape, dtype)
    return traffic.moved(op, _own_variant(op, variant), _sizes(shape, dtype)).bytes


def _sizes(shape: Sequence[int], dtype: torch.dtype) -> dict[str, traffic.Full]:
    values, name = math.prod(shape), str(dtype).removeprefix("torch.")
    if len(shape) == 1:
        wide = traffic.activations(values, "float32", "weights")
        return {**wide, **traffic.activations(values, name, "casts")}
    n, c, h, w = shape
    full = ("x", "residual", "z", "grad", "du", "dx", "dresidual")
    return {
        **traffic.activations(values, name, *full),
        **traffic.pooled((n, c, h, w), name),
        **traffic.activations(n * c, name, "means", "dmeans"),
        **traffic.activations(values, "int8", "levels"),
    }


def _own_variant(op: str, variant: str) -> str:
    return variant if variant in traffic.OPS[op] else "none"


@dataclass(frozen=True)
class Case:
    """One op, or pass, on one shape.

    Args:
        op: its name.
        variant: the residual, or the layout of weights.
        shape: of the activation.
        dtype: of the activation.
        bytes: that it has to move.
        ops: the registered ops that it calls.
        chosen_by: the dtype that says which implementation serves them.
        run: calls them under whatever backend is forced, on the inputs.
        expected: the same, under the reference backend; in float64 for float32.
        aten: makes a call of PyTorch's own with the same first output; None where there is no counterpart.
    """

    op: str
    variant: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    ops: tuple[str, ...]
    chosen_by: torch.dtype
    run: Callable[[], Outputs]
    expected: Callable[[], Outputs]
    aten: Callable[[], Callable[[], Outputs]] | None


def groups(device: str, tiny: bool) -> list[Callable[[], Iterator[Case]]]:
    """Makers of cases that share inputs, in the order of what they move.

    All in bf16, then the first of each kind in the other dtypes.
    """
    found = layers("resnet18", 64) if tiny else layers("resnet50")
    batch = _batch(device, tiny)
    makers: list[tuple[int, Callable[..., Iterator[Case]], tuple[object, ...]]] = []
    norms = {layer: count for layer, count in found.items() if isinstance(layer, Norm) and layer.relu}
    for norm, count in norms.items():
        shape = (batch, norm.channels, norm.height, norm.width)
        for variant in ("plain", "normalised") if norm.residual else ("none",):
            makers.append((count * norm.values(batch), _norm_cases, (shape, variant, device)))
    stem, last = list(norms)[0], list(norms)[-1]
    makers.append((stem.values(batch), _stem_cases, ((batch, *stem[:3]), device)))
    makers.append((last.values(batch), _avg_pool_cases, ((batch, *last[:3]), device)))
    convs = [conv for conv, count in found.items() if isinstance(conv, Conv) for _ in range(count)]
    weights = sum(conv.outputs * conv.inputs * conv.size**2 for conv in convs)
    makers.append((weights, _cast_cases, (convs, device)))
    makers.sort(key=lambda maker: maker[0], reverse=True)
    if tiny:
        makers = [m for m in makers if m[1] is not _norm_cases] + [m for m in makers if m[1] is _norm_cases]
        makers = makers[: 3 + _TINY_GROUPS]
    kinds: dict[object, tuple[Callable[..., Iterator[Case]], tuple[object, ...]]] = {}
    for _, make, rest in makers:
        kinds.setdefault((make, rest[1] if make is _norm_cases else None), (make, rest))
    plan = [(make, rest, torch.bfloat16) for _, make, rest in makers]
    plan += [(*kind, dtype) for dtype in (torch.float16, torch.float32) for kind in kinds.values()]
    # a cast is to 16 bits
    return [
        functools.partial(make, *rest, dtype)
        for make, rest, dtype in plan
        if not (make is _cast_cases and dtype == torch.float32)
    ]


def _batch(device: str, tiny: bool) -> int:
    if tiny:
        return TINY_BATCH
    return BATCH if torch.cuda.get_device_properties(device).total_memory >= _LEAST_MEMORY else SMALLER_BATCH


def _activation(shape: Sequence[int], dtype: torch.dtype, device: str, mean: float = 0.0) -> Tensor:
    return (torch.randn(*shape, device=device) + mean).to(dtype, memory_format=torch.channels_last)


def _parameters(channels: int, device: str) -> tuple[Tensor, Tensor]:
    return torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)


def _wide(t: Inputs) -> Inputs:
    def widened(value: object) -> object:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Inputs(**{name: widened(value) for name, value in vars(t).items()})


def _case(
    op: str,
    variant: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    t: Inputs,
    call: Callable[[Inputs], Outputs],
    aten: Callable[[Inputs], Callable[[], Outputs]] | None = None,
) -> Case:
    return Case(
        op=op,
        variant=variant,
        shape=shape,
        dtype=dtype,
        bytes=bytes_moved(op, shape, dtype, variant),
        ops=PASSES.get(op, (op,)),
        chosen_by=torch.float32 if op == "cast_weights" else dtype,
        run=lambda: call(t),
        # 16 bits: the reference computes in float32, and stores as the kernels do
        expected=lambda: call(_wide(t) if dtype == torch.float32 else t),
        aten=None if aten is None else lambda: aten(t),
    )


def _norm_cases(shape: tuple[int, ...], variant: str, device: str, dtype: torch.dtype) -> Iterator[Case]:
    t = _norm_inputs(shape, variant, device, dtype)
    if variant != "normalised":  # the statistics are those of the plain case, on the same shape
        yield _case("bn_stats", "none", shape, dtype, t, lambda t: (_stats(t),))
    yield _case("bn_act", variant, shape, dtype, t, lambda t: (_act(t, t.stats, t.residual_stats),))
    yield _case("bn_act_backward_reduce", variant, shape, dtype, t, lambda t: _given(*_reduce(t)))
    yield _case(
        "bn_act_backward_apply",
        variant,
        shape,
        dtype,
        t,
        lambda t: _given(*_apply(t, t.du, t.sums, t.residual_sums)),
    )
    yield _case("bn_forward", variant, shape, dtype, t, _forward, lambda t: lambda: (_aten(t),))
    yield _case("bn_backward", variant, shape, dtype, t, _backward, _aten_backward)


def _norm_inputs(shape: tuple[int, ...], variant: str, device: str, dtype: torch.dtype) -> Inputs:
    t = Inputs(variant=variant, residual=None, residual_stats=None, z=None)
    t.x = _activation(shape, dtype, device, mean=0.5)
    t.weight, t.bias = _parameters(shape[1], device)
    t.residual_weight, t.residual_bias = _parameters(shape[1], device)
    if variant != "none":
        t.residual = _activation(shape, dtype, device)
    with fusedres.backend("reference"):
        t.stats = _stats(t)
        if variant == "normalised":
            t.residual_stats = _residual_stats(t)
        u = _OPS.bn_act(t.x, t.stats, t.residual, t.residual_stats, False)
        t.grad = torch.where(u.abs() < _UNSURE, 0.0, _activation(shape, dtype, device))
        if variant != "none":
            t.z = torch.relu(u)
        t.du, t.sums, t.residual_sums = _reduce(t)
    return t


def _given(*outputs: Tensor) -> Outputs:
    """Without the empty tensors that stand for None."""
    return tuple(t for t in outputs if t.numel())


def _stats(t: Inputs) -> Tensor:
    return _OPS.bn_stats(t.x, t.weight, t.bias, EPS)


def _residual_stats(t: Inputs) -> Tensor:
    return _OPS.bn_stats(t.residual, t.residual_weight, t.residual_bias, EPS)


def _act(t: Inputs, stats: Tensor, residual_stats: Tensor | None) -> Tensor:
    return _OPS.bn_act(t.x, stats, t.residual, residual_stats, True)


def _branch(t: Inputs) -> tuple[Tensor | None, Tensor | None]:
    return (t.residual, t.residual_stats) if t.variant == "normalised" else (None, None)


def _reduce(t: Inputs) -> Outputs:
    return _OPS.bn_act_backward_reduce(t.grad, t.x, t.z, t.stats, *_branch(t), True)


def _apply(t: Inputs, du: Tensor, sums: Tensor, residual_sums: Tensor) -> Outputs:
    """du is the gradient behind the ReLU; without a residual that is not kept, but masked again."""
    if t.variant == "none":
        return _OPS.bn_act_backward_apply(t.grad, t.x, t.stats, sums, None, None, None, True)
    of_residual = residual_sums if t.variant == "normalised" else None
    return _OPS.bn_act_backward_apply(du, t.x, t.stats, sums, *_branch(t), of_residual, False)


def _forward(t: Inputs) -> Outputs:
    stats = _stats(t)
    return (_act(t, stats, _residual_stats(t) if t.variant == "normalised" else None),)


def _backward(t: Inputs) -> Outputs:
    return _given(*_apply(t, *_reduce(t)))


def _aten(t: Inputs) -> Tensor:
    """What eager PyTorch runs, in place where torchvision's blocks are."""
    out = F.batch_norm(t.x, None, None, t.weight, t.bias, True, 0.1, EPS)
    if t.variant == "normalised":
        out += F.batch_norm(t.residual, None, None, t.residual_weight, t.residual_bias, True, 0.1, EPS)
    elif t.variant == "plain":
        out += t.residual
    return F.relu_(out)


def _aten_backward(t: Inputs) -> Callable[[], Outputs]:
    names = ["x", "weight", "bias"]
    if t.variant != "none":
        names.append("residual")
    if t.variant == "normalised":
        names += ["residual_weight", "residual_bias"]
    return _gradients(t, names, _aten)


def _gradients(t: Inputs, names: Sequence[str], forward: Callable[[Inputs], Tensor]) -> Callable[[], Outputs]:
    """A backward alone: calls of autograd over one forward."""
    leaves = {name: getattr(t, name).detach().requires_grad_() for name in names}
    out = forward(Inputs(**{**vars(t), **leaves}))
    return lambda: torch.autograd.grad(out, list(leaves.values()), t.grad, retain_graph=True)


def _stem_cases(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Iterator[Case]:
    t = Inputs(variant="none", x=_activation(shape, dtype, device, mean=0.5))
    t.weight, t.bias = _parameters(shape[1], device)
    with fusedres.backend("reference"):
        t.stats = _stats(t)
        z, t.index = _OPS.bn_relu_maxpool(t.x, t.stats)
        t.grad = _activation(z.shape, dtype, device)
        t.sums = _pool_reduce(t)

    def aten(t: Inputs) -> Tensor:
        return F.max_pool2d(_aten(t), *_POOL)

    def case(op: str, call: Callable[[Inputs], Outputs], counterpart: object = None) -> Case:
        return _case(op, "none", shape, dtype, t, call, counterpart)

    yield case(
        "bias_relu_maxpool",
        lambda t: (_OPS.bias_relu_maxpool(t.x, None),),
        lambda t: lambda: (F.max_pool2d(F.relu(t.x), *_POOL),),
    )
    yield case(
        "quantize_int8",
        lambda t: (_OPS.quantize_int8(t.x, _STEP, 0),),
        lambda t: lambda: ((t.x.float() / _STEP).round().clamp(-128, 127).to(torch.int8),),
    )
    yield case("bn_relu_maxpool", lambda t: _OPS.bn_relu_maxpool(t.x, t.stats))
    yield case("bn_relu_maxpool_backward_reduce", lambda t: (_pool_reduce(t),))
    yield case("bn_relu_maxpool_backward_apply", lambda t: (_pool_apply(t, t.sums),))
    yield case(
        "stem_forward", lambda t: _OPS.bn_relu_maxpool(t.x, _stats(t))[:1], lambda t: lambda: (aten(t),)
    )
    yield case(
        "stem_backward",
        lambda t: (_pool_apply(t, _pool_reduce(t)),),
        lambda t: _gradients(t, ("x", "weight", "bias"), aten),
    )


def _pool_reduce(t: Inputs) -> Tensor:
    return _OPS.bn_relu_maxpool_backward_reduce(t.grad, t.index, t.x, t.stats)


def _pool_apply(t: Inputs, sums: Tensor) -> Tensor:
    return _OPS.bn_relu_maxpool_backward_apply(t.grad, t.index, t.x, t.stats, sums)


def _avg_pool_cases(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Iterator[Case]:
    t = Inputs(x=_activation(shape, dtype, device), grad=_activation((*shape[:2], 1, 1), dtype, device))

    def aten(t: Inputs) -> Tensor:
        return F.adaptive_avg_pool2d(t.x, 1)

    yield _case(
        "global_avg_pool",
        "none",
        shape,
        dtype,
        t,
        lambda t: (_OPS.global_avg_pool(t.x),),
        lambda t: lambda: (aten(t),),
    )
    yield _case(
        "global_avg_pool_backward",
        "none",
        shape,
        dtype,
        t,
        lambda t: (_OPS.global_avg_pool_backward(t.grad, *shape[2:]),),
        lambda t: _gradients(t, ("x",), aten),
    )


def _cast_cases(convs: Sequence[Conv], device: str, dtype: torch.dtype) -> Iterator[Case]:
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        weights = [
            torch.randn(c.outputs, c.inputs, c.size, c.size, device=device).to(memory_format=layout)
            for c in convs
        ]
        yield _case(
            "cast_weights",
            name,
            (sum(weight.numel() for weight in weights),),
            dtype,
            Inputs(weights=weights),
            lambda t: tuple(_OPS.cast_weights(t.weights, dtype)),
            lambda t: lambda: tuple(w.to(dtype, memory_format=torch.channels_last) for w in t.weights),
        )
