"""fusedres.explain: every layer, and what runs it."""

from __future__ import annotations

import re
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import nn

import fusedres
from fusedres import kernels, ops, plan

COMPILED = "cpu" not in kernels.unavailable()


def of(explanation, layer):
    return [step for step in explanation if step.layer == layer]


def test_a_fused_convolution_has_its_batch_norms_inside():
    with fusedres.backend("reference"):
        table = fusedres.explain(fusedres.resnet18(), (2, 3, 64, 64))
    steps = [(s.layer, s.op, s.reason) for s in table if s.layer.startswith("layer1.0")]
    assert steps == [
        ("layer1.0.conv1", "conv_fwd", "forced"),
        ("layer1.0.bn1", "bn_stats", "inside layer1.0.conv1"),
        ("layer1.0.bn1", "bn_act", "inside layer1.0.conv2"),
        ("layer1.0.conv2", "conv_fwd", "forced"),
        ("layer1.0.bn2", "bn_stats", "inside layer1.0.conv2"),
        ("layer1.0.bn2", "bn_act", "forced"),
    ]


@pytest.mark.skipif(not COMPILED, reason="the compiled module is not built")
def test_every_layer_of_a_training_forward():
    model = fusedres.resnet50()
    table = fusedres.explain(model, (64, 3, 224, 224), torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert [s.op for s in of(table, name)] == ["convolution"], name
        if isinstance(module, nn.BatchNorm2d):
            ops = [s.op for s in of(table, name)]
            # a projection's batch norm is applied with the one at the end of its block
            last = {"bn1": "bn_relu_maxpool"}.get(name, "bn_act")
            assert ops == (["bn_stats"] if "downsample" in name else ["bn_stats", last]), name
    assert {s.implementation for s in table if s.op.startswith("bn_")} == {"cpu"}
    stem = of(table, "bn1")[1]
    assert stem.shape == (64, 64, 112, 112) and "first choice on cpu" in stem.reason
    lines = str(table).splitlines()
    assert len(lines) == len(table) + 1 and lines[0].split()[:2] == ["layer", "op"]
    # nothing was run on the model itself
    assert not model.bn1.num_batches_tracked and model.conv1.weight.device.type == "cpu"


def test_what_runs_is_what_is_explained():
    """The same ops in the same order as a real forward calls."""
    from fused_ops import FusedOps

    model = fusedres.CifarResNet(8, shortcut="B")
    with fusedres.backend("reference"):
        table = fusedres.explain(model, (2, 3, 32, 32))
        with FusedOps() as seen:
            model(torch.zeros(2, 3, 32, 32))
    ours = [
        s.op for s in table if s.implementation == "reference" and not s.reason.startswith("inside layer")
    ]
    assert {op: ours.count(op) for op in ours} == {
        op: n for op, n in seen.names.items() if op not in ("bn_update_running_", "bn_running_stats")
    }


def test_small_activations():
    table = fusedres.explain(fusedres.resnet18(), (1, 3, 224, 224))
    (step,) = (s for s in table if s.layer == "layer4.0.bn1" and s.op == "bn_act")
    assert step.implementation == "aten"
    if COMPILED:
        assert step.reason == "25,088 values, cpu pays from 1,048,576"


def test_another_device_than_this_machines():
    """Without the device the plan still says what its rules give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
        patch.setattr(kernels, "unavailable", dict)
        fusedres.ops.choice.cache_clear()
        table = fusedres.explain(fusedres.resnet18(), (8, 3, 64, 64), torch.float16, "cuda")
        fusedres.ops.choice.cache_clear()
    reasons = {s.reason for s in table if s.op == "bn_act"}
    assert len(reasons) == 1 and "compute capability 7.5, kernels need 8.0" in reasons.pop()


def test_unfused_layers_say_why():
    model = fusedres.resnet18()
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    model.layer2[0].relu = nn.GELU()
    table = fusedres.explain(model, (16, 3, 224, 224))
    assert of(table, "layer1.0.bn1")[0][3:] == ("aten", "the norm has a hook")
    assert of(table, "layer2.0.bn1")[0].implementation == "aten"
    assert of(table, "layer1.0.conv1")[0][3:] == ("aten", "the norm has a hook")
    assert of(table, "layer2.0.conv2")[0].reason == "the activation is a GELU, not an nn.ReLU or nn.Identity"
    assert "no kernel for conv_fwd" in of(table, "layer3.0.conv1")[0].reason
    assert of(table, "conv1")[0].reason == "cpu: cpu has no kernel for stem_conv"
    with fusedres.backend("reference"):
        table = fusedres.explain(fusedres.ResNet50(groups=4, width_per_group=16), (2, 3, 64, 64))
    grouped = of(table, "layer1.0.conv2")[0]
    assert grouped.op == "convolution" and grouped[3:] == (
        "aten",
        "no op for groups or dilation, got 4 and 1",
    )


def test_what_no_kernel_has_in_one_pass_is_explained_in_two():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusedres.plan, "OPS", fusedres.plan.OPS | {"cpu": frozenset(fusedres.plan.BN_OPS)})
        fusedres.ops.choice.cache_clear()
        table = fusedres.explain(fusedres.resnet18(), (16, 3, 224, 224))
        fusedres.ops.choice.cache_clear()
    at = next(i for i, s in enumerate(table) if s.op == "bn_act")
    assert table[at].layer == "bn1" and table[at].shape == (16, 64, 112, 112)
    assert table[at + 1][1:4] == ("max pool", (16, 64, 112, 112), "aten")


def test_frozen_batch_norm_in_16_bits():
    frozen = pytest.importorskip("torchvision", exc_type=ImportError).ops.FrozenBatchNorm2d
    table = fusedres.explain(fusedres.resnet18(norm_layer=frozen), (16, 3, 224, 224), torch.bfloat16)
    step = next(s for s in table if s.layer == "layer1.0.bn1")
    assert step.implementation == "aten" and "promotes" in step.reason


def test_a_model_of_another_kind():
    table = fusedres.explain(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (2, 3, 8, 8))
    assert [(s.layer, s.op, s.implementation) for s in table] == [
        ("0", "convolution", "aten"),
        ("1", "batch norm", "aten"),
    ]
    assert table[1].reason == "not in a fused block"


@pytest.mark.parametrize("size", [(3, 224, 224), (0, 3, 8, 8), (1, 3, 8.0, 8), "1x3x8x8"])
def test_errors(size):
    with pytest.raises(ValueError, match="input_size must be four positive integers"):
        fusedres.explain(fusedres.resnet18(), size)
    with (
        fusedres.backend("cuda"),
        pytest.raises(RuntimeError, match="backend 'cuda' can't serve stem_conv on cpu"),
    ):
        fusedres.explain(fusedres.resnet18(), (1, 3, 64, 64))


NO_TRITON = {"triton": "Triton isn't installed"}


@pytest.fixture
def without_triton(monkeypatch):
    """An H100 by the planner's rules, where CUDA's kernels are all there is; nothing computes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an H100")
    monkeypatch.setattr(kernels, "unavailable", lambda: NO_TRITON)
    monkeypatch.setattr(kernels, "load", mock.Mock())
    ops.choice.cache_clear()
    with fusedres.backend("cuda"):
        yield
    ops.choice.cache_clear()


NETS = {"resnet18": 20, "resnet50": 53}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_by_cuda_alone(net, training, without_triton):
    """Every op of a step is CUDA's, or named as PyTorch's with the reason."""
    model = getattr(fusedres, net)().train(training)
    table = fusedres.explain(model, (256, 3, 224, 224), torch.bfloat16, "cuda")
    assert {s.op for s in table if s.implementation == "aten"} == {"linear"}
    assert {s.implementation for s in table} == {"cuda", "aten"}
    convs = [s for s in table if s.op in ("conv_fwd", "stem_conv")]
    assert len(convs) == NETS[net]
    for step in convs[1:]:
        gradients = dict(re.findall(r"; (conv_[dw]grad): ([^;]*)", step.reason))
        assert gradients["conv_wgrad"] == "aten (cuda has no kernel for conv_wgrad)"
        assert gradients["conv_dgrad"] in ("cuda", "aten (the CUDA conv_dgrad is of stride 1, got 2)")
    strided = sum("of stride 1" in step.reason for step in convs)
    assert strided == {"resnet18": 6, "resnet50": 6}[net]
    assert convs[0].reason == "forced"  # with its gradient
    # the other ops of the backward have no shape to refuse
    for op in (*plan.BN_OPS, *plan.MAXPOOL_OPS, *plan.AVGPOOL_OPS, "cast_weights"):
        assert ops.choice(op, torch.device("cuda"), torch.bfloat16, "cuda").implementation == "cuda"


@pytest.mark.parametrize("net", NETS)
def test_a_trained_net_by_cuda_alone(net, without_triton, monkeypatch):
    monkeypatch.setitem(plan.DEVICE, "cuda", "cpu")  # so that the kernels' tensors can be anywhere
    model = fusedres.optimize_for_inference(getattr(fusedres, net)().eval(), torch.bfloat16)
    table = fusedres.explain(model, (1, 3, 64, 64))
    assert {s.op for s in table if s.implementation != "cuda"} == {"flatten", "Linear"}
    assert all(s.reason for s in table)
    counts = Counter(s.op.partition(" ")[0] for s in table if s.implementation == "cuda")
    # those of 64 and 128 channels inside and without a projection: two and three
    blocks = {"resnet18": 0, "resnet50": 5}[net]
    assert counts == +Counter(conv=NETS[net] - 3 * blocks, bottleneck=blocks, AdaptiveAvgPool2d=1)
