"""What OpenVINO makes of an ONNX file: which precision each layer is computed in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import lq
from helpers.quantized import calibrated
from lq.engines.openvino import shared_core


def test_layers_of_the_same_size_are_in_int8(tmp_path: Path) -> None:
    """They share constants in the file, of which OpenVINO makes nodes of the graph."""
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    settings = [CNBlockConfig(96, 192, 2), CNBlockConfig(192, None, 2)]
    x = torch.randn(2, 3, 32, 32)
    model = calibrated(ConvNeXt(settings, num_classes=4).eval(), x, example=x, target="x86")
    lq.export(model, tmp_path / "int8.onnx", format="onnx")
    core = shared_core(openvino)
    network = core.read_model(tmp_path / "int8.onnx")
    network.reshape({network.inputs[0]: [1, 3, 32, 32]})
    nodes = core.compile_model(network, "CPU").get_runtime_model().get_ops()
    types = [{key: _text(value) for key, value in node.get_rt_info().items()} for node in nodes]
    layers = [type["primitiveType"] for type in types if type["layerType"] in ("Convolution", "FullyConnected")]
    assert Counter(kernel.rpartition("_")[2].lower() for kernel in layers) == {"i8": 2 + 4 + 8 + 1}


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))
