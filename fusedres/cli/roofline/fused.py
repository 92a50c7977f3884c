"""Training with this package's ops: what blocks run, and what would be left if more were fused."""

from __future__ import annotations

from fusedres.cli.roofline.nets import Block
from fusedres.cli.roofline.tally import HEAD, STEM, Sizes, Tally
from fusedres.cli.roofline.unfused import shortcut_of
from fusedres.plan import Conv, traffic


class Blocks:
    """Each block one Function: every convolution with the batch norms on both sides in its pass.

    With ``separate`` the backward of every batch norm writes its gradient, which both convolutions read.
    """

    def __init__(self, tally: Tally, separate: bool = False) -> None:
        self.tally, self.separate = tally, separate

    def forward(self) -> None:
        tally = self.tally
        sizes = tally.image()
        tally.op("conv1", "stem_conv", "none", sizes, traffic.flop(tally.net.stem))
        tally.op("maxpool", "bn_relu_maxpool", "none", {**sizes, "x": sizes["y"]})
        for index, block in enumerate(tally.net.blocks):
            tally.block = block.name
            self.block_forward(block, tally.net.blocks[index - 1] if index else None)
        tally.block = HEAD
        self.pool()
        tally.classify(tally.last())

    def backward(self) -> None:
        tally = self.tally
        tally.block, tally.backward = HEAD, True
        tally.classify(tally.last())
        self.pool_backward()
        blocks = tally.net.blocks
        for index in range(len(blocks) - 1, -1, -1):
            tally.block = blocks[index].name
            self.block_backward(blocks[index], blocks[index - 1] if index else None)
        tally.block = STEM
        sizes = tally.image()
        stem = {**sizes, "x": sizes["y"], "dx": sizes["dy"]}
        tally.op("maxpool", "bn_relu_maxpool_backward_reduce", "none", stem)
        tally.op("maxpool", "bn_relu_maxpool_backward_apply", "none", stem)
        tally.op("conv1", "stem_wgrad", "none", sizes, traffic.flop(tally.net.stem))

    def pool(self) -> None:
        self.tally.op("avgpool", "global_avg_pool", "none", self.tally.last())

    def pool_backward(self) -> None:
        self.tally.op("avgpool", "global_avg_pool_backward", "none", self.tally.last())

    def conv(self, layer: str, op: str, variant: str, conv: Conv, sizes: Sizes | None = None) -> None:
        self.tally.op(layer, op, variant, sizes or self.tally.around(conv), traffic.flop(conv))

    def end(self, block: Block) -> Sizes:
        """Tensors around the end of a block, all of one size."""
        values = self.tally.around(block.convs[-1])["y"].values
        names = ("x", "residual", "z", "grad", "du", "dx", "dresidual")
        return self.tally.like(values, *names)

    def block_forward(self, block: Block, before: Block | None) -> None:
        for index, conv in enumerate(block.convs, 1):
            self.conv(f"conv{index}", "conv_fwd", "inner" if index > 1 else "first", conv)
        if block.projection is not None:
            self.conv("downsample", "conv_fwd", "projection", block.projection)
        self.tally.op(f"conv{len(block.convs)}", "bn_act", shortcut_of(block), self.end(block))

    def block_backward(self, block: Block, before: Block | None) -> None:
        last, end = f"conv{len(block.convs)}", self.end(block)
        self.tally.op(last, "bn_act_backward_reduce", shortcut_of(block), end)
        if self.separate:
            self.tally.op(last, "bn_act_backward_apply", shortcut_of(block), end)
        if block.projection is not None:
            self._gradients("downsample", "projection", block.projection, self._through(block.projection))
        for index in range(len(block.convs), 0, -1):
            conv, sizes = block.convs[index - 1], self.tally.around(block.convs[index - 1])
            if self.separate and index < len(block.convs):
                of_norm = {**sizes, "x": sizes["y"], "dx": sizes["dy"]}
                self.tally.op(f"conv{index}", "bn_act_backward_apply", "none", of_norm)
            if index == 1:
                sizes = {**sizes, "add": self._added(block)}
            self._gradients(f"conv{index}", "inner" if index > 1 else "first", conv, sizes)

    def _gradients(self, layer: str, variant: str, conv: Conv, sizes: Sizes) -> None:
        if not self.separate:
            self.conv(layer, "conv_wgrad", variant, conv, sizes)
            self.conv(layer, "conv_dgrad", variant, conv, sizes)
            return
        more = {"inner": " x", "first": " add", "projection": ""}[variant]
        flop = traffic.flop(conv)
        self.tally.other(layer, "convolution_wgrad", "dy x", "dweight", sizes, flop)
        self.tally.other(layer, "convolution_dgrad", f"dy weight{more}", "dx", sizes, flop)

    def _through(self, projection: Conv) -> Sizes:
        """Around a projection, whose gradient is that of the pixels it saw."""
        sizes = self.tally.around(projection)
        return {**sizes, "dx": sizes["x"]._replace(name="dx")}

    def _added(self, block: Block) -> traffic.Full:
        """What the shortcut adds to the gradient of a block's input."""
        if block.projection is None:
            return self.tally.around(block.convs[0])["add"]
        return self._through(block.projection)["dx"]._replace(name="add")


class Across(Blocks):
    """A block's output is made by the convolution, or the pool, that reads it, and its gradient likewise."""

    def block_forward(self, block: Block, before: Block | None) -> None:
        for index, conv in enumerate(block.convs, 1):
            if index == 1 and before is not None:
                sizes = self.tally.around(conv)
                made = {**sizes, "residual": sizes["x"], "z": sizes["x"]._replace(name="z")}
                self.conv("conv1", "conv_fwd", "residual", conv, made)
            else:
                self.conv(f"conv{index}", "conv_fwd", "inner" if index > 1 else "first", conv)
        if block.projection is not None:
            self.conv("downsample", "conv_fwd", "projection", block.projection)

    def pool(self) -> None:
        sizes = {**self.end(self.tally.net.blocks[-1]), **self.tally.last()}
        self.tally.other("avgpool", "pool of a pending output", "x residual", "z means", sizes)

    def pool_backward(self) -> None:
        last = self.tally.net.blocks[-1]
        sizes = {**self.end(last), **self.tally.last()}
        raw = "x" if last.projection is None else "x residual"
        self.tally.other("avgpool", "pool and ReLU backward, sums", f"dmeans z {raw}", "du", sizes)

    def block_backward(self, block: Block, before: Block | None) -> None:
        if block.projection is not None:
            self._gradients("downsample", "projection", block.projection, self._through(block.projection))
        for index in range(len(block.convs), 1, -1):
            conv = block.convs[index - 1]
            self._gradients(f"conv{index}", "inner", conv, self.tally.around(conv))
        conv, sizes = block.convs[0], {**self.tally.around(block.convs[0]), "add": self._added(block)}
        if before is None:
            self._gradients("conv1", "first", conv, sizes)
            return
        self.conv("conv1", "conv_wgrad", "first", conv, sizes)
        raw = self.raw(before)
        reads = " ".join(("du y weight add mask", *raw))
        sizes |= {"mask": sizes["dx"], **raw}
        self.tally.other("conv1", "dgrad across blocks", reads, "dx", sizes, traffic.flop(conv))

    def raw(self, block: Block) -> dict[str, traffic.Full]:
        """The raw outputs that a block's output is made of, which the sums of its batch norms need."""
        names = ("raw",) if block.projection is None else ("raw", "raw_branch")
        return self.tally.like(self.tally.around(block.convs[-1])["y"].values, *names)


class Joint(Across):
    """The gradients of input and weight from one reading of what both need; a block's input has one pass."""

    def block_backward(self, block: Block, before: Block | None) -> None:
        tally = self.tally
        for index in range(len(block.convs), 1, -1):
            conv = block.convs[index - 1]
            sizes, flop = tally.around(conv), 2 * traffic.flop(conv)
            tally.other(f"conv{index}", "dgrad + wgrad", "du y weight x", "dx dweight", sizes, flop)
        conv = block.convs[0]
        sizes, flop = dict(tally.around(conv)), 2 * traffic.flop(conv)
        reads, writes = "du y weight x", "dx dweight"
        if block.projection is None:
            reads += " add"
        else:
            branch = tally.around(block.projection)
            sizes |= {f"branch_{name}": branch[name] for name in ("du", "y", "weight", "dweight")}
            reads, writes = f"{reads} branch_du branch_y branch_weight", f"{writes} branch_dweight"
            flop += 2 * traffic.flop(block.projection)
        if before is not None:  # whose ReLU's mask is in x
            raw = self.raw(before)
            sizes |= raw
            reads = " ".join((reads, *raw))
        tally.other("conv1", "dgrad + wgrad of a block's input", reads, writes, sizes, flop)
