"""The CIFAR networks: structure, and trained weights on the real images (FUSEDRES_DATA)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cifar_data import images, trained
from fused_ops import FusedOps
from torch import Tensor, nn

import fusedres
from fusedres import ops


class EagerBlock(nn.Module):
    """A basic block as anyone writes it, option A with the zeros on both sides."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.zeros = stride, (planes - inplanes) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        s = self.stride
        shortcut = F.pad(x[:, :, ::s, ::s], (0, 0, 0, 0, self.zeros, self.zeros)) if s > 1 else x
        return F.relu(out + shortcut)


class EagerResNet(nn.Module):
    """The oracle: nn.BatchNorm2d and F.relu, none of our code."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (inplanes, planes) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = EagerBlock(inplanes, planes, 1 if stage == 1 else 2)
            rest = [EagerBlock(planes, planes, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def fused_backend() -> Iterator[str]:
    """The kernels of this machine, or the reference where there are none."""
    cpu = ops.choice("bn_act", torch.device("cpu"), torch.float32, "auto").implementation
    with fusedres.backend("reference" if cpu == "aten" else cpu):
        yield cpu


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962), (1202, 19_421_274)],
)
def test_number_of_parameters(depth, expected):
    with torch.device("meta"):
        model = fusedres.CifarResNet(depth)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_other_shortcuts_add_projections():
    with torch.device("meta"):
        counts = {
            shortcut: sum(p.numel() for p in fusedres.CifarResNet(20, shortcut=shortcut).parameters())
            for shortcut in ("A", "B", "C")
        }
    projected = {"B": [(16, 32), (32, 64)], "C": [(16, 16)] * 3 + [(16, 32), (32, 64)]}
    projected["C"] += [(32, 32)] * 2 + [(64, 64)] * 2
    for shortcut, shapes in projected.items():
        assert counts[shortcut] - counts["A"] == sum(i * o + 2 * o for i, o in shapes)


def test_keys_and_layers():
    ours, theirs = fusedres.CifarResNet(20, zeros="split"), EagerResNet(20)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    convolutions = [m for m in ours.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == 20
    assert [c.out_channels for c in convolutions] == [16] * 7 + [32] * 6 + [64] * 6
    assert ours.layer3(ours.layer2(torch.ones(1, 16, 32, 32))).shape == (1, 64, 8, 8)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_is_the_eager_network(training):
    torch.manual_seed(0)
    ours, theirs = fusedres.CifarResNet(14, zeros="split").double(), EagerResNet(14).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with fusedres.backend("reference"), FusedOps() as calls:
        out = ours.train(training)(x)
        out.square().sum().backward()
    assert calls.batch_norms == 13
    expected = theirs.train(training)(x)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_zeros_at_the_end():
    x = torch.rand(2, 16, 4, 4)
    out = fusedres.CifarResNet(8).layer2[0].downsample(x)
    assert torch.equal(out, torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 16, 2, 2)], dim=1))


def test_plain_network_has_no_shortcut():
    torch.manual_seed(0)
    model = fusedres.CifarResNet(8, plain=True).eval()
    nn.init.zeros_(model.layer1[0].bn2.weight)
    nn.init.ones_(model.layer1[0].bn2.bias)
    out = model.layer1(torch.rand(2, 16, 8, 8))
    assert torch.equal(out, torch.ones(2, 16, 8, 8))
    assert sum(p.numel() for p in fusedres.CifarResNet(20, plain=True).parameters()) == 269_722


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, r"depth must be 6n\+2, .*, got 21"),
        ({"depth": 2}, r"depth must be 6n\+2, .*, got 2"),
        ({"depth": 20, "shortcut": "D"}, "shortcut must be one of 'A', 'B', 'C', got 'D'"),
        ({"depth": 20, "zeros": "both"}, "zeros must be one of 'end', 'split', got 'both'"),
        ({"depth": 20, "num_classes": -1}, "num_classes must be a positive integer, got -1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        fusedres.CifarResNet(**arguments)


def test_weights_of_another_depth():
    message = r"must have 3\+3\+3 blocks of 2 conv.* for CifarResNet, got 1\+1\+1 blocks"
    with pytest.raises(RuntimeError, match=message):
        fusedres.CifarResNet(20).load_state_dict(fusedres.CifarResNet(8).state_dict())


@pytest.mark.parametrize(("depth", "expected"), [(20, 9_173), (56, 9_339)])
def test_trained_weights_on_the_test_images(data, fused_backend, depth, expected):
    model = fusedres.CifarResNet(depth, zeros="split").eval()
    model.load_state_dict(trained(data, depth))
    x, labels = images(data, "cifar10_test.npz")
    correct = 0
    with torch.inference_mode(), FusedOps() as calls:
        for batch, target in zip(x.split(500), labels.split(500), strict=True):
            correct += int((model(batch).argmax(1) == target).sum())
    assert calls.batch_norms == (depth - 1) * 20
    assert correct == expected


def test_training_from_trained_weights(data, fused_backend):
    """SGD on real images, in order: the losses of eager PyTorch's batch norm."""
    x, labels = images(data, "cifar10_train_first10k.npz")
    batches = list(zip(x.split(128), labels.split(128), strict=True))[:-1]
    losses = []
    for model in (fusedres.CifarResNet(20, zeros="split"), EagerResNet(20)):
        model.load_state_dict(trained(data, 20))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
        of_model = []
        with FusedOps() as calls:
            for index in range(100):
                batch, target = batches[index % len(batches)]
                loss = F.cross_entropy(model(batch), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                of_model.append(loss.item())
        assert calls.batch_norms == (0 if isinstance(model, EagerResNet) else 1900)
        losses.append(torch.tensor(of_model))
    ours, eager = losses
    assert ((ours - eager).abs() / eager)[:10].max() < 1e-3
    assert (ours.mean() - eager.mean()).abs() / eager.mean() < 2e-3
