"""Fused batch norm, ReLU and residual add for ResNets, as drop-in PyTorch modules and functions."""

from fusedres import functional
from fusedres._convert import convert, coverage, register_with_timm, revert
from fusedres._explain import explain
from fusedres._version import __version__
from fusedres.inference import optimize_for_inference, quantize_for_inference
from fusedres.models.cifar import CifarResNet
from fusedres.models.plain import PlainNet18, PlainNet34
from fusedres.models.resnet import (
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from fusedres.ops import backend

__all__ = [
    "CifarResNet",
    "PlainNet18",
    "PlainNet34",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNet101",
    "ResNet152",
    "__version__",
    "backend",
    "convert",
    "coverage",
    "explain",
    "functional",
    "optimize_for_inference",
    "quantize_for_inference",
    "register_with_timm",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "revert",
]
