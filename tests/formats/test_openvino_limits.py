"""What OpenVINO computes wrongly, or would end the process over, is refused or done in another way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.networks import DenseBlock
from helpers.quantized import calibrated, noise
from lq.schemes.targets import TARGETS, X86_AVX2

pytest.importorskip("openvino", reason="needs OpenVINO")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")


class Joined(nn.Module):
    """A concatenation of a part with a ReLU and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.c, self.fc = nn.Conv2d(16, 8, 3), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(torch.cat([F.relu(self.a(x)), self.b(x)], 1)).mean((2, 3)))


@pytest.mark.parametrize("network", [DenseBlock, Joined])
@pytest.mark.parametrize("target", ["xnnpack", "tensorrt"])
def test_concatenations_of_signed_integers_run_elsewhere(network: type[nn.Module], target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = noise(8)
    # Weights of 7 bits, with which ONNX Runtime is exact on every CPU.
    model = calibrated(network(), x, target=replace(TARGETS[target], weight=X86_AVX2.weight))
    with pytest.warns(UserWarning, match="openvino cannot run the file"):
        result = lq.export(model, tmp_path / "int8.onnx")
    assert [verification.runtime for verification in result.verifications] == ["onnxruntime"]
    with pytest.raises(ValueError, match=r"concatenations and signed activations.*runtime='onnxruntime'"):
        lq.load(tmp_path / "int8.onnx", "openvino")
    chosen = lq.load(tmp_path / "int8.onnx")
    assert isinstance(chosen, lq.InferenceModel) and chosen.runtime == "onnxruntime"
    assert (chosen(x) - model(x)).norm() < 0.02 * model(x).norm()


@pytest.mark.parametrize("network", [DenseBlock, Joined])
def test_a_batch_of_none(network: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = noise(8)
    lq.export(calibrated(network(), x, target="x86"), tmp_path / "int8.onnx")
    run = lq.load(tmp_path / "int8.onnx", "openvino")
    assert run(x[:0]).shape == (0, 20)
    assert run(x).shape == (8, 20)
