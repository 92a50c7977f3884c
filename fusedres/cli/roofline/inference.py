"""Inference with batch norms folded away: convolutions with what follows in their pass, or whole blocks."""

from __future__ import annotations

from fusedres.cli.roofline.nets import Block
from fusedres.cli.roofline.tally import HEAD, Tally
from fusedres.plan import traffic
from fusedres.plan.conv import ITEMSIZE
from fusedres.plan.traffic import PARAMETER, Full


class Convs:
    """Each convolution with bias, residual and ReLU in one pass.

    With ``pooled`` the stem's pool is in the pass of its convolution.
    """

    def __init__(self, tally: Tally, pooled: bool) -> None:
        self.tally, self.pooled = tally, pooled

    def forward(self) -> None:
        tally = self.tally
        stem, sizes = tally.net.stem, tally.image()
        tally.cast_image(sizes)
        if self.pooled:
            tally.other("conv1", "conv + pool", "x weight", "pooled", sizes, traffic.flop(stem))
        else:
            tally.other("conv1", "convolution", "x weight", "y", sizes, traffic.flop(stem))
            tally.op("maxpool", "bias_relu_maxpool", "none", {**sizes, "x": sizes["y"]})
        for block in tally.net.blocks:
            tally.block = block.name
            self.of_block(block)
        tally.block = HEAD
        last = tally.last()
        tally.op("avgpool", "global_avg_pool", "none", last)
        tally.classify(last)

    def of_block(self, block: Block) -> None:
        tally = self.tally
        convs = {f"conv{index}": conv for index, conv in enumerate(block.convs, 1)}
        for layer, conv in (convs | ({"downsample": block.projection} if block.projection else {})).items():
            sizes = tally.around(conv)
            sizes["residual"] = sizes["z"]
            variant = "plain" if conv is block.convs[-1] else "none"
            tally.op(layer, "conv_bias_act", variant, sizes, traffic.flop(conv))


class WholeBlocks(Convs):
    """A block reads its input and writes its output."""

    def of_block(self, block: Block) -> None:
        tally = self.tally
        convs = [*block.convs, *([block.projection] if block.projection else [])]
        weights = sum(tally.around(conv)["weight"].values for conv in convs)
        sizes = {
            "x": tally.around(block.convs[0])["x"],
            "z": tally.around(block.convs[-1])["z"],
            "weights": Full("weights", weights, ITEMSIZE[tally.dtype], PARAMETER),
        }
        tally.other("block", "block", "x weights", "z", sizes, sum(map(traffic.flop, convs)))
