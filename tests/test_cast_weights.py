"""functional.cast_weights, and the forward under autocast that uses it."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_ops import FusedOps
from torch import nn

import fusedres
from fusedres.functional import cast_weights

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def weights():
    shapes = [(8, 3, 7, 7), (16, 8, 1, 1), (4, 4, 3, 3), (1, 1, 1, 1), (6, 2, 3, 1)]
    given = [torch.randn(s).to(memory_format=LAYOUTS[i % 2]) for i, s in enumerate(shapes)]
    return [*given, torch.randn(5, 6, 3, 3).transpose(0, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_layout_and_gradients(implementation, dtype):
    given = [w.requires_grad_(i != 1) for i, w in enumerate(weights())]
    casts = cast_weights(given, dtype)
    for weight, cast in zip(given, casts, strict=True):
        assert torch.equal(cast, weight.to(dtype))
        assert cast.is_contiguous(memory_format=torch.channels_last)
        assert cast.requires_grad == weight.requires_grad
    casts[0].sum().backward()
    assert torch.equal(given[0].grad, torch.ones_like(given[0]))
    assert given[2].grad is None


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 1, 1), (130, 16, 1, 1), (70, 9, 3, 3)], ids=str)
def test_sizes_and_alignments(implementation, shape, offset):
    """Several blocks a weight, weights that aren't whole blocks, and one that begins anywhere."""
    given = []
    for layout in LAYOUTS:
        count = shape[0] * shape[1] * shape[2] * shape[3]
        flat = torch.randn(count + offset)[offset:]
        like = torch.empty(shape).to(memory_format=layout)
        given.append(flat.as_strided(shape, like.stride(), offset))
    for weight, cast in zip(given, cast_weights(given, torch.bfloat16), strict=True):
        assert torch.equal(cast, weight.bfloat16())


def test_more_weights_than_one_launch_takes(implementation):
    given = [torch.randn(2, 3, 1, 1) for _ in range(515)]
    for weight, cast in zip(given, cast_weights(given, torch.float16), strict=True):
        assert torch.equal(cast, weight.half())


def test_nothing_to_cast():
    assert cast_weights([], torch.bfloat16) == []


def test_errors():
    with pytest.raises(TypeError, match="dtype must be torch.bfloat16 or torch.float16, got torch.float32"):
        cast_weights(weights(), torch.float32)
    with pytest.raises(ValueError, match=r"weights must be 4D torch.float32, got 1D \[3\] torch.float32"):
        cast_weights([torch.zeros(3)], torch.bfloat16)


def step(model, x, backend):
    """Logits and all gradients of a forward and backward under autocast, and the ops that were called."""
    with fusedres.backend(backend), FusedOps() as seen:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out, gradients, seen


def test_a_forward_casts_all_weights_at_once():
    """The same numbers as autocast's own casts, one op for the whole model."""
    # in channels_last autocast's casts have the same layout, so the same convolutions run
    model = fusedres.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    model.conv1.weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 64, 64)
    out, gradients, seen = step(model, x, "reference")
    assert seen.calls["cast_weights"] == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusedres.functional, "casts_weights", lambda device: False)
        expected, theirs, unseen = step(twin, x, "reference")
    assert unseen.calls["cast_weights"] == 0
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, theirs[name], atol=0, rtol=0)


def test_casts_live_as_long_as_one_forward():
    from fusedres.nn import casts

    model = fusedres.CifarResNet(8)
    step(model, torch.randn(2, 3, 32, 32), "reference")
    assert casts._casts.of == {}
    before = model.conv1.weight.detach().clone()
    with torch.no_grad():
        model.conv1.weight.add_(1.0)
    first = step(copy.deepcopy(model), torch.ones(2, 3, 32, 32), "reference")[0]
    with torch.no_grad():
        model.conv1.weight.copy_(before)
    assert not torch.equal(first, step(model, torch.ones(2, 3, 32, 32), "reference")[0])
    # nor after an error
    with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16), fusedres.backend("reference"):
        model(torch.randn(2, 5, 32, 32))
    assert casts._casts.of == {}


@pytest.mark.parametrize("change", ["hook", "subclass", "bfloat16", "bias", "padding"])
def test_a_convolution_out_of_the_ordinary_is_called_as_it_is(change):
    model = fusedres.CifarResNet(8).to(memory_format=torch.channels_last)
    called = []
    if change == "hook":
        model.conv1.register_forward_hook(lambda *_: called.append(1))
    elif change == "subclass":

        class Conv(nn.Conv2d):
            def forward(self, x):
                called.append(1)
                return super().forward(x)

        model.conv1.__class__ = Conv
    elif change == "bfloat16":
        model.conv1.bfloat16()
    elif change == "bias":
        model.conv1.bias = nn.Parameter(torch.randn(16))
    else:
        model.conv1.padding_mode = "reflect"
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    out, _, seen = step(model, x, "reference")
    assert seen.calls["cast_weights"] == 1
    assert len(called) == (1 if change in ("hook", "subclass") else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusedres.functional, "casts_weights", lambda device: False)
        torch.testing.assert_close(out, step(twin, x, "reference")[0], atol=0, rtol=0)


def test_a_layer_that_leaves_autocast_is_not_given_a_cast():
    """Nor one in another dtype, nor one whose gradient was switched on again."""
    model = fusedres.CifarResNet(8).to(memory_format=torch.channels_last)
    block, x = model.layer2[0], torch.randn(2, 3, 32, 32)
    plain, seen = type(block).forward, []

    class Delicate(type(block)):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False), torch.enable_grad():
                out = plain(self, x.float())
            seen.append((out.dtype, out.requires_grad))
            return out

    block.__class__ = Delicate
    step(model, x, "reference")
    with fusedres.backend("reference"), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(x)
    assert seen == [(torch.float32, True)] * 2


def test_a_weight_that_is_sharded_away_is_left_alone():
    model = fusedres.CifarResNet(8)
    weight, x = model.conv1.weight, torch.randn(2, 3, 32, 32)
    model.conv1.weight = nn.Parameter(torch.empty(0))
    model.conv1.register_forward_pre_hook(lambda m, _: setattr(m, "weight", weight))
    out, _, seen = step(model, x, "reference")
    assert seen.calls["cast_weights"] == 1 and out.isfinite().all()


def test_without_autocast_or_a_kernel_nothing_is_cast():
    model = fusedres.CifarResNet(8)
    x = torch.randn(2, 3, 32, 32)
    with fusedres.backend("reference"), FusedOps() as seen:
        model(x)
    assert seen.calls["cast_weights"] == 0
    assert step(model, x, "auto")[2].calls["cast_weights"] == 0  # on a CPU autocast's own serve
