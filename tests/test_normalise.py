"""From pixels to what a net reads."""

from __future__ import annotations

import pytest
import torch

from fusedres.training.normalise import IMAGENET, Normalisation


def test_per_channel():
    x = torch.rand(2, 3, 4, 5)
    out = IMAGENET(x)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        torch.testing.assert_close(out[:, c], (x[:, c] - mean) / std)


def test_per_pixel_of_the_same_and_of_another_size():
    mean = torch.rand(3, 4, 4)
    normalise = Normalisation(mean, torch.ones(3, 1, 1))
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(normalise(x), x - mean)
    # a mean that is constant in every channel stays so at any size
    constant = Normalisation(torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1).expand(3, 4, 4), torch.ones(3, 1, 1))
    x = torch.rand(1, 3, 7, 5)
    torch.testing.assert_close(constant(x), x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))


def test_state_dict_round_trip():
    one = Normalisation(torch.rand(3, 8, 8), torch.rand(3, 1, 1))
    two = Normalisation.from_state_dict(one.state_dict())
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(one(x), two(x))


@pytest.mark.parametrize(
    "state", [{}, {"mean": torch.zeros(3), "std": torch.zeros(3)}, {"mean": 1, "std": 2}]
)
def test_no_normalisation(state):
    with pytest.raises(ValueError, match="must have a mean"):
        Normalisation.from_state_dict(state)
