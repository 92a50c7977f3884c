"""Exported to ONNX a fused net is plain Conv, BatchNormalization, Relu and Add, with its results."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import pytest
import torch
from ecosystem_nets import NETS, images, twins
from torch import nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters' own


def exported(net: nn.Module, *, dynamo: bool, training: bool = False) -> Any:
    if dynamo:
        pytest.importorskip("onnxscript")
        shapes = ({0: "batch"},)
        program = torch.onnx.export(
            net, (images(),), dynamo=True, dynamic_shapes=shapes, optimize=False, verbose=False
        )
        return program.model_proto
    file = io.BytesIO()
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
    torch.onnx.export(
        net,
        (images(),),
        file,
        dynamo=False,
        training=mode,
        do_constant_folding=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "batch"}},
    )
    return onnx.load_model_from_string(file.getvalue())


def kinds(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def check(name: str, dynamo: bool) -> None:
    eager, fused = (net.eval() for net in twins(name))
    model = exported(fused, dynamo=dynamo)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in eager.modules())
    projections = sum(name.endswith("downsample.1") for name, _ in eager.named_modules())
    found = kinds(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert found["Conv"] == norms and found["Relu"] == norms - projections and found["Add"] >= 4
    if dynamo:
        assert found["BatchNormalization"] == norms
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in (images(), images(7)):
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), eager(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_by_torchscript(name):
    check(name, dynamo=False)


def test_by_torch_export():
    check("bottleneck", dynamo=True)


@pytest.mark.parametrize("name", NETS)
def test_for_training(fused_by, name):
    model = exported(twins(name)[1].train(), dynamo=False, training=True)
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert len(norms) == kinds(model)["Conv"] > 0
    for node in norms:
        assert {a.name: a.i for a in node.attribute}["training_mode"] == 1
