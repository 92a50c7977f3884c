"""Layouts of nets, inputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ecosystem_nets import images
from fused_ops import FusedOps
from torch import Tensor
from twin_steps import assert_same, exact_twins, norms_of, short_twins, step

NCHW, NHWC = torch.contiguous_format, torch.channels_last
FORMATS = {"nchw": NCHW, "nhwc": NHWC}

INPUTS: dict[str, Callable[[], Tensor]] = {
    "nchw": lambda: images(2, 24, torch.float64),
    "nhwc": lambda: images(2, 24, torch.float64).to(memory_format=NHWC),
    "every other pixel": lambda: images(2, 48, torch.float64)[:, :, ::2, ::2],
    "flipped sides": lambda: images(2, 24, torch.float64).transpose(2, 3),
    "one image repeated": lambda: images(1, 24, torch.float64).expand(3, 3, 24, 24),
    "one channel repeated": lambda: images(2, 24, torch.float64)[:, :1].expand(2, 3, 24, 24),
    "from the middle": lambda: images(4, 30, torch.float64)[1:3, :, 3:27, 3:27],
}


@pytest.mark.parametrize("net", FORMATS)
@pytest.mark.parametrize("x", INPUTS)
def test_of_net_and_input(net, x, reference):
    eager, fused = (twin.to(memory_format=FORMATS[net]) for twin in exact_twins("torchvision basic"))
    given = INPUTS[x]()
    with FusedOps() as ops:
        found = step(fused, given)
    assert ops.batch_norms == norms_of(fused)
    assert_same(found, step(eager, given))


def layouts(net: Any, x: Tensor) -> dict[str, tuple[bool, bool]]:
    """Whether stages' outputs, the input's gradient and weights' are in NCHW, and in channels_last."""
    seen: dict[str, Tensor] = {}
    for stage in ("layer1", "layer2"):
        net.get_submodule(stage).register_forward_hook(lambda *call, s=stage: seen.update({s: call[-1]}))
    x = x.detach().requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None
    tensors = seen | {"x": x.grad} | {key: p.grad for key, p in net.named_parameters() if p.dim() == 4}
    return {key: (t.is_contiguous(), t.is_contiguous(memory_format=NHWC)) for key, t in tensors.items()}


@pytest.mark.parametrize("x", FORMATS)
@pytest.mark.parametrize("net", FORMATS)
@pytest.mark.parametrize("name", ["torchvision bottleneck", "timm basic"])
def test_of_outputs_and_gradients(name, net, x, fused_by):
    eager, fused = (twin.to(memory_format=FORMATS[net]) for twin in short_twins(name))
    given = images(2, 24).to(memory_format=FORMATS[x])
    assert layouts(fused, given) == layouts(eager, given)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["bottleneck", "torchvision basic", "timm basic"])
def test_without_gradients(name, training, fused_by):
    """Of the input, of anything, or in inference_mode: outputs and statistics stay the same bits."""
    _, fused = short_twins(name)
    fused.train(training)
    x, before = images(2, 24), {key: value.clone() for key, value in fused.state_dict().items()}
    gradients, results = [], []
    for given, mode in (
        (x.clone().requires_grad_(), torch.enable_grad()),
        (x, torch.enable_grad()),
        (x, torch.no_grad()),
        (x, torch.inference_mode()),
    ):
        fused.load_state_dict(before)
        with mode, FusedOps() as ops:
            out = fused(given)
        assert ops.batch_norms == norms_of(fused)
        assert out.requires_grad == isinstance(mode, torch.enable_grad)
        assert out.is_inference() == isinstance(mode, torch.inference_mode)
        results.append({"output": out, **{key: b.clone() for key, b in fused.named_buffers()}})
        if out.requires_grad:
            fused.zero_grad()
            out.square().sum().backward()
            gradients.append({key: p.grad for key, p in fused.named_parameters()})
    for same in (gradients, results):
        for other in same[1:]:
            assert_same(other, same[0], rtol=0, atol=0)


def test_partly_frozen_nets(reference):
    """Gradients are those of the eager twin where there are any."""
    eager, fused = exact_twins("torchvision bottleneck")
    for net in (eager, fused):
        for key, p in net.named_parameters():
            p.requires_grad_("bn1" not in key and not key.startswith(("conv1", "layer1.0.conv2")))
    x = images(2, 24, torch.float64)
    assert_same(step(fused, x), step(eager, x))
    for net in (eager, fused):
        net.zero_grad()
        net(x).square().mean().backward()
    assert_same(*({k: p.grad for k, p in n.named_parameters() if p.requires_grad} for n in (fused, eager)))
    assert all((p.grad is None) == (not p.requires_grad) for p in fused.parameters())
