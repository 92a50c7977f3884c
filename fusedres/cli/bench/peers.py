"""Other engines for inference, where they are installed: how each is built from the eager model.

All compute on the CPU with as many threads as PyTorch, one batch at a time, its shape known beforehand.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.cli.bench.workload import Forward, Workload
from fusedres.cli.errors import CommandError, require


@dataclass(frozen=True)
class Peer:
    """An engine that someone else made.

    Args:
        name: of the package, and of the side in a report.
        title: the engine's name.
        dtypes: those it computes in on a CPU.
        build: makes a function from fp32 images to fp32 logits.
        needs: packages besides.
    """

    name: str
    title: str
    dtypes: tuple[torch.dtype, ...]
    build: Callable[[nn.Module, Workload], Forward]
    needs: tuple[str, ...] = ()

    def check(self, dtype: torch.dtype) -> None:
        """Raise CommandError if it can't compute in ``dtype`` or isn't installed."""
        if dtype not in self.dtypes:
            raise CommandError(f"it has no {_bits(dtype)} on a CPU")
        for package in (self.name, *self.needs):
            require(package, self.title)

    def description(self, dtype: torch.dtype) -> str:
        return f"{self.title} {importlib.metadata.version(self.name)}, {_bits(dtype)}"


def _bits(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _onnxruntime(model: nn.Module, batch: Workload) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "model.onnx"
        # the other exporter needs onnxscript, too
        torch.onnx.export(model, (batch.images,), file, dynamo=False)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: _array(images)})[0])


def _openvino(model: nn.Module, batch: Workload) -> Forward:
    import openvino

    precision = openvino.Type.bf16 if batch.dtype == torch.bfloat16 else openvino.Type.f32
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(model, example_input=batch.images, input=list(batch.images.shape))
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    if compiled.get_property("INFERENCE_PRECISION_HINT") != precision:
        raise CommandError(f"it has no {_bits(batch.dtype)} on this CPU")
    return lambda images: torch.from_numpy(compiled(_array(images))[0])


def _array(images: Tensor) -> Any:
    """The images in NumPy's order, which is what the engines take."""
    return images.contiguous().numpy()


PEERS = (
    Peer("onnxruntime", "ONNX Runtime", (torch.float32,), _onnxruntime, needs=("onnx",)),
    Peer("openvino", "OpenVINO", (torch.float32, torch.bfloat16), _openvino),
)
