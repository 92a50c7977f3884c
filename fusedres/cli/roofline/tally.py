"""Passes of a level, each with the layer that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fusedres.cli.roofline.nets import Net
from fusedres.plan import Conv, traffic
from fusedres.plan.conv import ITEMSIZE
from fusedres.plan.traffic import PARAMETER, Full, Pass

STEM, HEAD, STEP = "stem", "head", "parameters"
Sizes = Mapping[str, Full]


class Placed(NamedTuple):
    """A pass, and where: the block's name, the layer in it, forward or backward."""

    block: str
    layer: str
    backward: bool
    work: Pass


class Tally:
    """Collects the passes of one level.

    Args:
        net: whose.
        dtype: of activations.
    """

    def __init__(self, net: Net, dtype: str) -> None:
        self.net, self.dtype = net, dtype
        self.passes: list[Placed] = []
        self.block, self.backward = STEM, False

    def op(self, layer: str, op: str, variant: str, sizes: Sizes, flop: int = 0) -> None:
        """One of this package's ops, by its contract."""
        self._add(layer, traffic.moved(op, variant, sizes, flop))

    def other(self, layer: str, op: str, reads: str, writes: str, sizes: Sizes, flop: int = 0) -> None:
        """Any other operator, by the names of what it reads and writes."""
        self._add(layer, traffic.named(op, reads, writes, sizes, flop))

    def _add(self, layer: str, work: Pass) -> None:
        self.passes.append(Placed(self.block, layer, self.backward, work))

    def around(self, conv: Conv) -> dict[str, Full]:
        return traffic.around(conv, self.dtype)

    def like(self, values: int, *names: str) -> dict[str, Full]:
        return traffic.activations(values, self.dtype, *names)

    @property
    def converts(self) -> bool:
        """Whether images and weights are float32 and converted."""
        return self.dtype != "float32"

    def image(self) -> Sizes:
        """Of the stem's convolution; the images are cast first where they have to be."""
        stem = self.net.stem
        sizes = {
            **self.around(stem),
            **traffic.images(stem, self.dtype),
            **traffic.pooled(stem.out_shape, self.dtype),
        }
        # of max_pool2d_with_indices
        sizes["index64"] = sizes["index"]._replace(name="index", itemsize=8)
        return sizes

    def cast_image(self, sizes: Sizes) -> None:
        if self.converts:
            self.other("conv1", "cast_images", "image", "cast", sizes)

    def last(self) -> dict[str, Full]:
        """Around the pool over whole images, and the classifier."""
        n, net = self.net.stem.batch, self.net
        values = self.around(net.blocks[-1].convs[-1])["y"].values
        weights = net.features * net.classes
        return {
            **self.like(values, "x", "dx"),
            **self.like(n * net.features, "means", "dmeans"),
            **self.like(n * net.classes, "logits", "dlogits"),
            **{name: Full(name, weights, ITEMSIZE[self.dtype], PARAMETER) for name in ("weight", "dweight")},
        }

    def classify(self, sizes: Sizes) -> None:
        flop = 2 * self.net.stem.batch * sizes["weight"].values
        if not self.backward:
            self.other("fc", "linear", "means weight", "logits", sizes, flop)
            return
        self.other("fc", "linear_dgrad", "dlogits weight", "dmeans", sizes, flop)
        self.other("fc", "linear_wgrad", "dlogits means", "dweight", sizes, flop)

    def step(self) -> None:
        """Weights cast, their gradients cast back, and SGD with momentum in one pass."""
        self.block = STEP
        names = {"weights": "float32", "gradients": "float32", "momentum": "float32"}
        names |= {"casts": self.dtype, "dcasts": self.dtype}
        sizes = {n: Full(n, self.net.weights, ITEMSIZE[dtype], PARAMETER) for n, dtype in names.items()}
        if self.converts:
            self.op("weights", "cast_weights", "none", sizes)
            self.other("weights", "cast_gradients", "dcasts", "gradients", sizes)
        self.other("weights", "sgd", "weights gradients momentum", "weights momentum", sizes)
