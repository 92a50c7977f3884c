"""How far a kernel may be from the truth: no further than twice PyTorch's own distance."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_to_reference(
    ours: Tensor, eager: Tensor, reference: Tensor, *, terms: float = 0.0, name: str = "result"
) -> None:
    """Hold a kernel's result to PyTorch's own error in the same dtype.

    Args:
        ours: what the kernel gave.
        eager: what PyTorch gives for the same inputs in the same dtype.
        reference: the same in float64.
        terms: the largest magnitude that was added up in float32 on the way, where it may exceed the
            result's: its rounding is an error that the result's own size does not show.
        name: what it is, for the message.
    """
    assert ours.dtype == eager.dtype and ours.shape == reference.shape
    ulp = torch.finfo(ours.dtype).eps
    ours, eager, reference = ours.double(), eager.double(), reference.double()
    finite = reference.isfinite()
    torch.testing.assert_close(ours[~finite], reference[~finite], equal_nan=True)
    if not finite.any():
        return
    error = (ours - reference)[finite].abs().max().item()
    allowed = 2 * (eager - reference)[finite].abs().max().item()
    # PyTorch may be exact by luck: one rounding of the largest value, and one of the terms, is nobody's fault
    allowed += ulp * reference[finite].abs().max().item() + torch.finfo(torch.float32).eps * terms
    assert error <= allowed, f"{name} is off by {error:.3g}, PyTorch's own error allows {allowed:.3g}"
