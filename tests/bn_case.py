"""One batch norm with what follows it: inputs, the run of a function on them, and its check."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tolerances import assert_close_to_reference

from fusedres.functional import BatchNorm, bn_act

LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case:
    """One set of inputs, in the precision of ``dtype`` and laid out as asked."""

    def __init__(
        self,
        shape,
        dtype,
        layout,
        *,
        residual,
        relu=True,
        training=True,
        affine=True,
        offset=0.0,
        branch=None,
    ):
        """``branch``: the residual goes through a batch norm of its own, training (True) or not."""
        channels = shape[1]
        self.dtype, self.relu, self.training = dtype, relu, training

        def act():
            return torch.randn(shape).to(dtype).to(memory_format=LAYOUTS[layout])

        self.x = (act() + offset).to(dtype)
        self.grad = act()
        self.residual = act() if residual else None
        self.weight, self.bias = (torch.randn(2, channels)) if affine else (None, None)
        self.mean, self.var = torch.randn(channels) + offset, torch.rand(channels) + 0.5
        self.branch = branch
        if branch is not None:
            self.branch_weight, self.branch_bias, self.branch_mean = torch.randn(3, channels)
            self.branch_var = torch.rand(channels) + 0.5

    def leaves(self, dtype):
        """x, residual, weight, bias, running mean and variance; parameters stay float32 at least."""
        parameters = torch.promote_types(dtype, torch.float32)

        def leaf(t, to):
            return None if t is None else t.detach().clone().to(to).requires_grad_()

        return (
            leaf(self.x, dtype),
            leaf(self.residual, dtype),
            leaf(self.weight, parameters),
            leaf(self.bias, parameters),
            self.mean.to(parameters, copy=True),
            self.var.to(parameters, copy=True),
        )

    def branch_norm(self, dtype):
        """The residual's batch norm, with parameters of its own to be differentiated; None without."""
        if self.branch is None:
            return None
        to = torch.promote_types(dtype, torch.float32)
        values = (self.branch_weight, self.branch_bias, self.branch_mean, self.branch_var)
        weight, bias, mean, var = (v.to(to, copy=True) for v in values)
        return BatchNorm(weight.requires_grad_(), bias.requires_grad_(), mean, var, self.branch)

    def run(self, function, dtype=None):
        dtype = dtype or self.dtype
        x, residual, weight, bias, mean, var = self.leaves(dtype)
        branch = self.branch_norm(dtype)
        keywords = {"residual": residual, "relu": self.relu, "training": self.training}
        if branch is not None:
            keywords["residual_norm"] = branch
        out = function(x, weight, bias, mean, var, **keywords)
        out.backward(self.grad.to(dtype))
        leaves = {"dx": x, "dresidual": residual, "dweight": weight, "dbias": bias}
        results = {"out": out.detach(), "running_mean": mean, "running_var": var}
        if branch is not None:
            leaves |= {"branch_dweight": branch.weight, "branch_dbias": branch.bias}
            results |= {"branch_mean": branch.running_mean, "branch_var": branch.running_var}
        return results | {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}

    def terms(self):
        """The largest magnitudes that float32 sums were added up from, for each result."""
        count = self.x.numel() // self.x.shape[1]
        # a sum of n terms of either sign: partial sums of sqrt(n), rounded log2(n) times if pairwise
        summed = count**0.5 * math.log2(count) if count > 1 else 1.0

        def of(x, var, training, prefix):
            scale = (var.min() + 1e-5).rsqrt().item()
            if training:
                scale = x.double().var((0, 2, 3), correction=0).add(1e-5).rsqrt().max().item()
            highest = x.float().abs().max().item()
            # in dx the mean's rounding is multiplied by dweight / n, a few times 1 / sqrt(n)
            dx = scale * (4 + 3 * highest * scale * count**-0.5)
            # in dweight by the sum of du
            dweight = summed + (highest * scale * count**0.5 if training else 0)
            return {f"{prefix}dweight": dweight, f"{prefix}dbias": dweight, "dx": dx, "highest": highest}

        terms = of(self.x, self.var, self.training, "")
        if self.branch is not None:
            branch = of(self.residual, self.branch_var, self.branch, "branch_")
            terms = branch | terms | {"dresidual": branch["dx"]}
        return terms

    def check(self):
        ours, theirs, reference = self.run(bn_act), self.run(eager), self.run(eager, torch.float64)
        terms = self.terms()
        for name, value in ours.items():
            assert_close_to_reference(
                value, theirs[name], reference[name], terms=terms.get(name, terms["highest"]), name=name
            )
        return ours


def eager(x, weight, bias, mean, var, *, residual, relu, training, residual_norm=None):
    out = F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)
    if residual_norm is not None:
        residual = residual_norm.plain(residual)
    if residual is not None:
        out = out + residual
    return F.relu(out) if relu else out
