"""What OpenVINO makes of an ONNX file: its kernels, and which precision each is computed in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import ShuffleNetV2
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import lq
from helpers.quantized import calibrated
from lq.engines.openvino import shared_core


def test_layers_of_the_same_size_are_in_int8(tmp_path: Path) -> None:
    """They share constants in the file, of which OpenVINO makes nodes of the graph."""
    settings = [CNBlockConfig(96, 192, 2), CNBlockConfig(192, None, 2)]
    layers = layers_on_openvino(ConvNeXt(settings, num_classes=4), tmp_path)
    kernels = [layer["primitiveType"] for layer in layers if layer["layerType"] in ("Convolution", "FullyConnected")]
    assert Counter(kernel.rpartition("_")[2].lower() for kernel in kernels) == {"i8": 2 + 4 + 8 + 1}


@pytest.mark.parametrize("target", ["x86", "onnxruntime"])
def test_a_channel_shuffle_is_one_kernel(target: str, tmp_path: Path) -> None:
    """Its steps are next to one another, without a rounding in between."""
    network = ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], num_classes=4)
    types = Counter(layer["layerType"] for layer in layers_on_openvino(network, tmp_path, target))
    assert types["ShuffleChannels"] == 6 and not types["Transpose"]
    assert types["Reorder"] <= 2  # of the image, and of the result


def layers_on_openvino(network: nn.Module, folder: Path, target: str = "x86") -> list[dict[str, str]]:
    """What OpenVINO runs of the network's file, for one image of 32x32."""
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    lq.export(calibrated(network.eval(), x, example=x, target=target), folder / "int8.onnx", format="onnx")
    core = shared_core(openvino)
    model = core.read_model(folder / "int8.onnx")
    model.reshape({model.inputs[0]: [1, 3, 32, 32]})
    nodes = core.compile_model(model, "CPU").get_runtime_model().get_ops()
    return [{key: _text(value) for key, value in node.get_rt_info().items()} for node in nodes]


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))
