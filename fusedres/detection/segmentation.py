"""torchvision's semantic segmentation on a fused trunk."""

from __future__ import annotations

from typing import Any

from fusedres.detection import pretrained
from fusedres.detection.trunk import Trunk
from fusedres.nn import NormLayer

_VOC_CLASSES = 21  # with the background


def deeplabv3(
    net: str = "resnet50",
    *,
    num_classes: int | None = None,
    aux_loss: bool | None = None,
    weights: Any = None,
    weights_backbone: Any = None,
    norm_layer: NormLayer | None = None,
    progress: bool = True,
) -> Any:
    """torchvision's DeepLabV3 on a fused trunk, dilated instead of strided in its last two stages.

    Inputs, outputs and the keys of its state_dict are those of torchvision's deeplabv3_resnet50 and 101.

    Args:
        net: "resnet50", "resnet101" or "resnet152".
        num_classes: with the background; by default those of the weights, or 21.
        aux_loss: whether there is a second classifier, on layer3; by default with ``weights`` only.
        weights: of the whole net, "DEFAULT" or "COCO_WITH_VOC_LABELS_V1" or torchvision's enum.
        weights_backbone: of the trunk, as :func:`fusedres.resnet18` takes them, unless ``weights`` are given.
        norm_layer: of the trunk; nn.BatchNorm2d by default.
        progress: show the download's progress.

    Shapes:
        [N, 3, H, W] -> an OrderedDict of "out" and, with ``aux_loss``, "aux": [N, num_classes, H, W]

    Raises:
        ImportError: there is no torchvision.
        ValueError: an argument outside of the above; names it.
    """
    segmentation = pretrained.torchvision("models.segmentation")
    found, classes = pretrained.find_weights(weights, f"deeplabv3_{net}", num_classes, _VOC_CLASSES)
    if found is not None:
        weights_backbone = None
        if aux_loss is False:
            raise ValueError(f"aux_loss must be True with weights={found}, got False")
    with_aux = found is not None if aux_loss is None else aux_loss
    resnet = pretrained.make_net(
        net,
        weights_backbone,
        progress,
        replace_stride_with_dilation=[False, True, True],
        norm_layer=norm_layer,
    )
    trunk = Trunk(resnet, {"layer3": "aux", "layer4": "out"} if with_aux else {"layer4": "out"})
    model = segmentation.DeepLabV3(
        trunk,
        segmentation.deeplabv3.DeepLabHead(trunk.channels["out"], classes),
        segmentation.fcn.FCNHead(trunk.channels["aux"], classes) if with_aux else None,
    )
    pretrained.load(model, found, progress)
    return model
