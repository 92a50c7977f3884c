"""What a training forward keeps for its backward, beside parameters, their casts and the input image."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres import kernels
from fusedres.kernels.rows import pixels_shape
from fusedres.nn import FrozenBatchNorm2d

# of torchvision's, 224 px, bf16
LARGEST_SHARE = {"resnet18": 0.62, "resnet50": 0.78}


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of distinct memory among the saved tensors."""
    shapes = {tuple(p.shape) for p in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}
    n, _, height, width = images.shape
    image = (tuple(images.shape), pixels_shape(n, height, width))  # as it came, and as the stem packs it
    found: dict[int, int] = {}
    kept = []

    def pack(t: Tensor) -> Tensor:
        if tuple(t.shape) not in shapes and tuple(t.shape) not in image:
            found[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        kept.append(t)  # so that no other tensor gets its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(images)
    return sum(found.values())


def in_16_bits(model: nn.Module) -> nn.Module:
    """As autocast computes: batch norm's parameters and statistics stay float32."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.bfloat16()
    return model


@pytest.mark.parametrize("name", LARGEST_SHARE)
def test_saved_activations(name):
    models = pytest.importorskip("torchvision", exc_type=ImportError).models
    with torch.device("meta"):
        images = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16)
        theirs = saved_bytes(in_16_bits(getattr(models, name)()), images)
        with fusedres.backend("reference"):
            ours = saved_bytes(in_16_bits(getattr(fusedres, name)()), images)
    assert ours <= LARGEST_SHARE[name] * theirs, f"{ours / theirs:.4f}"
    # and no less: it would be a forward that keeps too little
    assert ours >= 0.95 * LARGEST_SHARE[name] * theirs


@pytest.mark.parametrize("name", LARGEST_SHARE)
def test_saved_activations_with_fixed_batch_norms(name):
    """No more than torchvision's, which keeps the activations behind its fixed batch norms alone."""
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    with torch.device("meta"):
        images = torch.empty(2, 3, 224, 224)
        frozen = torchvision.ops.FrozenBatchNorm2d
        theirs = saved_bytes(getattr(torchvision.models, name)(norm_layer=frozen), images)
        with fusedres.backend("reference"):
            ours = saved_bytes(getattr(fusedres, name)(norm_layer=FrozenBatchNorm2d), images)
    assert ours <= theirs, f"{ours / theirs:.4f}"


@pytest.mark.skipif("cpu" in kernels.unavailable(), reason="the compiled module is not built")
@pytest.mark.parametrize("name", LARGEST_SHARE)
def test_a_real_forward_keeps_what_one_on_shapes_does(name):
    model = getattr(fusedres, name)()
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with fusedres.backend("cpu"):
        real = saved_bytes(copy.deepcopy(model), images)
    with fusedres.backend("reference"):
        assert saved_bytes(model.to("meta"), images.to("meta")) == real
