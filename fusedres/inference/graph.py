"""A program captured as a CUDA graph: one launch for all its kernels."""

from __future__ import annotations

import threading
from typing import Literal

import torch
from torch import Tensor

from fusedres.inference.program import Program

When = bool | Literal["auto"]
# "auto": pixels of a batch up to which the GPU would wait for launches. A ResNet-50 on 32 images of 224 px
# takes an H100 about a millisecond (predicted from the memory it moves), its launches from Python half of it
AUTO_PIXELS = 32 * 224 * 224


def pays(x: Tensor, when: When) -> bool:
    """Whether a batch is to run as a graph; never inside a capture of the caller's own."""
    if x.device.type != "cuda" or when is False or x.numel() == 0:
        return False
    if torch.cuda.is_current_stream_capturing():
        return False
    n, _, height, width = x.shape
    return when is True or n * height * width <= AUTO_PIXELS


class Captured:
    """``program`` on inputs like ``x``, replayed; any number of threads and streams may call it.

    Its input and output stand in the graph's own memory, so calls take turns: each copies its images in
    and the logits out, on its own stream.
    """

    def __init__(self, program: Program, x: Tensor) -> None:
        self._lock = threading.Lock()
        self.choices = program.choices
        self._x = x.clone()
        self._graph = torch.cuda.CUDAGraph()
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        device = x.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            program(self._x)  # so that whatever libraries allocate on first use isn't captured
        torch.cuda.current_stream(device).wait_stream(stream)
        # other threads may go on meanwhile: what they allocate is none of this graph's
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._out = program(self._x)
        self._done.record()

    def __call__(self, x: Tensor) -> Tensor:
        with self._lock:
            self._done.wait()
            self._x.copy_(x)
            self._graph.replay()
            out = self._out.clone()
            self._done.record()
        return out
