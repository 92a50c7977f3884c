"""Facts about this machine and its software, as plain data."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from fusedres import __version__

_PACKAGES = ("torchvision", "timm", "triton", "numpy", "pillow")
_ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_",
    "CUDA_",
    "CUDNN_",
    "DNNL_",
    "FUSEDRES_",
    "GLIBC_TUNABLES",
    "GOMP_",
    "KMP_",
    "LD_PRELOAD",
    "MALLOC_",
    "MKL_",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_",
    "ONEDNN_",
    "PYTORCH_",
    "TORCH",
    "TRITON_",
)
_DRIVER = Path("/proc/driver/nvidia/version")


def versions() -> dict[str, str | None]:
    """Name -> version; None where a package is not installed."""
    found: dict[str, str | None] = {
        "fusedres": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "driver": driver(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cudnn() -> str | None:
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return None if version is None else str(version)


def driver() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER.read_text())
    except OSError:
        return None
    return found[0] if found else None


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def environment() -> dict[str, str]:
    """The variables that change allocation, threading or the choice of a kernel."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)}


def facts(device: torch.device) -> dict[str, Any]:
    """What a measurement on ``device`` depends on."""
    return {
        "device_name": device_name(device),
        "cpu_name": cpu_name(),
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def compiled_module() -> dict[str, Any]:
    """What ``fusedres._C`` was built with, or why it can't be loaded."""
    try:
        module = importlib.import_module("fusedres._C")
    except ImportError as error:
        return {"loads": False, "reason": str(error)}
    return {
        "loads": True,
        "cpu_isa": module.cpu_isa(),
        "cuda_archs": list(module.cuda_archs),
        "cuda_reason": module.cuda_reason,
        "build": module.build,
    }
