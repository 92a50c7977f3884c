"""An optimised net on GPU kernels: interpreted here, on a GPU where there is one."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from fused_ops import FusedOps
from test_inference import check, seasoned

import fusedres
from fusedres.inference import graph

INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@INTERPRETER
@pytest.mark.parametrize(
    ("name", "variant", "dtype"),
    [
        ("resnet18", "v1.5", torch.float16),
        ("resnet50", "v1.5", torch.float32),
        ("resnet50", "v1", torch.float16),
    ],
)
def test_every_convolution_by_our_kernels(name, variant, dtype):
    model = seasoned(getattr(fusedres, name)(variant=variant, num_classes=10))
    x = torch.randn(1, 3, 32, 32)
    optimised = fusedres.optimize_for_inference(model, dtype)
    with fusedres.backend("triton"):
        with FusedOps() as calls:
            optimised(x)
        check(model, x, dtype, optimised)
    convolutions = {"resnet18": 20, "resnet50": 53}[name]
    assert calls.names["conv_bias_act"] == convolutions - 1
    assert calls.names["stem_conv"] == 1


class FakeGraph:
    """Stands for a CUDA graph on a CPU: replays by calling what was captured."""

    def __init__(self) -> None:
        self.replays = 0
        self.captured: Any = None

    def replay(self) -> None:
        self.replays += 1
        self.captured()


@pytest.fixture
def graphs(monkeypatch) -> list[FakeGraph]:
    """Captures on a CPU; returns the graphs that were made."""
    made: list[FakeGraph] = []

    class Nothing:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...
        def wait(self) -> None: ...
        def record(self) -> None: ...
        def wait_stream(self, _: object) -> None: ...

    def new() -> FakeGraph:
        made.append(FakeGraph())
        return made[-1]

    for name in ("Event", "Stream", "stream", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(graph, "pays", lambda x, when: when is True)

    class Captured(graph.Captured):
        def __init__(self, program, x):
            super().__init__(program, x)
            self._graph.captured = lambda: self._out.copy_(program(self._x))

    monkeypatch.setattr(graph, "Captured", Captured)
    return made


def test_a_graph_for_each_shape(graphs):
    model = seasoned(fusedres.CifarResNet(8))
    optimised = fusedres.optimize_for_inference(model, cuda_graph=True)
    inputs = [torch.randn(n, 3, 16, 16) for n in (1, 2, 1, 2, 2)]
    outputs = [optimised(x) for x in inputs]
    assert [g.replays for g in graphs] == [1, 2]
    with torch.no_grad():
        for x, out in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


def test_graphs_are_bounded(graphs, monkeypatch):
    monkeypatch.setattr("fusedres.inference.model.GRAPHS", 2)
    optimised = fusedres.optimize_for_inference(seasoned(fusedres.CifarResNet(8)), cuda_graph=True)
    for n in (1, 2, 1, 3, 1):
        optimised(torch.randn(n, 3, 16, 16))
    assert [shape[0] for shape, *_ in optimised._programs] == [3, 1]
    assert len(graphs) == 3


def test_programs_share_what_is_made_of_weights(without_cuda_convolutions):
    """However many shapes are kept."""
    optimised = fusedres.optimize_for_inference(seasoned(fusedres.CifarResNet(8)))
    with fusedres.backend("cuda"):  # on a CPU: the ways that a GPU would take, by PyTorch's operators
        optimised(torch.randn(1, 3, 16, 16))
        made = set(map(id, optimised._prepared._made.values()))
        optimised(torch.randn(2, 3, 16, 16))
    assert made and set(map(id, optimised._prepared._made.values())) == made


def test_threads_take_turns_on_a_graph(graphs):
    model = seasoned(fusedres.CifarResNet(8))
    optimised = fusedres.optimize_for_inference(
        model, cuda_graph=True, example_input=torch.zeros(1, 3, 16, 16)
    )
    inputs = [torch.randn(1, 3, 16, 16) for _ in range(32)]
    outputs: list[Any] = [None] * len(inputs)

    def call(index: int) -> None:
        outputs[index] = optimised(inputs[index])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(g.replays for g in graphs) == 32
    with torch.no_grad():
        for x, out in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("when", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_on_a_gpu(name, dtype, when):
    model = seasoned(getattr(fusedres, name)(num_classes=100)).cuda()
    optimised = fusedres.optimize_for_inference(model, dtype, cuda_graph=when)
    for n in (1, 5, 1, 33):
        check(model, torch.randn(n, 3, 64, 48, device="cuda"), dtype, optimised)


@pytest.mark.gpu
def test_streams_and_threads_on_a_gpu():
    model = seasoned(fusedres.resnet18(num_classes=100)).cuda()
    optimised = fusedres.optimize_for_inference(model, torch.float16, cuda_graph=True)
    inputs = [torch.randn(1 + i % 3, 3, 64, 64, device="cuda") for i in range(100)]
    expected = [optimised(x) for x in inputs]
    outputs: list[Any] = [None] * len(inputs)

    def call(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs[index] = optimised(inputs[index])
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(out, wanted)
