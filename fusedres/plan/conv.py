"""Rules for convolutions: which shapes the kernels take, and whether they are likely to pay.

A measurement (``fusedres.autotune``) stands above every prediction made here.
"""

from __future__ import annotations

from typing import NamedTuple

CONV_OPS = ("conv_fwd", "conv_dgrad", "conv_wgrad")
CONV_BIAS_OPS = ("conv_bias_act",)
BLOCK_OPS = ("bottleneck_infer",)
INT8_OPS = ("conv_int8",)
STEM_OPS = ("stem_conv", "stem_wgrad")
STEM_BIAS_OPS = ("stem_bias_act",)

# An H100's measured copy (bytes a second) and bf16 product (FLOP a second; of int8 twice that, as its data
# sheet has it); on other chips it is their quotient that decides, and that differs little
BANDWIDTH = 2.93e12
PEAK = {"float32": 3.8e14, "bfloat16": 7.53e14, "float16": 7.53e14, "int8": 2 * 7.53e14}
IEEE_PEAK = 5e13  # without tensor cores
# what cuDNN reaches of them in ResNet-50's layers at batch 256, at the middle: 0.9 where memory bounds a
# layer, 0.85 where arithmetic does
REACHED_BANDWIDTH, REACHED_PEAK = 0.9, 0.85
# our kernels' time over cuDNN's plain convolution: an assumption, at the upper end of what cuDNN's own
# fused patterns cost there (1.03 to 1.44)
FUSED_COST = 1.3
# cuDNN's time for a 3x3 of 64 channels and filters over what it reaches elsewhere: 1.9 times its floor
NARROW, NARROW_COST = 64, 1.6
STEM = 7  # side of its filters
# what channels and filters have to be multiples of, for accesses of 16 bytes
MULTIPLE, INT8_MULTIPLE = 8, 16
# of a block in one launch: what its kernel is made for, the chips with 99 KB of shared memory for a block of
# threads, and arithmetic that it does over what is needed (the border again, positions that aren't there)
WHOLE_BLOCK_INNER, WHOLE_BLOCK_CHANNELS = (64, 128), 128
LITTLE_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
WHOLE_BLOCK_FLOP = 1.5
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


class Conv(NamedTuple):
    """The shape of a convolution: square filters, padded so that stride 1 keeps the size.

    ``pending``: the input still has its batch norm ahead of it. ``ieee``: float32, and TF32 may not stand for
    it. ``residual``: one is added to the output.
    """

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    side: int
    stride: int
    dilation: int = 1
    groups: int = 1
    pending: bool = False
    ieee: bool = False
    residual: bool = False

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        height, width = ((size - 1) // self.stride + 1 for size in (self.height, self.width))
        return self.batch, self.filters, height, width

    def __str__(self) -> str:
        behind = " behind a norm" * self.pending + " plus a residual" * self.residual
        behind += " without TF32" * self.ieee
        return (
            f"{self.batch}x{self.channels}x{self.height}x{self.width}, {self.filters} filters "
            f"{self.side}x{self.side}/{self.stride}{behind}"
        )


def outside_contract(conv: Conv) -> str | None:
    """Why the convolution ops don't take a shape; None if they do."""
    if (conv.side, conv.stride, conv.channels, conv.groups, conv.dilation) == (STEM, 2, 3, 1, 1):
        return None
    if conv.groups != 1 or conv.dilation != 1:
        return f"no op for groups or dilation, got {conv.groups} and {conv.dilation}"
    if conv.side not in (1, 3) or conv.stride not in (1, 2):
        return f"ops are 1x1 and 3x3 of stride 1 and 2, got {conv.side}x{conv.side} of stride {conv.stride}"
    return None


def outside_kernels(op: str, conv: Conv) -> str | None:
    """Why the kernels don't take a shape that the ops take; None if they do."""
    multiple = INT8_MULTIPLE if op in INT8_OPS else MULTIPLE
    if conv.side == STEM and conv.filters % multiple == 0:
        return None
    if conv.channels % multiple or conv.filters % multiple:
        return f"channels and filters must be multiples of {multiple}, got {conv.channels} and {conv.filters}"
    return None


def outside_cuda(op: str, conv: Conv, dtype: str, capability: tuple[int, int] | None) -> str | None:
    """Why the CUDA kernels don't take what the kernels take; None if they do."""
    if conv.ieee:
        return "CUDA kernels multiply float32 as TF32, which torch.backends.cudnn.allow_tf32 forbids"
    if op == "conv_dgrad" and conv.stride != 1:
        return f"the CUDA conv_dgrad is of stride 1, got {conv.stride}"
    if op not in BLOCK_OPS:
        return None
    if dtype == "float32":
        return "a whole block is for 16 bits"
    if conv.filters not in WHOLE_BLOCK_INNER or conv.channels % WHOLE_BLOCK_CHANNELS:
        return (
            f"a whole block has {' or '.join(map(str, WHOLE_BLOCK_INNER))} inner channels and a multiple of "
            f"{WHOLE_BLOCK_CHANNELS} outside, got {conv.filters} and {conv.channels}"
        )
    if conv.filters > WHOLE_BLOCK_INNER[0] and capability in LITTLE_SHARED_MEMORY:
        return f"a whole block of {conv.filters} inner channels needs 110 KB of shared memory, the GPU has 99"
    return None


def predicted(op: str, conv: Conv, dtype: str) -> tuple[float, float]:
    """Seconds on an H100 of the fused kernel and of PyTorch's convolution with its batch-norm passes.

    A prediction: bytes and FLOP against what memory and cuDNN reach. Of a trained net's without the residual,
    which the fused kernel and cuDNN's read alike.
    """
    n, filters, height, width = conv.out_shape
    inputs = n * conv.channels * conv.height * conv.width * ITEMSIZE[dtype]
    outputs = n * filters * height * width * ITEMSIZE[dtype]
    flop = 2 * n * filters * height * width * conv.channels * conv.side**2
    bandwidth = BANDWIDTH * REACHED_BANDWIDTH

    def product(moved: int, dtype: str = dtype) -> float:
        return max(moved / bandwidth, flop / ((IEEE_PEAK if conv.ieee else PEAK[dtype]) * REACHED_PEAK))

    plain = product(inputs + outputs)
    if op in INT8_OPS:  # in bf16 there are two bytes to read and write, once more between two conversions
        converted = product(2 * (inputs + outputs), "bfloat16") + 3 * (inputs + outputs) / bandwidth
        return plain * FUSED_COST, converted
    if op in CONV_BIAS_OPS:  # cuDNN's is one pass as well
        narrow = conv.side == 3 and conv.channels == conv.filters == NARROW and not conv.ieee
        return plain * FUSED_COST, plain * (NARROW_COST if narrow else 1)
    # the raw output again, beside its gradient
    fused = product(inputs + outputs * (1 if op == "conv_fwd" else 2)) * FUSED_COST
    # write the activation or the gradient (the gradient's cost is shared by its two uses); statistics
    passes = {
        "conv_fwd": 2 * inputs * conv.pending + outputs,
        "conv_dgrad": 3 * outputs / 2 + 2 * inputs * conv.pending,
        "conv_wgrad": 3 * outputs / 2 + 2 * inputs * conv.pending,
    }[op]
    if op == "conv_dgrad" and conv.pending:  # reads it for the ReLU's mask and the sums
        fused += inputs / bandwidth
    return fused, plain + passes / bandwidth


def predicted_block(conv: Conv, dtype: str) -> tuple[float, float]:
    """Seconds on an H100 of a block in one launch and of its three convolutions; a prediction as above."""
    positions = conv.batch * conv.height * conv.width
    wide, inner = (positions * channels * ITEMSIZE[dtype] for channels in (conv.channels, conv.filters))

    def product(moved: int, flop: float) -> float:
        return max(moved / (BANDWIDTH * REACHED_BANDWIDTH), flop / (PEAK[dtype] * REACHED_PEAK))

    outer_flop = 2 * positions * conv.channels * conv.filters
    window_flop = 2 * positions * 9 * conv.filters**2
    whole = product(2 * wide, WHOLE_BLOCK_FLOP * (2 * outer_flop + window_flop)) * FUSED_COST
    first, last = product(wide + inner, outer_flop), product(inner + 2 * wide, outer_flop)
    return whole, first + product(2 * inner, window_flop) + last


def likely(op: str, conv: Conv | None, dtype: str) -> tuple[bool, str]:
    """Whether the fused kernel is predicted to win, and why."""
    if conv is None:
        return True, "by shape"
    if op in STEM_OPS + STEM_BIAS_OPS:
        # 11 (bf16) and 3.5 (fp16) times the memory's floor forward, 7 and 3.5 for the weight
        return not conv.ieee, "predicted: cuDNN's takes 3 to 11 times what memory needs; not measured"
    fused, plain = predicted_block(conv, dtype) if op in BLOCK_OPS else predicted(op, conv, dtype)
    return fused <= plain, f"predicted {fused * 1e6:.3g} us fused, {plain * 1e6:.3g} us not; not measured"
