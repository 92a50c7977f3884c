"""Whole training steps and trained nets by the emulated CUDA kernels."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from bn_case import DTYPES, Case
from emulation import build
from fused_ops import FusedOps
from test_inference import check, seasoned
from tolerances import assert_close_to_reference
from torch import Tensor, nn

import fusedres
from fusedres import plan
from fusedres.models.resnet import ResNet
from fusedres.nn import BasicBlock, Bottleneck

pytestmark = [
    pytest.mark.skipif(bool(build.unavailable()), reason=build.unavailable()),
    pytest.mark.skipif(
        not build.is_set(), reason="needs the environment that tests/emulation/build.py --env prints"
    ),
]


@pytest.fixture
def cuda() -> Iterator[None]:
    from emulation.cuda_on_cpu import cuda_on_cpu, module

    module().preempt(False)  # whole networks: the schedules are test_kernels.py's
    # their convolutions are too large for the emulation: blocks with them are in their own tests
    without_convolutions = plan.OPS["cuda"] - set(plan.CONV_OPS)
    with mock.patch.dict(plan.OPS, {"cuda": without_convolutions}), cuda_on_cpu():
        yield
    module().preempt(True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_bn_act(cuda, dtype, layout, poisoned):
    for relu, training, branch in itertools.product([True, False], [True, False], [None, True, False]):
        for shape in ((2, 20, 5, 7), (3, 64, 4, 4)):
            settings = {"relu": relu, "training": training}
            Case(shape, dtype, layout, residual=True, branch=branch, **settings).check()
            Case(shape, dtype, layout, residual=False, **settings).check()


def test_nothing_at_all(cuda):
    """An empty batch launches nothing; statistics of it are left alone."""
    from emulation.cuda_on_cpu import module

    module().reset()
    x = torch.randn(0, 16, 8, 8, requires_grad=True)
    parameters = torch.ones(16), torch.zeros(16)
    statistics = torch.zeros(16), torch.ones(16)
    pooled = fusedres.functional.bn_relu_maxpool(x, *parameters, *statistics, training=True)
    z = fusedres.functional.bn_act(pooled, *parameters, *statistics, residual=pooled, training=True)
    out = fusedres.functional.global_avg_pool(z)
    out.sum().backward()
    assert torch.ops.fusedres.bias_relu_maxpool(x.detach(), statistics[0]).shape == (0, 16, 4, 4)
    assert out.shape == (0, 16, 1, 1) and x.grad.shape == x.shape
    assert torch.equal(statistics[0], torch.zeros(16)) and torch.equal(statistics[1], torch.ones(16))
    assert module().launches() == []
    with pytest.raises(ValueError, match="an activation must not be empty"):
        module().cuda_bn_stats("float32", 0, 16, 8, 0, 0, 1e-5, 8, 8, 2, 0)


def step(model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss, gradients and buffers of a training step in ``dtype``: by autocast in bfloat16."""
    model = copy.deepcopy(model).train()
    wide = dtype if dtype == torch.float64 else torch.float32
    model.to(wide, memory_format=torch.channels_last)
    x = x.to(wide, memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(x)
    loss = F.cross_entropy(logits.to(wide), target)
    loss.backward()
    results = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}
    return results | {n: b for n, b in model.named_buffers() if b.is_floating_point()}


class ShortResNet(ResNet):
    """A ResNet-50 of one block a stage."""

    block = Bottleneck
    depths = (1, 1, 1, 1)


NETS = {
    "resnet18": lambda: fusedres.resnet18(num_classes=10),
    "bottlenecks": lambda: ShortResNet(num_classes=10),
    "cifar": lambda: fusedres.CifarResNet(8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_training_step(cuda, name, dtype, monkeypatch):
    """In 16 bits the stem, too; in float32 it would multiply as TF32."""
    model = NETS[name]()
    stems = plan.STEM_OPS if dtype == torch.bfloat16 else ()
    monkeypatch.setitem(plan.OPS, "cuda", plan.OPS["cuda"] - (set(plan.CONVOLUTIONS) - set(stems)))
    x, target = torch.randn(3, 3, 48, 48), torch.tensor([1, 5, 9])
    with FusedOps() as seen:
        ours = step(model, x, target, dtype)
    projections = 0 if name == "cifar" else sum("downsample.1.weight" in n for n in ours)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    stem = name != "cifar"
    assert seen.batch_norms == norms
    # between a block's convolutions, and again on the way back
    inner = sum(len(m.pairs) - 1 for m in model.modules() if isinstance(m, BasicBlock | Bottleneck))
    expected = Counter(
        bn_update_running_=norms,
        # a projection's batch norm goes with the one at the end of its block
        bn_act=norms - projections - stem + inner,
        stem_conv=int(stem and dtype == torch.bfloat16),
        stem_wgrad=int(stem and dtype == torch.bfloat16),
        global_avg_pool=1,
        global_avg_pool_backward=1,
        bn_relu_maxpool=int(stem),
        bn_relu_maxpool_backward_reduce=int(stem),
        bn_relu_maxpool_backward_apply=int(stem),
        cast_weights=int(dtype == torch.bfloat16),
    )
    assert {op: seen.calls[op] for op in expected} == dict(expected)
    with pytest.MonkeyPatch.context() as patch:
        # the same modules child by child, as torchvision's
        for module in ("nn.fuse", "nn.blocks"):
            patch.setattr(f"fusedres.{module}.unfused_reason", lambda *_: "told so", raising=False)
        with fusedres.backend("reference"):
            theirs, reference = step(model, x, target, dtype), step(model, x, target, torch.float64)
    # two runs of a network round differently layer after layer: as far from the truth as PyTorch's, and as
    # many roundings of the largest value
    roundings = 30 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    for key, value in ours.items():
        # a mean is a sum of normalised values, however small it is
        size = max(reference[key].abs().max().item(), 1.0 if "running" in key else 0.0)
        terms = roundings * size
        assert_close_to_reference(value, theirs[key], reference[key], terms=terms, name=key)


class TwoOfAStage(ResNet):
    """A ResNet-50 of two blocks in the stages that have blocks in one launch."""

    block = Bottleneck
    depths = (2, 2, 1, 1)


def test_trained_net(cuda):
    """Every convolution is ours, and the second blocks of the first two stages are one launch each."""
    dtype, whole = torch.bfloat16, 2
    model = seasoned(TwoOfAStage(num_classes=10))
    x = torch.randn(1, 3, 32, 32)
    optimised = fusedres.optimize_for_inference(model, dtype)
    with FusedOps() as seen:
        optimised(x)
    check(model, x, dtype, optimised)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules()) - 1
    assert seen.calls["stem_bias_act"] == 1 and not seen.calls["bias_relu_maxpool"]
    assert seen.calls["bottleneck_infer"] == whole
    assert seen.calls["conv_bias_act"] == convolutions - 3 * whole
