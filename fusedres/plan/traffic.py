"""What an op has to move: each full tensor that it reads and writes, once for every time it needs it.

Vectors of a channel's length are not counted. The tables are the contracts that kernels and floors are held
to: op -> variant -> names of what is read, and of what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fusedres.plan.conv import ITEMSIZE, STEM, Conv

ACTIVATION, PARAMETER, IMAGE = "activation", "parameter", "image"
_BORDER = (STEM - 2, STEM - 1)  # rows and columns of an image packed for the stem, beyond its own


class Full(NamedTuple):
    """A tensor that is no vector.

    Args:
        name: in the contract.
        values: how many it has.
        itemsize: bytes of one.
        kind: what it is, for sums: an activation or its gradient, a parameter or its gradient, an image.
    """

    name: str
    values: int
    itemsize: int
    kind: str = ACTIVATION

    @property
    def bytes(self) -> int:
        return self.values * self.itemsize


class Pass(NamedTuple):
    """One launch: what it reads, writes and computes."""

    op: str
    reads: tuple[Full, ...]
    writes: tuple[Full, ...]
    flop: int = 0

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in (*self.reads, *self.writes))

    def bytes_of(self, kind: str) -> int:
        return sum(tensor.bytes for tensor in (*self.reads, *self.writes) if tensor.kind == kind)

    def seconds(self, bandwidth: float, peak: float) -> float:
        """The least time, for bytes and FLOP a second."""
        return max(self.bytes / bandwidth, self.flop / peak)


# by the residual: none, plain, or with a batch norm of its own
OPS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "bn_stats": {"none": ("x", "")},
    "bn_act": {
        "none": ("x", "z"),
        "plain": ("x residual", "z"),
        "normalised": ("x residual", "z"),
    },
    "bn_act_backward_reduce": {
        "none": ("grad x", ""),
        "plain": ("grad z x", "du"),
        "normalised": ("grad z x residual", "du"),
    },
    "bn_act_backward_apply": {
        "none": ("du x", "dx"),
        "plain": ("du x", "dx"),
        "normalised": ("du x residual", "dx dresidual"),
    },
    "bn_relu_maxpool": {"none": ("x", "pooled index")},
    "bn_relu_maxpool_backward_reduce": {"none": ("dpooled index x", "")},
    "bn_relu_maxpool_backward_apply": {"none": ("dpooled index x", "dx")},
    "bias_relu_maxpool": {"none": ("x", "pooled")},
    "global_avg_pool": {"none": ("x", "means")},
    "global_avg_pool_backward": {"none": ("dmeans", "dx")},
    "quantize_int8": {"none": ("x", "levels")},
    "cast_weights": {"none": ("weights", "casts")},
    # by what a block asks of a convolution: inner ones are behind a batch norm of the block, the first is on
    # its input, whose gradient has the shortcut's added; with a residual the block's input is made on the way
    "conv_fwd": {
        "inner": ("x weight", "y"),
        "first": ("x weight", "y"),
        "projection": ("x weight", "y"),
        "residual": ("x residual weight", "y z"),
    },
    "conv_dgrad": {
        "inner": ("du y weight x", "dx"),
        "first": ("du y weight add", "dx"),
        "projection": ("du y weight", "dx"),
    },
    "conv_wgrad": {
        "inner": ("du y x", "dweight"),
        "first": ("du y x", "dweight"),
        "projection": ("du y x", "dweight"),
    },
    "conv_bias_act": {"none": ("x weight", "z"), "plain": ("x residual weight", "z")},
    "bottleneck_infer": {"none": ("x weight1 weight2 weight3", "z")},
    "conv_int8": {"none": ("x weight", "z"), "plain": ("x residual weight", "z")},
    # packs the image first
    "stem_conv": {"none": ("image pixels weight", "packed y")},
    "stem_wgrad": {"none": ("dy pixels", "dweight")},
}


def moved(op: str, variant: str, sizes: Mapping[str, Full], flop: int = 0) -> Pass:
    """The pass of ``op`` on tensors of ``sizes``, by the names of its contract."""
    reads, writes = OPS[op][variant]
    return named(op, reads, writes, sizes, flop)


def named(op: str, reads: str, writes: str, sizes: Mapping[str, Full], flop: int = 0) -> Pass:
    """A pass of any operator, from the names of what it reads and writes."""
    read, written = (
        tuple(sizes[name]._replace(name=name) for name in names.split()) for names in (reads, writes)
    )
    return Pass(op, read, written, flop)


def activations(values: int, dtype: str, *names: str) -> dict[str, Full]:
    """Tensors of one size."""
    return {name: Full(name, values, ITEMSIZE[dtype]) for name in names}


def pooled(shape: tuple[int, int, int, int], dtype: str) -> dict[str, Full]:
    """What the stem's pool gives of an activation of ``shape``, and what comes back; the index has a byte."""
    n, channels, height, width = shape
    values = n * channels * ((height + 1) // 2) * ((width + 1) // 2)
    return {**activations(values, dtype, "pooled", "dpooled"), "index": Full("index", values, 1)}


def around(conv: Conv, dtype: str) -> dict[str, Full]:
    """The tensors around a convolution. Of an input of which a strided 1x1 sees every fourth pixel, those."""
    n, filters, height, width = conv.out_shape
    seen = height * width if conv.side == 1 else conv.height * conv.width
    weights = filters * conv.channels * conv.side**2
    size = ITEMSIZE[dtype]
    return {
        **activations(n * filters * height * width, dtype, "y", "du", "dy", "z"),
        **activations(n * conv.channels * seen, dtype, "x"),
        **activations(n * conv.channels * conv.height * conv.width, dtype, "dx", "add"),
        **{name: Full(name, weights, size, PARAMETER) for name in ("weight", "dweight")},
    }


def images(conv: Conv, dtype: str) -> dict[str, Full]:
    """The images of the stem: as float32, cast, and packed with a border and a fourth channel.

    What making them moves is counted apart from what convolutions read of them.
    """
    n, _, height, width = conv.out_shape
    rows, columns = _BORDER
    values, size = n * conv.channels * conv.height * conv.width, ITEMSIZE[dtype]
    packed = n * (2 * height + rows) * (2 * width + columns) * (conv.channels + 1)
    return {
        "image": Full("image", values, ITEMSIZE["float32"], IMAGE),
        "x": Full("x", values, size),
        "packed": Full("packed", packed, size, IMAGE),
        "pixels": Full("pixels", packed, size),
        "cast": Full("cast", values, size, IMAGE),
    }


def flop(conv: Conv) -> int:
    """Of a convolution, the same in each direction."""
    n, filters, height, width = conv.out_shape
    return 2 * n * filters * height * width * conv.channels * conv.side**2
