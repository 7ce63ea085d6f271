"""What OpenVINO's compiler would end the process over is refused for it alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.quantized import calibrated, noise

pytest.importorskip("openvino", reason="needs OpenVINO")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")


class Dense(nn.Module):
    """DenseNet's block: all that was computed before is joined, normalized and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * index) for index in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 8 * index, 8, 3, padding=1) for index in range(2))
        self.last, self.fc = nn.BatchNorm2d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [F.relu(self.stem(x))]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.fc(F.relu(self.last(torch.cat(features, 1))).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:lq. openvino cannot run the file")
def test_a_dense_block_for_arm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = noise(8)
    # OpenVINO 2026.4 crashes on this; a version that does not has the file verified.
    result = lq.export(calibrated(Dense(), x, target="xnnpack"), tmp_path / "int8.onnx")
    engines = {verification.runtime for verification in result.verifications}
    assert "onnxruntime" in engines
    if "openvino" not in engines:
        with pytest.raises(RuntimeError, match=r"crashes on this network \(signal \d+\).*target='x86'"):
            lq.load(tmp_path / "int8.onnx", "openvino")(x)
    assert torch.isfinite(lq.load(tmp_path / "int8.onnx", "onnxruntime")(x)).all()
