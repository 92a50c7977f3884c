"""Networks by name, and the paper's plain nets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.models import build


@pytest.mark.parametrize(
    ("name", "shortcut", "expected"),
    [
        ("resnet18", "A", 11_515_688),
        ("resnet18", "B", 11_689_512),
        ("resnet18", "C", 12_043_816),
        ("resnet34", "A", 21_623_848),
        ("resnet34", "B", 21_797_672),
        ("resnet34", "C", 22_716_840),
        ("resnet50", "B", 25_557_032),
        ("resnet50", "C", 40_128_552),
        ("plain18", None, 11_515_688),
        ("plain34", None, 21_623_848),
    ],
)
def test_number_of_parameters_of_the_papers_nets(name, shortcut, expected):
    with torch.device("meta"):
        net = build.build(name, 1000, shortcut=shortcut)
    assert sum(p.numel() for p in net.parameters()) == expected


def test_every_name_builds():
    for name in build.NAMES:
        with torch.device("meta"):
            net = build.build(name, 7)
        assert net.fc.out_features == 7
        depth = int(name.removeprefix("resnet").removeprefix("plain"))
        convs = [m for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
        assert len(convs) + 1 == depth


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19"}, "the net must be one of resnet18, .*, got 'resnet19'"),
        ({"name": "plain20", "shortcut": "A"}, "plain20 is a plain net, without shortcuts, got shortcut 'A'"),
        ({"name": "resnet50", "shortcut": "A"}, "shortcut must be 'B' or 'C' in a net of bottlenecks"),
    ],
)
def test_build_refuses(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build.build(num_classes=10, **arguments)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_plain_net_is_its_convolutions_one_after_the_other(training):
    """Children called one by one, in fp64."""
    torch.manual_seed(0)
    net = fusedres.PlainNet18(num_classes=5).double().train(training)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def plain(block: Any, x: Tensor) -> Tensor:
        x = torch.relu(block.bn1(block.conv1(x)))
        return torch.relu(block.bn2(block.conv2(x)))

    expected = net.maxpool(torch.relu(net.bn1(net.conv1(x))))
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            expected = plain(block, expected)
    expected = net.fc(expected.mean((2, 3)))
    torch.testing.assert_close(net(x), expected)
