"""Training without this package: eager PyTorch, and what a compiler makes of it; and eager inference."""

from __future__ import annotations

from fusedres.cli.roofline.nets import Block
from fusedres.cli.roofline.tally import HEAD, STEM, Sizes, Tally
from fusedres.plan import Conv, traffic


class Eager:
    """PyTorch's operators, one after another, in the order and in place as in torchvision's blocks."""

    def __init__(self, tally: Tally, training: bool) -> None:
        self.tally, self.training = tally, training

    def forward(self) -> None:
        tally = self.tally
        sizes = tally.image()
        tally.cast_image(sizes)
        self._conv("conv1", tally.net.stem, sizes)
        self.stem(sizes)
        for block in tally.net.blocks:
            tally.block = block.name
            for index, conv in enumerate(block.convs, 1):
                self._conv(f"conv{index}", conv, tally.around(conv))
                if index < len(block.convs):
                    self.activate(f"conv{index}", tally.around(conv), "none")
            if block.projection is not None:
                self._conv("downsample", block.projection, tally.around(block.projection))
            self.end(block)
        tally.block = HEAD
        last = tally.last()
        tally.op("avgpool", "global_avg_pool", "none", last)
        tally.classify(last)

    def _conv(self, layer: str, conv: Conv, sizes: Sizes) -> None:
        self.tally.other(layer, "convolution", "x weight", "y", sizes, traffic.flop(conv))

    def norm(self, layer: str, sizes: Sizes) -> None:
        """In training the statistics come first, then the values."""
        self.tally.other(layer, "batch_norm", "y y" if self.training else "y", "z", sizes)

    def activate(self, layer: str, sizes: Sizes, shortcut: str) -> None:
        self.norm(layer, sizes)
        if shortcut != "none":
            self.tally.other(layer, "add_", "z residual", "z", sizes)
        self.tally.other(layer, "relu_", "z", "z", sizes)

    def stem(self, sizes: Sizes) -> None:
        self.activate("conv1", sizes, "none")
        index = " index64" if self.training else ""
        self.tally.other("maxpool", "max_pool", "z", f"pooled{index}", sizes)

    def end(self, block: Block) -> None:
        if block.projection is not None:
            self.norm("downsample", self.tally.around(block.projection))
        self.activate(f"conv{len(block.convs)}", self.around_end(block), shortcut_of(block))

    def around_end(self, block: Block) -> Sizes:
        """Of a block's last convolution, with the shortcut's tensors."""
        sizes = self.tally.around(block.convs[-1])
        more = ("residual", "grad", "dresidual")
        return {**sizes, **self.tally.like(sizes["y"].values, *more)}

    def backward(self) -> None:
        tally = self.tally
        tally.backward, tally.block = True, HEAD
        last = tally.last()
        tally.classify(last)
        tally.op("avgpool", "global_avg_pool_backward", "none", last)
        for block in reversed(tally.net.blocks):
            tally.block = block.name
            self.block_backward(block, last=block is tally.net.blocks[-1])
        tally.block = STEM
        self.stem_backward({**tally.image(), **self._grad(tally.net.stem)})

    def _grad(self, conv: Conv) -> Sizes:
        return self.tally.like(self.tally.around(conv)["y"].values, "grad")

    def block_backward(self, block: Block, last: bool) -> None:
        names = [f"conv{index}" for index in range(1, len(block.convs) + 1)]
        for name, conv in list(zip(names, block.convs, strict=True))[::-1]:
            sizes = {**self.tally.around(conv), **self._grad(conv)}
            self.tally.other(name, "threshold_backward", "grad z", "du", sizes)
            self.norm_backward(name, sizes)
            self.conv_backward(name, conv)
        if block.projection is not None:
            self.norm_backward("downsample", self.tally.around(block.projection))
            self.conv_backward("downsample", block.projection)
        self.tally.other("conv1", "add", "dx add", "dx", self.tally.around(block.convs[0]))

    def norm_backward(self, layer: str, sizes: Sizes) -> None:
        self.tally.other(layer, "batch_norm_backward", "du y du y", "dy", sizes)

    def conv_backward(self, layer: str, conv: Conv) -> None:
        sizes, flop = self.tally.around(conv), traffic.flop(conv)
        self.tally.other(layer, "convolution_dgrad", "dy weight", "dx", sizes, flop)
        self.tally.other(layer, "convolution_wgrad", "dy x", "dweight", sizes, flop)

    def stem_backward(self, sizes: Sizes) -> None:
        tally = self.tally
        tally.other("maxpool", "max_pool_backward", "dpooled index64", "grad", sizes)
        tally.other("conv1", "threshold_backward", "grad z", "du", sizes)
        self.norm_backward("conv1", sizes)
        tally.other("conv1", "convolution_wgrad", "dy x", "dweight", sizes, traffic.flop(tally.net.stem))


class Compiled(Eager):
    """Pointwise operators in one pass with each other and with the reduction behind them."""

    def norm(self, layer: str, sizes: Sizes) -> None:
        self.tally.other(layer, "statistics", "y", "", sizes)

    def activate(self, layer: str, sizes: Sizes, shortcut: str) -> None:
        self.norm(layer, sizes)
        reads = "y" if shortcut == "none" else "y residual"
        self.tally.other(layer, "norm + relu", reads, "z", sizes)

    def stem(self, sizes: Sizes) -> None:
        self.norm("conv1", sizes)
        self.tally.other("maxpool", "norm + relu + max_pool", "y", "pooled index", sizes)

    def block_backward(self, block: Block, last: bool) -> None:
        """The gradients of both ways are added where they are read."""
        projection = block.projection
        branch = "" if projection is None else " residual"
        end = {**self.around_end(block), **self.tally.like(self._grad(block.convs[-1])["grad"].values, "add")}
        name = f"conv{len(block.convs)}"
        grads = "grad" if last else "grad add"
        self.tally.other(name, "relu + norm backward, reduce", f"{grads} z y{branch}", "du", end)
        self.tally.other(name, "norm backward, apply", "du y", "dy", end)
        if projection is not None:
            self.tally.other(
                "downsample", "norm backward, apply", "du y", "dy", self.tally.around(projection)
            )
        for index in range(len(block.convs), 0, -1):
            conv = block.convs[index - 1]
            if index < len(block.convs):
                sizes = {**self.tally.around(conv), **self._grad(conv)}
                self.tally.other(f"conv{index}", "relu + norm backward, reduce", "grad z y", "", sizes)
                self.tally.other(f"conv{index}", "relu + norm backward, apply", "grad z y", "dy", sizes)
            self.conv_backward(f"conv{index}", conv)
        if projection is not None:
            self.conv_backward("downsample", projection)

    def stem_backward(self, sizes: Sizes) -> None:
        tally = self.tally
        # the pool's inputs get what both ways of the first block give
        tally.other("maxpool", "pool + relu + norm backward, reduce", "dpooled dpooled index y", "", sizes)
        tally.other("maxpool", "pool + relu + norm backward, apply", "dpooled dpooled index y", "dy", sizes)
        tally.other("conv1", "convolution_wgrad", "dy x", "dweight", sizes, traffic.flop(tally.net.stem))


def shortcut_of(block: Block) -> str:
    return "plain" if block.projection is None else "normalised"
