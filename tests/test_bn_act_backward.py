"""The backward of functional.bn_act: what it may write over, what it saves, what it refuses."""

from __future__ import annotations

import pytest
import torch
from bn_case import Case, eager
from fused_ops import FusedOps

import fusedres
from fusedres import kernels
from fusedres.functional import bn_act

COMPILED = "cpu" not in kernels.unavailable()


class TestOverwrittenGradient:
    """A backward may write over the gradient it was given only if nobody else can see it."""

    def build(self, residual=False, branch=None):
        case = Case((2, 8, 6, 6), torch.float32, "channels_last", residual=residual, branch=branch)
        return case, case.leaves(torch.float32)

    def apply(self, case, leaves):
        x, residual, weight, bias, mean, var = leaves
        branch = case.branch_norm(torch.float32)
        return bn_act(
            x, weight, bias, mean, var, residual=residual, residual_norm=branch, relu=True, training=True
        )

    def test_an_owned_gradient_is_written_over(self):
        """Else the saving that this exists for would be gone unnoticed."""
        if not COMPILED:
            pytest.skip(kernels.unavailable()["cpu"])
        for residual in (False, True):
            case, leaves = self.build(residual)
            with fusedres.backend("cpu"), FusedOps() as seen:
                (self.apply(case, leaves) * case.grad).sum().backward()
            last = "bn_act_backward_reduce_" if residual else "bn_act_backward_apply_"
            assert seen.calls[last] == 1, seen.calls

    @pytest.mark.skipif(not COMPILED, reason="the compiled module is not built")
    def test_both_branches_in_one_pass(self):
        """The projection's batch norm costs no pass of its own, forward or backward."""
        case, leaves = self.build(residual=True, branch=True)
        with fusedres.backend("cpu"), FusedOps() as seen:
            (self.apply(case, leaves) * case.grad).sum().backward()
        once = ("bn_act", "bn_act_backward_reduce_", "bn_act_backward_apply_")
        assert {op: seen.calls[op] for op in seen.calls if "act" in op} == dict.fromkeys(once, 1)

    @pytest.mark.skipif(not COMPILED, reason="the compiled module is not built")
    def test_looking_leaves_no_holder_behind(self):
        """du goes on to the shortcut, where the engine adds to it in place only if it holds it alone."""
        case, (x, _, weight, bias, mean, var) = self.build()
        z = x * 1.5
        out = bn_act(z.sin(), weight, bias, mean, var, residual=z, training=True)
        loss = (out * case.grad).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss.backward()
        names = [e.name for e in profile.events()]
        assert "aten::add_" in names and "aten::add" not in names

    def test_callers_gradient(self):
        case, leaves = self.build()
        grad = case.grad.clone()
        self.apply(case, leaves).backward(grad)
        assert torch.equal(grad, case.grad)

    @pytest.mark.parametrize("residual", [False, True])
    def test_hook_that_keeps_it(self, residual):
        case, leaves = self.build(residual)
        kept = []
        out = self.apply(case, leaves)
        out.register_hook(lambda g: kept.append(g))
        (out * case.grad).sum().backward()
        assert torch.equal(kept[0], case.grad)

    def test_retain_grad(self):
        case, leaves = self.build()
        out = self.apply(case, leaves)
        out.retain_grad()
        (out * case.grad).sum().backward()
        assert torch.equal(out.grad, case.grad)

    def test_gradient_shared_with_another_branch(self):
        """The sum's backward gives the same tensor to both; each branch in each order."""
        for flip in (False, True):
            case, leaves = self.build()
            other = torch.randn_like(case.x).requires_grad_()
            twin = other * 1
            out = self.apply(case, leaves)
            total = twin + out if flip else out + twin
            (total * case.grad).sum().backward()
            assert torch.equal(other.grad, case.grad)
            expected = case.run(eager)
            torch.testing.assert_close(leaves[0].grad, expected["dx"], atol=1e-5, rtol=1e-4)

    def test_gradient_that_is_a_view(self):
        case, leaves = self.build()
        out = self.apply(case, leaves)
        whole = torch.cat([out, out * 2], 0)
        (whole * torch.cat([case.grad, case.grad])).sum().backward()
        case.grad = case.grad * 3
        torch.testing.assert_close(leaves[0].grad, case.run(eager)["dx"], atol=1e-5, rtol=1e-4)

    def test_two_residuals_in_a_row(self):
        """du is both the residual's gradient and an input of apply."""
        case, leaves = self.build(residual=True)
        x, residual, weight, bias, mean, var = leaves
        out = bn_act(self.apply(case, leaves), weight, bias, mean, var, residual=residual, training=True)
        (out * case.grad).sum().backward()
        mine = [leaf.grad.clone() for leaf in leaves[:4]]
        y, r, w, b, m, v = case.leaves(torch.float32)
        inner = eager(y, w, b, m, v, residual=r, relu=True, training=True)
        (eager(inner, w, b, m, v, residual=r, relu=True, training=True) * case.grad).sum().backward()
        for a, e in zip(mine, (y, r, w, b), strict=True):
            torch.testing.assert_close(a, e.grad, atol=1e-4, rtol=1e-3)

    def test_retain_graph_twice(self):
        case, leaves = self.build(residual=True)
        loss = (self.apply(case, leaves) * case.grad).sum()
        loss.backward(retain_graph=True)
        once = [leaf.grad.clone() for leaf in leaves[:4]]
        loss.backward()
        for leaf, first in zip(leaves[:4], once, strict=True):
            torch.testing.assert_close(leaf.grad, 2 * first)


def test_double_backward_raises():
    case = Case((2, 4, 3, 3), torch.float32, "nchw", residual=False)
    with fusedres.backend("reference"):
        x, _, weight, bias, mean, var = case.leaves(torch.float32)
        out = bn_act(x, weight, bias, mean, var, training=True)
        (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated again"):
            dx.sum().backward()


def test_saved_for_backward():
    """x, where a residual went through the ReLU the output, and a residual that is normalised."""
    for residual, branch in ((False, None), (True, None), (True, True)):
        case = Case((2, 8, 6, 6), torch.float32, "channels_last", residual=residual, branch=branch)
        x, r, weight, bias, mean, var = case.leaves(torch.float32)
        saved = []
        with (
            fusedres.backend("reference"),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t) or t, lambda t: t
            ),
        ):
            norm = case.branch_norm(torch.float32)
            out = bn_act(x, weight, bias, mean, var, residual=r, residual_norm=norm, training=True)
        large = {t.data_ptr() for t in saved if t.numel() == x.numel()}
        expected = [x] + ([out] if residual else []) + ([r] if branch else [])
        assert large == {t.data_ptr() for t in expected}
