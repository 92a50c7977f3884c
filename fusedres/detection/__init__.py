"""Detection, segmentation and localization on a fused trunk.

Importing this needs no torchvision; the functions that build torchvision's detectors do.
"""

from fusedres.detection.detectors import faster_rcnn_c4, faster_rcnn_fpn, mask_rcnn_fpn
from fusedres.detection.localization import Localizer, Prediction, RegionHead, localized, mean_iou
from fusedres.detection.segmentation import deeplabv3
from fusedres.detection.trunk import Trunk

__all__ = [
    "Localizer",
    "Prediction",
    "RegionHead",
    "Trunk",
    "deeplabv3",
    "faster_rcnn_c4",
    "faster_rcnn_fpn",
    "localized",
    "mask_rcnn_fpn",
    "mean_iou",
]
