"""Trunks, and fixed batch norms; needs no torchvision."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fused_ops import FusedOps
from torch import nn

import fusedres
from fusedres import detection
from fusedres.detection import Trunk
from fusedres.nn import BasicBlock, Bottleneck, FrozenBatchNorm2d, unfused_block_reason


def frozen(channels: int, dtype: torch.dtype = torch.float32) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels)
    for name, buffer in norm.named_buffers():
        nn.init.uniform_(buffer, *((0.5, 2) if name == "running_var" else (-1, 1)))
    return norm.to(dtype)


NETS = {
    "resnet18": (lambda: fusedres.ResNet18(), {"layer1": (64, 4), "layer4": (512, 32)}),
    "dilated": (
        lambda: fusedres.ResNet50(replace_stride_with_dilation=[False, True, True]),
        {"layer3": (1024, 8), "layer4": (2048, 8)},
    ),
    "v1": (lambda: fusedres.ResNet50(variant="v1"), {"layer2": (512, 8), "layer3": (1024, 16)}),
    "cifar": (lambda: fusedres.CifarResNet(8), {"layer1": (16, 1), "layer2": (32, 2), "layer3": (64, 4)}),
    "plain": (lambda: fusedres.PlainNet18(), {"layer3": (256, 16)}),
}


@pytest.mark.parametrize("name", NETS)
def test_outputs(name):
    make, expected = NETS[name]
    net = make().eval()
    trunk = Trunk(net, {stage: f"of {stage}" for stage in expected})
    assert trunk.channels == {f"of {stage}": channels for stage, (channels, _) in expected.items()}
    assert trunk.strides == {f"of {stage}": stride for stage, (_, stride) in expected.items()}
    assert trunk.out_channels == list(expected.values())[-1][0]
    x = torch.randn(2, 3, 50, 34)
    outputs = {}
    for stage in expected:
        getattr(net, stage).register_forward_hook(
            lambda module, args, out, stage=stage: outputs.__setitem__(f"of {stage}", out)
        )
    with torch.no_grad():
        net(x)
        found = trunk(x)
    assert list(found) == [f"of {stage}" for stage in expected]
    torch.testing.assert_close(dict(found), outputs)
    for key, y in found.items():
        size = [-(-side // trunk.strides[key]) for side in (50, 34)]
        assert list(y.shape) == [2, trunk.channels[key], *size]


def test_ends_with_the_last_stage_that_is_asked_for():
    net = fusedres.ResNet18()
    trunk = Trunk(net, {"layer2": "out"})
    assert [name for name, _ in trunk.named_children()] == [
        "conv1",
        "bn1",
        "relu",
        "maxpool",
        "layer1",
        "layer2",
    ]
    assert trunk.layer2 is net.layer2
    state = net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in trunk.state_dict().items())


def test_traced_and_compiled():
    trunk = Trunk(fusedres.CifarResNet(8), {"layer2": "a", "layer3": "b"}).eval()
    x = torch.randn(1, 3, 16, 16)
    expected = dict(trunk(x))
    traced = torch.fx.symbolic_trace(trunk)
    torch.testing.assert_close(dict(traced(x)), expected)
    compiled = torch.compile(trunk, backend="eager", fullgraph=True)
    torch.testing.assert_close(dict(compiled(x)), expected)


@pytest.mark.parametrize(
    ("net", "layers", "message"),
    [
        (fusedres.CifarResNet, {"layer4": "out"}, "must name some of layer1, layer2, layer3 of the net, got"),
        (fusedres.CifarResNet, {}, "return_layers must name some of"),
        (
            lambda depth: nn.Sequential(nn.Conv2d(3, 3, 1)),
            {"layer1": "x"},
            "net must have children .*Sequential",
        ),
    ],
)
def test_wrong_arguments(net, layers, message):
    with pytest.raises(ValueError, match=message):
        Trunk(net(8), layers)


def test_fixed_batch_norm_is_a_batch_norm_in_eval_mode():
    norm = frozen(4, torch.float64)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    for mode in (True, False):
        torch.testing.assert_close(norm.train(mode)(x), expected)
    assert torch.autograd.gradcheck(norm, (x,))
    assert not list(norm.parameters())


def test_fixed_batch_norm_loads_a_batch_norm():
    norm = nn.BatchNorm2d(4)
    norm(torch.randn(2, 4, 3, 3))
    fixed = FrozenBatchNorm2d(4)
    fixed.load_state_dict(norm.state_dict())
    assert list(fixed.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(fixed(x), norm.eval()(x))
    assert fixed(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])
def test_a_block_with_fixed_batch_norms_is_one_function(bottleneck, dtype):
    """The gradient goes through to the input and the weights; statistics, scale and shift stay."""
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), frozen(16))
    block = (Bottleneck(8, 4, 2, downsample) if bottleneck else BasicBlock(8, 16, 2, downsample)).to(dtype)
    for name, child in list(block.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(block, name, frozen(child.num_features, dtype))
    assert unfused_block_reason(block) is None
    before = {key: value.clone() for key, value in block.named_buffers()}
    x = torch.randn(2, 8, 6, 6, dtype=dtype, requires_grad=True)
    with fusedres.backend("reference"), FusedOps() as ops:
        out = block.train()(x)
        out.square().sum().backward()
    assert "Fused" in type(out.grad_fn).__name__
    assert ops.calls["bn_running_stats"] == len(before) // 4 and not ops.calls["bn_update_running_"]
    found = [x.grad, *(p.grad for p in block.parameters())]
    x.grad = None
    block.zero_grad()
    block.conv1.register_forward_hook(lambda *_: None)  # child by child
    for child in block.modules():
        if isinstance(child, FrozenBatchNorm2d):
            child.register_forward_hook(lambda *_: None)
    expected = block(x)
    torch.testing.assert_close(out, expected)
    expected.square().sum().backward()
    for mine, other in zip(found, [x.grad, *(p.grad for p in block.parameters())], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(block.named_buffers()), before, rtol=0, atol=0)


def test_fixed_batch_norm_in_an_optimised_net():
    net = fusedres.ResNet18(num_classes=5, norm_layer=FrozenBatchNorm2d).eval()
    for norm in [m for m in net.modules() if isinstance(m, FrozenBatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.2, 0.6)
    x = torch.randn(2, 3, 64, 64)
    fast = fusedres.optimize_for_inference(net)
    assert not [m for m in fast.modules() if isinstance(m, FrozenBatchNorm2d)]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-3, atol=1e-3)


def test_fixed_batch_norm_explained():
    table = fusedres.explain(
        fusedres.resnet18(norm_layer=FrozenBatchNorm2d), (16, 3, 224, 224), torch.bfloat16
    )
    steps = [step for step in table if step.layer == "layer1.0.bn1"]
    assert steps and all(step.implementation != "aten" or "promotes" not in step.reason for step in steps)


def test_torchvision_is_named_where_it_is_missing(monkeypatch):
    for name in ("models.detection", "models.segmentation", "ops"):
        monkeypatch.setitem(sys.modules, f"torchvision.{name}", None)
    for function in ("faster_rcnn_fpn", "faster_rcnn_c4", "mask_rcnn_fpn", "deeplabv3"):
        with pytest.raises(ImportError, match="detectors need torchvision: pip install torchvision"):
            getattr(detection, function)()


def test_importing_needs_no_torchvision():
    code = "import sys; from fusedres import detection; print('torchvision' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
