"""torchvision's detectors on a fused trunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.detection import pretrained
from fusedres.detection.trunk import Trunk, freeze
from fusedres.nn import NormLayer, cast_weights, global_avg_pool

_PYRAMID = ("layer1", "layer2", "layer3", "layer4")
_PYRAMID_CHANNELS = 256
_COCO_CLASSES = 91  # with the background
_PROPOSALS = 300  # at test time
_ROI_SIZE = 14  # positions of a region's features; conv5_x, of stride 2, has half as many


class PyramidTrunk(nn.Module):
    """A trunk with a feature pyramid on top; children and keys are those of torchvision's BackboneWithFPN.

    Args:
        body: the trunk.
        fpn: torchvision's FeaturePyramidNetwork, from the trunk's outputs to as many maps or more.
        out_channels: of each of its maps.

    Shapes:
        [N, 3, H, W] -> an OrderedDict of [N, out_channels, h, w]
    """

    def __init__(self, body: Trunk, fpn: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(x))  # type: ignore[no-any-return]


class RegionStage(nn.Module):
    """A stage that every region goes through by itself: conv5_x in the place of VGG-16's hidden layers.

    He et al. 2015, appendix A.

    Args:
        layer4: the stage.

    Shapes:
        [R, C, h, w], features of R regions, R may be 0 -> [R, D]
    """

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with cast_weights(self, x):
            x = self.layer4(x)
        return torch.flatten(global_avg_pool(self.avgpool, x), 1)


def _pyramid(
    net: str,
    weights_backbone: Any,
    progress: bool,
    trained: bool,
    norm_layer: NormLayer | None,
    trainable_layers: int | None,
) -> PyramidTrunk:
    ops = pretrained.torchvision("ops")
    norm_layer, trainable = pretrained.fine_tuning(trained, norm_layer, trainable_layers)
    resnet = pretrained.make_net(net, weights_backbone, progress, norm_layer=norm_layer)
    freeze(resnet, trainable)
    body = Trunk(resnet, {stage: str(index) for index, stage in enumerate(_PYRAMID)})
    fpn = ops.FeaturePyramidNetwork(
        list(body.channels.values()),
        _PYRAMID_CHANNELS,
        ops.feature_pyramid_network.LastLevelMaxPool(),
    )
    return PyramidTrunk(body, fpn, _PYRAMID_CHANNELS)


def faster_rcnn_fpn(
    net: str = "resnet50",
    *,
    num_classes: int | None = None,
    weights: Any = None,
    weights_backbone: Any = None,
    trainable_layers: int | None = None,
    norm_layer: NormLayer | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """torchvision's FasterRCNN with a feature pyramid on a fused trunk.

    With "resnet50" it is torchvision's fasterrcnn_resnet50_fpn: inputs, losses, predictions and the keys of
    its state_dict.

    Args:
        net: "resnet18" to "resnet152".
        num_classes: with the background, which is class 0; by default those of the weights, or 91.
        weights: of the detector, "DEFAULT" or "COCO_V1" or torchvision's enum; for "resnet50" only.
        weights_backbone: of the trunk, as :func:`fusedres.resnet18` takes them, unless ``weights`` are given.
        trainable_layers: how many of layer4, layer3, layer2, layer1 and conv1 train, 0 to 5; by default 3
            with weights of either kind and 5 without.
        norm_layer: of the trunk; by default fixed batch norms with weights of either kind, and
            nn.BatchNorm2d without.
        progress: show the download's progress.
        kwargs: arguments of torchvision's FasterRCNN.

    Raises:
        ImportError: there is no torchvision.
        ValueError: an argument outside of the above; names it.
    """
    return _on_a_pyramid(
        "fasterrcnn",
        net,
        num_classes,
        weights,
        weights_backbone,
        trainable_layers,
        norm_layer,
        progress,
        kwargs,
    )


def mask_rcnn_fpn(
    net: str = "resnet50",
    *,
    num_classes: int | None = None,
    weights: Any = None,
    weights_backbone: Any = None,
    trainable_layers: int | None = None,
    norm_layer: NormLayer | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """torchvision's MaskRCNN with a feature pyramid on a fused trunk; see :func:`faster_rcnn_fpn`.

    With "resnet50" it is torchvision's maskrcnn_resnet50_fpn.
    """
    return _on_a_pyramid(
        "maskrcnn",
        net,
        num_classes,
        weights,
        weights_backbone,
        trainable_layers,
        norm_layer,
        progress,
        kwargs,
    )


def _on_a_pyramid(
    kind: str,
    net: str,
    num_classes: int | None,
    weights: Any,
    weights_backbone: Any,
    trainable_layers: int | None,
    norm_layer: NormLayer | None,
    progress: bool,
    arguments: dict[str, Any],
) -> Any:
    detection = pretrained.torchvision("models.detection")
    found, classes = pretrained.find_weights(weights, f"{kind}_{net}_fpn", num_classes, _COCO_CLASSES)
    if found is not None:
        weights_backbone = None
    trained = found is not None or weights_backbone is not None
    backbone = _pyramid(net, weights_backbone, progress, trained, norm_layer, trainable_layers)
    detector = detection.FasterRCNN if kind == "fasterrcnn" else detection.MaskRCNN
    model = detector(backbone, num_classes=classes, **arguments)
    pretrained.load(model, found, progress)
    return model


def faster_rcnn_c4(
    net: str = "resnet101",
    *,
    num_classes: int = _COCO_CLASSES,
    weights_backbone: Any = None,
    trainable_layers: int | None = None,
    norm_layer: NormLayer | None = None,
    anchor_sizes: Sequence[int] = (128, 256, 512),
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """The paper's Faster R-CNN: conv1 to conv4_x shared, conv5_x for each region.

    He et al. 2015, appendix A. Proposals and regions share features of stride 16. Regions are pooled before
    conv5_1, by RoIAlign to 14x14; conv5_x, of stride 2, its average pool and two sibling layers, for the
    class and for the box of each class, follow. At test time there are 300 proposals.

    Args:
        net: "resnet18" to "resnet152".
        num_classes: with the background, which is class 0.
        weights_backbone: of the net, as :func:`fusedres.resnet18` takes them.
        trainable_layers: how many of layer4, layer3, layer2, layer1 and conv1 train, 0 to 5; by default 3
            with weights and 5 without.
        norm_layer: by default fixed batch norms with weights, as in the paper, and nn.BatchNorm2d without.
        anchor_sizes: sides in pixels; each in aspect ratios 1:2, 1:1 and 2:1. The paper adds 64 for COCO.
        progress: show the download's progress.
        kwargs: arguments of torchvision's FasterRCNN.

    Returns:
        torchvision's FasterRCNN. Keys are ``backbone.conv1.weight`` to ``backbone.layer3...``,
        ``roi_heads.box_head.layer4...`` and torchvision's for the rest.

    Raises:
        ImportError: there is no torchvision.
        ValueError: an argument outside of the above; names it.
    """
    detection, ops = pretrained.torchvision("models.detection"), pretrained.torchvision("ops")
    trained = weights_backbone is not None
    norm_layer, trainable = pretrained.fine_tuning(trained, norm_layer, trainable_layers)
    resnet = pretrained.make_net(net, weights_backbone, progress, norm_layer=norm_layer)
    freeze(resnet, trainable)
    sizes, ratios = (tuple(anchor_sizes),), ((0.5, 1.0, 2.0),)
    parts = {
        "rpn_anchor_generator": detection.anchor_utils.AnchorGenerator(sizes, ratios),
        "rpn_post_nms_top_n_test": _PROPOSALS,
        "box_roi_pool": ops.MultiScaleRoIAlign(["0"], output_size=_ROI_SIZE, sampling_ratio=2),
        "box_head": RegionStage(resnet.layer4),
        "box_predictor": detection.faster_rcnn.FastRCNNPredictor(resnet.fc.in_features, num_classes),
    }
    return detection.FasterRCNN(Trunk(resnet, {"layer3": "0"}), **{**parts, **kwargs})
