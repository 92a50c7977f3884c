"""Detectors on a fused trunk against the same detectors on torchvision's own, on photographs."""

from __future__ import annotations

import copy
import functools
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
CLASSES = 5
# few and small, so that a core manages
SMALL = {
    "min_size": 48,
    "max_size": 64,
    "rpn_pre_nms_top_n_train": 60,
    "rpn_pre_nms_top_n_test": 60,
    "rpn_post_nms_top_n_train": 8,
    "rpn_post_nms_top_n_test": 8,
    "box_batch_size_per_image": 4,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 5,
}
ANCHORS = (16, 32, 64)


def torchvision(name: str) -> Any:
    return importlib.import_module(f"torchvision.{name}")


def theirs_frozen() -> Any:
    return torchvision("ops").FrozenBatchNorm2d


class Stage(nn.Module):
    """The region head of a C4 detector, by torchvision's modules alone."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(x).mean((2, 3))


def their_c4(net: str, norm_layer: Any) -> Any:
    models, parts = torchvision("models.detection"), torchvision("models._utils")
    resnet = getattr(torchvision("models"), net)(norm_layer=norm_layer)
    backbone = parts.IntermediateLayerGetter(resnet, {"layer3": "0"})
    backbone.out_channels = resnet.fc.in_features // 2
    return models.FasterRCNN(
        backbone,
        rpn_anchor_generator=models.anchor_utils.AnchorGenerator((ANCHORS,), ((0.5, 1.0, 2.0),)),
        box_roi_pool=torchvision("ops").MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2),
        box_head=Stage(resnet.layer4),
        box_predictor=models.faster_rcnn.FastRCNNPredictor(resnet.fc.in_features, CLASSES),
        **SMALL,
    )


def small_pool() -> Any:
    """So that the layer behind has few weights."""
    return torchvision("ops").MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=3, sampling_ratio=2)


def their_fpn(detector: str, net: str, norm_layer: Any) -> Any:
    models = torchvision("models.detection")
    backbone = models.backbone_utils.resnet_fpn_backbone(
        backbone_name=net, weights=None, norm_layer=norm_layer, trainable_layers=5
    )
    return getattr(models, detector)(backbone, CLASSES, box_roi_pool=small_pool(), **SMALL)


MAKERS: dict[str, tuple[Any, Any]] = {
    "faster_rcnn_fpn": (detection.faster_rcnn_fpn, functools.partial(their_fpn, "FasterRCNN")),
    "mask_rcnn_fpn": (detection.mask_rcnn_fpn, functools.partial(their_fpn, "MaskRCNN")),
    "faster_rcnn_c4": (functools.partial(detection.faster_rcnn_c4, anchor_sizes=ANCHORS), their_c4),
}


def twins(kind: str, net: str, ours_norm: Any, theirs_norm: Any) -> tuple[nn.Module, nn.Module]:
    """Our detector and theirs, with the same weights, in fp64."""
    make, their_make = MAKERS[kind]
    theirs = their_make(net, theirs_norm)
    trained = classifier(net).state_dict()
    parts = {"backbone.body.": "", "backbone.": "", "roi_heads.box_head.": ""}
    state = theirs.state_dict()
    for key in state:
        own = next((key.removeprefix(p) for p in parts if key.removeprefix(p) in trained), None)
        if own is not None:
            state[key] = trained[own]
        elif "box_predictor" in key:
            state[key] /= 100  # so that not everything is background for sure
    theirs.load_state_dict(state)
    more = {} if kind == "faster_rcnn_c4" else {"box_roi_pool": small_pool()}
    ours = make(net, num_classes=CLASSES, norm_layer=ours_norm, **more, **SMALL)
    ours.load_state_dict(theirs.state_dict())
    return ours.double(), theirs.double()


def targets(dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """The temple's roof and its walls; the flower."""
    boxes = [[[8.0, 3, 46, 22], [14, 22, 54, 45]], [[20.0, 8, 54, 38]]]
    masks = torch.zeros(3, 48, 64, dtype=torch.uint8)
    for mask, box in zip(masks, [*boxes[0], *boxes[1]], strict=True):
        x1, y1, x2, y2 = map(int, box)
        mask[y1:y2, x1:x2] = 1
    return [
        {"boxes": torch.tensor(boxes[0], dtype=dtype), "labels": torch.tensor([1, 2]), "masks": masks[:2]},
        {"boxes": torch.tensor(boxes[1], dtype=dtype), "labels": torch.tensor([3]), "masks": masks[2:]},
    ]


def losses(model: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Of a training step, which draws its anchors and regions at random."""
    torch.manual_seed(1)
    return model.train()(list(photographs().to(dtype)), targets(dtype))  # type: ignore[no-any-return]


def step(model: nn.Module) -> dict[str, float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = losses(model)
    sum(found.values(), torch.zeros(())).backward()
    optimizer.step()
    return {name: float(value.detach()) for name, value in found.items()}


NORMS = {
    "trained": (nn.BatchNorm2d, nn.BatchNorm2d),
    "fixed": (FrozenBatchNorm2d, theirs_frozen),
    "torchvision's fixed": (theirs_frozen, theirs_frozen),
}


def norms(name: str) -> tuple[Any, Any]:
    ours, theirs = (norm() if norm is theirs_frozen else norm for norm in NORMS[name])
    return ours, theirs


@pytest.mark.parametrize(
    ("kind", "net", "norm"),
    [
        ("faster_rcnn_fpn", "resnet18", "trained"),
        ("faster_rcnn_fpn", "resnet50", "fixed"),
        ("faster_rcnn_fpn", "resnet18", "torchvision's fixed"),
        ("mask_rcnn_fpn", "resnet18", "fixed"),
        ("faster_rcnn_c4", "resnet18", "trained"),
        ("faster_rcnn_c4", "resnet101", "fixed"),
    ],
)
def test_predictions_and_a_step_are_torchvisions(kind, net, norm):
    """What is predicted, and a step of SGD; in fp64, where no rounding decides about proposals."""
    ours, theirs = twins(kind, net, *norms(norm))
    images = list(photographs().double())
    with torch.no_grad():
        with fusedres.backend("reference"):
            predictions = ours.eval()(images)
        expected_predictions = theirs.eval()(images)
    torch.testing.assert_close(predictions, expected_predictions, rtol=1e-6, atol=1e-8)
    assert any(len(p["boxes"]) for p in predictions)

    with fusedres.backend("reference"), FusedOps() as ops:
        found = step(ours)
    expected = step(theirs)
    assert ops.batch_norms == len(norm_names(ours))
    assert found == pytest.approx(expected, rel=1e-9)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative(p.grad, q.grad) < 1e-7, key
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-8, atol=1e-10)


def norm_names(model: nn.Module) -> list[str]:
    kinds = (nn.BatchNorm2d, FrozenBatchNorm2d, theirs_frozen())
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("norm", NORMS)
def test_float32_by_the_kernels(norm):
    """Features and gradients of a trunk err from fp64 at most twice as far as torchvision's do.

    Plus a floor, where rounding flips a ReLU on one side alone.
    """
    ours_norm, theirs_norm = norms(norm)
    net = torchvision("models").resnet18(num_classes=10, norm_layer=theirs_norm)
    net.load_state_dict(classifier("resnet18").state_dict(), strict=False)
    theirs = torchvision("models._utils").IntermediateLayerGetter(net, {"layer2": "0", "layer4": "1"})
    ours = detection.Trunk(
        fusedres.ResNet18(num_classes=10, norm_layer=ours_norm), {"layer2": "0", "layer4": "1"}
    )
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    results = []
    for model, x in ((ours, photographs()), (theirs, photographs()), (exact, photographs().double())):
        x.requires_grad_()
        with fusedres.backend(
            "cpu" if model is ours and "cpu" not in fusedres.kernels.unavailable() else "auto"
        ):
            out = model.train()(x)
            sum(y.square().mean() for y in out.values()).backward()
        results.append([*out.values(), x.grad, *(p.grad for p in model.parameters())])
    errors = torch.tensor([[relative(y, z) for y, z in zip(r, results[2], strict=True)] for r in results[:2]])
    assert (errors[0] <= 2 * errors[1] + 1e-4).all()


def test_autocast_with_fixed_norms():
    """Blocks stay fused, also where torchvision's norms would promote; features err no more than theirs."""
    theirs = torchvision("models").resnet18(num_classes=10, norm_layer=theirs_frozen())
    theirs.load_state_dict(classifier("resnet18").state_dict())
    ours = fusedres.ResNet18(num_classes=10, norm_layer=FrozenBatchNorm2d)
    ours.load_state_dict(theirs.state_dict())
    layers = {"layer4": "out"}
    trunk = detection.Trunk(ours, layers)
    other = torchvision("models._utils").IntermediateLayerGetter(theirs, layers)
    x = photographs()
    exact = other(x)["out"].detach()
    with torch.autocast("cpu", torch.bfloat16), fusedres.backend("reference"), FusedOps() as ops:
        found = trunk(x)["out"]
        eager = other(x)["out"]
    assert found.dtype == torch.bfloat16
    assert ops.batch_norms == 20 and ops.calls["cast_weights"] == 1
    assert relative(found, exact) <= 2 * relative(eager, exact)
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trunk.parameters())


def test_autocast_of_a_whole_detector():
    model = detection.faster_rcnn_fpn("resnet18", num_classes=CLASSES, norm_layer=FrozenBatchNorm2d, **SMALL)
    model.backbone.body.load_state_dict(classifier("resnet18").state_dict(), strict=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(model, torch.float32)
    total = sum(found.values(), torch.zeros(()))
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_torchscript():
    """The children one by one, as of torchvision's detectors."""
    model = detection.faster_rcnn_fpn("resnet18", num_classes=CLASSES, norm_layer=FrozenBatchNorm2d, **SMALL)
    model.eval().backbone.body.load_state_dict(classifier("resnet18").state_dict(), strict=False)
    images = list(photographs())
    with torch.no_grad():
        _, found = torch.jit.script(model)(images)
        torch.testing.assert_close(found, model(images))
    assert any(len(p["boxes"]) for p in found)


@pytest.mark.parametrize("function", ["faster_rcnn_fpn", "mask_rcnn_fpn"])
def test_keys_are_torchvisions(function):
    name = {"faster_rcnn_fpn": "fasterrcnn_resnet50_fpn", "mask_rcnn_fpn": "maskrcnn_resnet50_fpn"}[function]
    with torch.device("meta"):
        ours = getattr(detection, function)()
        theirs = getattr(torchvision("models.detection"), name)(weights=None, weights_backbone=None)
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (ours, theirs)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    theirs.load_state_dict(ours.state_dict(), assign=True)
    ours.load_state_dict(theirs.state_dict(), assign=True)


def test_one_seed_gives_torchvisions_initial_values():
    states = []
    for make in (functools.partial(MAKERS["faster_rcnn_fpn"][0], num_classes=CLASSES), None):
        torch.manual_seed(5)
        arguments = {"box_roi_pool": small_pool(), **SMALL}
        model = make("resnet18", **arguments) if make else their_fpn("FasterRCNN", "resnet18", nn.BatchNorm2d)
        states.append(model.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_c4_is_the_papers():
    """Appendix A: 91 convolutions shared by proposals and regions, at stride 16; conv5_x for each region."""
    with torch.device("meta"):
        model = detection.faster_rcnn_c4()
    convs = [
        m for n, m in model.backbone.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n
    ]
    assert len(convs) == 91
    assert model.backbone.strides == {"0": 16} and model.backbone.out_channels == 1024
    head, heads = model.roi_heads.box_head, model.roi_heads
    assert len([m for n, m in head.named_modules() if n.split(".")[-1] in ("conv1", "conv2", "conv3")]) == 9
    assert head.layer4[0].conv2.stride == (2, 2) and heads.box_roi_pool.output_size == (14, 14)
    assert heads.box_predictor.cls_score.weight.shape == (91, 2048)
    assert heads.box_predictor.bbox_pred.weight.shape == (4 * 91, 2048)
    assert model.rpn.post_nms_top_n() == 2000 and model.eval().rpn.post_nms_top_n() == 300
    assert model.rpn.anchor_generator.num_anchors_per_location() == [9]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_regions(backend):
    head = detection.faster_rcnn_c4("resnet18", num_classes=CLASSES).eval().roi_heads.box_head
    x = torch.zeros(0, 256, 14, 14)
    with fusedres.backend(backend):
        assert head(x).shape == (0, 512)
        out = head(x.requires_grad_())
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("trainable", range(6))
def test_frozen_layers_are_torchvisions(trainable):
    with torch.device("meta"):
        ours = detection.faster_rcnn_fpn("resnet18", trainable_layers=trainable)
        theirs = torchvision("models.detection").backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=trainable, norm_layer=nn.BatchNorm2d
        )
    expected = {name: p.requires_grad for name, p in theirs.named_parameters()}
    assert {name: p.requires_grad for name, p in ours.backbone.named_parameters()} == expected


@pytest.fixture
def stored(monkeypatch) -> dict[str, Any]:
    """What any of torchvision's weights hold, in place of a download: by "value", set by the test."""
    holder: dict[str, Any] = {}

    def get_state_dict(self: Any, *, progress: bool, check_hash: bool) -> Any:
        assert check_hash and not progress
        return holder["value"]

    monkeypatch.setattr(torchvision("models").WeightsEnum, "get_state_dict", get_state_dict)
    return holder


@pytest.mark.parametrize("weights", ["DEFAULT", "enum"])
def test_weights_of_a_detector(stored, weights):
    """As published: trained with fixed batch norms that had no eps."""
    models = torchvision("models.detection")
    theirs = models.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    stored["value"] = {k: v for k, v in theirs.state_dict().items() if "num_batches_tracked" not in k}
    if weights == "enum":
        weights = models.FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    model = detection.faster_rcnn_fpn(weights=weights, progress=False)
    frozen = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(frozen) == 53 and {m.eps for m in frozen} == {0.0}
    assert model.roi_heads.box_predictor.cls_score.out_features == 91
    assert not model.backbone.body.layer1[0].conv1.weight.requires_grad
    assert model.backbone.body.layer2[0].conv1.weight.requires_grad
    torch.testing.assert_close(
        model.backbone.fpn.state_dict(), theirs.backbone.fpn.state_dict(), rtol=0, atol=0
    )


def test_weights_of_a_trunk(stored):
    stored["value"] = torchvision("models").resnet18().state_dict()
    model = detection.faster_rcnn_c4("resnet18", weights_backbone="DEFAULT", progress=False, num_classes=3)
    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == 20 and {m.eps for m in norms} == {1e-5}
    assert torch.equal(
        model.roi_heads.box_head.layer4[0].conv1.weight, stored["value"]["layer4.0.conv1.weight"]
    )
    trained = {name.split(".")[0] for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: detection.faster_rcnn_fpn("resnet19"), "net must be one of resnet18, .*, got 'resnet19'"),
        (
            lambda: detection.faster_rcnn_fpn("resnet18", trainable_layers=6),
            "trainable_layers must be from 0 to 5, got 6",
        ),
        (
            lambda: detection.faster_rcnn_fpn("resnet18", weights="DEFAULT"),
            "weights must be None, torchvision has none of fasterrcnn_resnet18_fpn, got DEFAULT",
        ),
        (
            lambda: detection.mask_rcnn_fpn(weights="COCO_V2"),
            "weights of maskrcnn_resnet50_fpn must be .*'COCO_V1', 'DEFAULT', got COCO_V2",
        ),
        (
            lambda: detection.mask_rcnn_fpn(weights="DEFAULT", num_classes=5),
            "num_classes must be 91 with weights=.*, got 5",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        call()
