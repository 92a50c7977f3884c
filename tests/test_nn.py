"""The glue from nn.BatchNorm2d and its activation to the fused op, held against calling the children."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fused_ops import FusedOps
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

import fusedres
from fusedres.nn import (
    BasicBlock,
    Bottleneck,
    PadShortcut,
    PlainBlock,
    batch_norm_act,
    unfused_reason,
)

C = 6
SHAPE = (4, C, 5, 3)


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fusedres.backend(request.param):
        yield request.param


@pytest.fixture
def reference() -> Iterator[None]:
    with fusedres.backend("reference"):
        yield


def batch_norm(**arguments: Any) -> nn.BatchNorm2d:
    """A batch norm with parameters and statistics that aren't their defaults."""
    generator = torch.Generator().manual_seed(3)
    norm = nn.BatchNorm2d(C, **arguments)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if tensor is not None:
                tensor.copy_(torch.rand(C, generator=generator) + 0.5)
    return norm


def plain(norm: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None = None) -> Tensor:
    out = norm(x)
    if residual is not None:
        out = out + residual
    return out if act is None else act(out)


def leaf(seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def step(run: Callable[..., Tensor], make: Callable[[], tuple[nn.Module, Any]], *inputs: Tensor) -> list[Any]:
    """Everything that a forward and a backward leave behind: output, gradients, buffers."""
    norm, act = make()
    inputs = tuple(i.detach().clone().requires_grad_() for i in inputs)
    out = run(norm, act, *inputs)
    weight = torch.linspace(-1, 2, out.numel()).view(out.shape)
    (out.float() * weight).sum().backward()
    gradients = [t.grad for t in (*inputs, *norm.parameters())]
    return [out.detach(), *gradients, *(b.clone() for b in norm.buffers())]


def assert_same_step(
    make: Callable[[], tuple[nn.Module, Any]], *inputs: Tensor, exact: bool, **tolerances: Any
):
    ours, theirs = step(batch_norm_act, make, *inputs), step(plain, make, *inputs)
    if exact:
        tolerances = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerances)


def was_fused(make: Callable[[], tuple[nn.Module, Any]], *inputs: Tensor) -> bool:
    with FusedOps() as ops, torch.no_grad():
        batch_norm_act(*make(), *inputs)
    return ops.calls["bn_act"] == 1


SEMANTICS: dict[str, Callable[[], nn.BatchNorm2d]] = {
    "default": batch_norm,
    "momentum": lambda: batch_norm(momentum=0.7),
    "momentum 0": lambda: batch_norm(momentum=0.0),
    "cumulative": lambda: batch_norm(momentum=None),
    "eps": lambda: batch_norm(eps=0.1),
    "not affine": lambda: batch_norm(affine=False),
    "untracked": lambda: batch_norm(track_running_stats=False),
    "eval": lambda: batch_norm().eval(),
    "eval, cumulative": lambda: batch_norm(momentum=None).eval(),
    "eval, not affine": lambda: batch_norm(affine=False).eval(),
    "eval, untracked": lambda: batch_norm(track_running_stats=False).eval(),
    "frozen parameters": lambda: batch_norm().requires_grad_(False),
    "eval, frozen parameters": lambda: batch_norm().eval().requires_grad_(False),
}


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("act", [None, nn.ReLU, nn.Identity], ids=["none", "relu", "identity"])
@pytest.mark.parametrize("case", SEMANTICS)
def test_is_batch_norm_2d(backend, case, act, with_residual, memory_format):
    x = leaf(0).detach().contiguous(memory_format=memory_format)
    inputs = (x, leaf(1)) if with_residual else (x,)

    def make():
        return SEMANTICS[case](), None if act is None else act()

    assert_same_step(make, *inputs, exact=False, rtol=1e-4, atol=2e-5)
    assert backend == "auto" or was_fused(make, *inputs)


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
def test_running_statistics_over_several_batches(backend, momentum):
    ours, theirs = batch_norm(momentum=momentum), batch_norm(momentum=momentum)
    for seed in range(4):
        batch_norm_act(ours, None, leaf(seed))
        theirs(leaf(seed))
    assert ours.num_batches_tracked == 4
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_num_batches_tracked_may_be_none(backend):
    def make():
        norm = batch_norm()
        norm.num_batches_tracked = None
        return norm, nn.ReLU()

    assert_same_step(make, leaf(0), exact=False)


def test_untracked_module_keeps_the_buffers_it_has(backend):
    def make():
        norm = batch_norm()
        norm.track_running_stats = False
        return norm, nn.ReLU()

    assert_same_step(make, leaf(0), exact=False, rtol=1e-4, atol=1e-5)


def test_bf16_activations_with_fp32_parameters(backend):
    x, residual = leaf(0, torch.bfloat16), leaf(1, torch.bfloat16)
    assert_same_step(lambda: (batch_norm(), nn.ReLU()), x, residual, exact=False, rtol=2e-2, atol=5e-2)


def test_empty_batch(backend):
    assert_same_step(lambda: (batch_norm(), nn.ReLU()), leaf(0, shape=(0, C, 4, 4)), exact=True)


@pytest.mark.parametrize("shape", [(1, C, 1, 1), (4, C, 3), (4, C), (4, C + 1, 3, 3)])
def test_bad_input_fails_as_in_torch(backend, shape):
    ours, theirs = batch_norm(), batch_norm()
    with pytest.raises((ValueError, RuntimeError)) as expected:
        theirs(torch.ones(shape))
    with pytest.raises((ValueError, RuntimeError)) as found:
        batch_norm_act(ours, nn.ReLU(), torch.ones(shape))
    assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)
    if shape != (4, C + 1, 3, 3):
        assert str(found.value) == str(expected.value)


def frozen_batch_norm(eps: float = 1e-5) -> Any:
    ops = pytest.importorskip("torchvision.ops")
    frozen = ops.FrozenBatchNorm2d(C, eps=eps)
    frozen.load_state_dict(batch_norm().state_dict())
    return frozen


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("training", [False, True])
def test_frozen_batch_norm(backend, training, eps):
    def make():
        return frozen_batch_norm(eps).train(training), nn.ReLU()

    assert_same_step(make, leaf(0), leaf(1), exact=False)
    assert backend == "auto" or was_fused(make, leaf(0), leaf(1))
    assert all(buffer.grad is None for buffer in make()[0].buffers())


def test_frozen_batch_norm_of_another_dtype_promotes_unfused(reference):
    def make():
        return frozen_batch_norm(), nn.ReLU()

    x = leaf(0, torch.bfloat16)
    assert_same_step(make, x, exact=True)
    assert batch_norm_act(*make(), x).dtype == torch.float32
    assert not was_fused(make, x)


def scaled(module: nn.Module, first: Any, second: Any = None) -> Any:
    """A hook of any kind: thrice the output, the inputs, or the gradients of either."""
    return 3 * second if isinstance(second, Tensor) else tuple(3 * t for t in first)


class Subclass(nn.BatchNorm2d):
    pass


class ReLUSubclass(nn.ReLU):
    pass


class TensorSubclass(Tensor):
    pass


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def with_parametrization(norm: nn.Module) -> nn.Module:
    parametrize.register_parametrization(norm, "weight", Doubled())
    return norm


def with_tensor_subclass(norm: nn.BatchNorm2d) -> nn.Module:
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(TensorSubclass))
    return norm


def with_own_forward(child: nn.Module) -> nn.Module:
    child.forward = lambda x: x * 5
    return child


def compiled(child: nn.Module) -> nn.Module:
    child.compile(backend="eager")
    return child


def hooked(child: nn.Module, register: str) -> nn.Module:
    getattr(child, register)(scaled)
    return child


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_backward_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
INELIGIBLE: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "SiLU": lambda: (batch_norm(), nn.SiLU()),
    "ReLU6": lambda: (batch_norm(), nn.ReLU6()),
    "subclass of BatchNorm2d": lambda: (Subclass(C), nn.ReLU()),
    "subclass of ReLU": lambda: (batch_norm(), ReLUSubclass()),
    "GroupNorm": lambda: (nn.GroupNorm(2, C), nn.ReLU()),
    "parametrization": lambda: (with_parametrization(batch_norm()), nn.ReLU()),
    "tensor subclass": lambda: (with_tensor_subclass(batch_norm()), nn.ReLU()),
    "forward of the norm": lambda: (with_own_forward(batch_norm()), nn.ReLU()),
    "forward of the activation": lambda: (batch_norm(), with_own_forward(nn.ReLU())),
    "compiled norm": lambda: (compiled(batch_norm()), nn.ReLU()),
    **{f"norm.{hook}": lambda hook=hook: (hooked(batch_norm(), hook), nn.ReLU()) for hook in HOOKS},
    **{f"act.{hook}": lambda hook=hook: (batch_norm(), hooked(nn.ReLU(), hook)) for hook in HOOKS},
}


@pytest.mark.parametrize("case", INELIGIBLE)
@pytest.mark.filterwarnings("ignore:.*non-full backward hook.*")
def test_ineligible_modules_run_as_they_are(reference, case):
    make = INELIGIBLE[case]
    assert_same_step(make, leaf(0), exact=True)
    assert not was_fused(make, leaf(0))
    assert unfused_reason(*make())


GLOBAL_HOOKS = (
    nn_module.register_module_forward_hook,
    nn_module.register_module_forward_pre_hook,
    nn_module.register_module_full_backward_hook,
    nn_module.register_module_full_backward_pre_hook,
)


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_global_hooks_are_called(reference, register):
    def make():
        return batch_norm(), nn.ReLU()

    seen: Counter[type] = Counter()
    handle = register(lambda module, *_: seen.update([type(module)]))
    try:
        assert_same_step(make, leaf(0), exact=True)
        assert seen == {nn.BatchNorm2d: 2, nn.ReLU: 2}
        assert not was_fused(make, leaf(0))
    finally:
        handle.remove()
    assert was_fused(make, leaf(0))


@pytest.mark.parametrize(
    ("x", "residual"),
    [
        (leaf(0), leaf(1, shape=(1, C, 1, 1))),
        (leaf(0), leaf(1, torch.bfloat16)),
        (leaf(0), leaf(1).detach().as_subclass(TensorSubclass)),
        (leaf(0).detach().as_subclass(TensorSubclass), leaf(1)),
    ],
    ids=["broadcast residual", "residual of another dtype", "residual subclass", "input subclass"],
)
def test_ineligible_tensors_run_as_they_are(reference, x, residual):
    ours, theirs = batch_norm(), batch_norm()
    with FusedOps() as ops, torch.no_grad():
        out = batch_norm_act(ours, nn.ReLU(), x, residual)
        torch.testing.assert_close(out, plain(theirs, nn.ReLU(), x, residual), rtol=0, atol=0)
    assert not ops.calls
    assert unfused_reason(ours, nn.ReLU(), x, residual)


def test_torch_func_runs_plain(reference):
    norm = batch_norm().eval()
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    with FusedOps() as ops:
        out = torch.func.vmap(lambda one: batch_norm_act(norm, nn.ReLU(), one))(x)
    assert not ops.calls
    torch.testing.assert_close(out, torch.stack([torch.relu(norm(one)) for one in x]))


BLOCKS = {
    "basic": lambda: BasicBlock(8, 8),
    "basic, projection": lambda: BasicBlock(8, 12, 2, projection(8, 12)),
    "basic, zeros": lambda: BasicBlock(8, 12, 2, PadShortcut(8, 12, 2)),
    "plain": lambda: PlainBlock(8, 8),
    "bottleneck": lambda: Bottleneck(16, 4),
    "bottleneck, projection": lambda: Bottleneck(8, 4, 2, projection(8, 16)),
}


def projection(inplanes: int, planes: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, 2, bias=False), nn.BatchNorm2d(planes))


def block_of(case: str) -> tuple[nn.Module, Tensor, int]:
    """A block, an input, and the number of its batch norms."""
    torch.manual_seed(0)
    block = BLOCKS[case]()
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    return block, x, sum(isinstance(m, nn.BatchNorm2d) for m in block.modules())


@pytest.mark.parametrize("case", BLOCKS)
def test_every_batch_norm_of_a_block_is_fused(reference, case):
    block, x, norms = block_of(case)
    with FusedOps() as ops:
        block(x.requires_grad_()).sum().backward()
    # convolutions take every pass but those at the block's end
    assert ops.calls["conv_fwd with statistics"] == ops.calls["bn_update_running_"] == norms
    assert ops.calls["bn_stats"] == 0 and ops.calls["bn_act"] == 1
    assert ops.calls["conv_dgrad"] == ops.calls["conv_wgrad"] == norms
    assert ops.calls["bn_act_backward_reduce"] + ops.calls["bn_act_backward_reduce_"] == 1
    assert ops.calls["bn_act_backward_apply"] + ops.calls["bn_act_backward_apply_"] == (case == "plain")


@pytest.mark.parametrize("case", BLOCKS)
def test_traced_blocks_hold_their_children(reference, case):
    block, x, norms = block_of(case)
    block.eval()
    with fusedres.backend("auto"), torch.no_grad():
        expected = block(x)
    graph_module = torch.fx.symbolic_trace(block)
    norm_calls = [n for n in graph_module.graph.nodes if n.op == "call_module" and "bn" in n.target]
    assert len(norm_calls) + ("projection" in case) == norms
    exported = torch.export.export(block, (x,))
    for traced in (graph_module, torch.jit.trace(block, x), torch.jit.script(block), exported.module()):
        with FusedOps() as ops, torch.no_grad():
            out = traced(x)
        assert not ops.calls
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("case", ["basic, projection", "bottleneck, projection"])
def test_each_batch_norm_follows_its_own_mode(backend, case):
    block, x, _ = block_of(case)
    block.bn1.eval()
    block.downsample[1].eval()
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    out = block(x)
    changed = {
        name.rsplit(".", 1)[0] for name, b in block.named_buffers() if not torch.equal(b, before[name])
    }
    assert changed == ({"bn2"} if case.startswith("basic") else {"bn2", "bn3"})
    block.load_state_dict(before, strict=False)
    block.bn2.register_forward_hook(lambda *_: None)
    block.bn1.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(block(x), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BasicBlock(8, 8, groups=2), r"groups must be 1 .*, got 2"),
        (lambda: BasicBlock(8, 8, base_width=128), r"base_width \(width_per_group\) must be 64 .*, got 128"),
        (lambda: BasicBlock(8, 8, dilation=2), r"dilation .* must be 1 .*, got 2"),
        (lambda: BasicBlock(8, 8, variant="v2"), r"variant must be one of 'v1.5', 'v1', got 'v2'"),
        (lambda: Bottleneck(8, 8, variant="v2"), r"variant must be one of 'v1.5', 'v1', got 'v2'"),
        (lambda: PadShortcut(8, 16, 2, zeros="front"), r"zeros must be one of 'end', 'split', got 'front'"),
        (lambda: PadShortcut(8, 4, 2), r"planes must be at least inplanes, 8, got 4"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
