"""A gate of two linear layers without biases, as squeeze-and-excitation is often written, on OpenVINO."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lq
from helpers.quantized import calibrated, noise
from lq.schemes.targets import X86, X86_AVX2

pytest.importorskip("openvino", reason="needs OpenVINO")


class Gated(nn.Module):
    def __init__(self, first: bool, second: bool) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 16, 3), nn.Linear(16, 10)
        self.squeeze, self.excite = nn.Linear(64, 8, bias=first), nn.Linear(8, 64, bias=second)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return self.fc(torch.relu(self.b(x * gate.view(len(x), -1, 1, 1))).mean((2, 3)))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_batches_of_any_size(first: bool, second: bool, tmp_path: Path) -> None:
    x = noise(8)
    model = calibrated(Gated(first, second), x, target=replace(X86, weight=X86_AVX2.weight))
    lq.export(model, tmp_path / "int8.onnx")
    int8 = lq.convert(model)
    int8.execution = "simulation"
    run = lq.load(tmp_path / "int8.onnx", "openvino")
    for size in (1, 3, 4, 8):
        expected = int8(x[:size])
        # What is not INT8 is float32, also on CPUs that have BF16.
        assert (run(x[:size]) - expected).norm() < 1e-3 * expected.norm()
