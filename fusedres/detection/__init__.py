"""Detection, segmentation and localization on a fused trunk.

Importing this needs no torchvision; the functions that build torchvision's detectors do.
"""

from fusedres.detection.detectors import faster_rcnn_c4, faster_rcnn_fpn, mask_rcnn_fpn
from fusedres.detection.segmentation import deeplabv3
from fusedres.detection.trunk import Trunk

__all__ = [
    "Trunk",
    "deeplabv3",
    "faster_rcnn_c4",
    "faster_rcnn_fpn",
    "mask_rcnn_fpn",
]
