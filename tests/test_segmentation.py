"""DeepLabV3 on a fused, dilated trunk against torchvision's, on photographs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from fused_ops import FusedOps
from photographs import classifier, photographs, relative
from torch import Tensor, nn

import fusedres
from fusedres import detection
from fusedres.nn import FrozenBatchNorm2d

pytest.importorskip("torchvision", exc_type=ImportError)
CLASSES = 4


@pytest.fixture
def torchvision() -> Any:
    return importlib.import_module("torchvision.models.segmentation")


def twins(torchvision: Any, aux: bool, norm_layer: Any = None) -> tuple[nn.Module, nn.Module]:
    """Our net and theirs, with the same weights, in fp64."""
    theirs = torchvision.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=aux
    )
    ours = detection.deeplabv3(num_classes=CLASSES, aux_loss=aux, norm_layer=norm_layer)
    theirs.backbone.load_state_dict(classifier("resnet50").state_dict(), strict=False)
    ours.load_state_dict(theirs.state_dict())
    return ours.double(), theirs.double()


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs of a step, which drops units at random."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    out: dict[str, Tensor] = model(x)
    # a bright pixel is of another class than a dark one
    labels = (x.mean(1) * (CLASSES - 1)).long()
    loss = sum((nn.functional.cross_entropy(y, labels) for y in out.values()), torch.zeros(()))
    loss.backward()
    optimizer.step()
    return out


@pytest.mark.parametrize(("aux", "training"), [(True, True), (False, False)], ids=["train", "fixed norms"])
def test_outputs_and_a_step_are_torchvisions(torchvision, aux, training):
    """In fp64; with batch norms that train, and fixed ones against those of a net in eval mode."""
    norm_layer = None if training else FrozenBatchNorm2d
    ours, theirs = (m.train(training) for m in twins(torchvision, aux, norm_layer))
    x = photographs().double()
    with fusedres.backend("reference"), FusedOps() as ops:
        found = step(ours, x)
    expected = step(theirs, x)
    assert ops.batch_norms == 53
    assert list(found) == list(expected) == (["out", "aux"] if aux else ["out"])
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-8, atol=1e-9)
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    for key, p in ours.named_parameters():
        assert relative(p.grad, gradients[key]) < 1e-7, key
    # what is fixed in ours has parameters in theirs
    kept = ours.state_dict() if training else dict(ours.named_parameters())
    state = theirs.state_dict()
    for key, value in kept.items():
        torch.testing.assert_close(value.detach(), state[key], rtol=1e-8, atol=1e-10, msg=key)


def test_bf16_autocast(torchvision):
    ours, theirs = (m.float().eval() for m in twins(torchvision, True))
    x = photographs()
    with torch.no_grad():
        exact = theirs(x)["out"]
        with torch.autocast("cpu", torch.bfloat16):
            eager = theirs(x)["out"]
            with fusedres.backend("reference"):
                found = ours(x)["out"]
    assert relative(found, exact) <= 2 * relative(eager, exact)


@pytest.mark.parametrize("net", ["resnet50", "resnet101"])
@pytest.mark.parametrize("aux", [True, False])
def test_keys_are_torchvisions(torchvision, net, aux):
    with torch.device("meta"):
        ours = detection.deeplabv3(net, aux_loss=aux)
        theirs = getattr(torchvision, f"deeplabv3_{net}")(weights=None, weights_backbone=None, aux_loss=aux)
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (ours, theirs)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    theirs.load_state_dict(ours.state_dict(), assign=True)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert ours.backbone.strides["out"] == 8


def test_weights(torchvision, monkeypatch):
    stored = torchvision.deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True).state_dict()
    enum = torchvision.DeepLabV3_ResNet50_Weights
    monkeypatch.setattr(enum.__mro__[1], "get_state_dict", lambda self, *, progress, check_hash: stored)
    for weights in ("DEFAULT", enum.COCO_WITH_VOC_LABELS_V1):
        model = detection.deeplabv3(weights=weights, progress=False)
        torch.testing.assert_close(dict(model.state_dict()), dict(stored), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"net": "resnet18"}, "dilation .* must be 1 in a net of basic blocks"),
        ({"weights": "DEFAULT", "aux_loss": False}, "aux_loss must be True with weights=.*, got False"),
        ({"weights": "DEFAULT", "num_classes": 5}, "num_classes must be 21 with weights=.*, got 5"),
        ({"net": "resnet152", "weights": "DEFAULT"}, "torchvision has none of deeplabv3_resnet152"),
    ],
)
def test_wrong_arguments(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        detection.deeplabv3(**arguments)
