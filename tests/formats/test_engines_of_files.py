"""Which engines a file is for, and what it may return."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lq
from helpers.patterns import Forward
from helpers.quantized import calibrated, noise
from lq.deployment.formats import read_metadata
from lq.engines.openvino import OpenVinoModel
from lq.schemes.targets import X86, X86_AVX2

pytest.importorskip("openvino", reason="needs OpenVINO")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")

TARGET = replace(X86, weight=X86_AVX2.weight)


def test_a_file_for_one_engine_is_run_by_that_one(tmp_path: Path) -> None:
    x = noise(4)
    model = calibrated(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), x, target=TARGET)
    lq.export(model, tmp_path / "one.onnx", format="onnxruntime")
    lq.export(model, tmp_path / "all.onnx")
    one, both = (lq.load(tmp_path / name) for name in ("one.onnx", "all.onnx"))
    assert isinstance(one, lq.InferenceModel) and one.runtime == "onnxruntime"
    assert isinstance(both, lq.InferenceModel) and both.runtime == "openvino"
    with pytest.raises(ValueError, match="is for 'onnxruntime': runtime='openvino' computes something else"):
        lq.load(tmp_path / "one.onnx", "openvino")


def test_an_engine_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenVINO 2026.4 does of a temporal shift module: the file is for the other engine, which is right."""
    x = noise(4)
    model = calibrated(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), x, target=TARGET)
    right = OpenVinoModel._run
    monkeypatch.setattr(OpenVinoModel, "_run", lambda self, inputs: [2 * y for y in right(self, inputs)])
    with pytest.warns(UserWarning, match="openvino cannot run the file: it computes something else"):
        result = lq.export(model, tmp_path / "int8.onnx")
    assert [verification.runtime for verification in result.verifications] == ["onnxruntime"]
    assert "openvino" in result.unreadable
    assert read_metadata(tmp_path / "int8.onnx").engines == ("onnxruntime",)
    run = lq.load(tmp_path / "int8.onnx")
    assert isinstance(run, lq.InferenceModel) and run.runtime == "onnxruntime"


def _with_determinant(self: Any, x: Tensor) -> Tensor:
    features = self.conv(x).mean((2, 3))
    return features + torch.linalg.det(torch.diag_embed(features)).unsqueeze(1)


def test_an_operator_that_an_engine_does_not_have(tmp_path: Path) -> None:
    x = noise(4)
    model = calibrated(Forward(_with_determinant, conv=nn.Conv2d(3, 4, 3)), x, target=TARGET)
    with pytest.warns(UserWarning, match="openvino cannot"):
        result = lq.export(model, tmp_path / "int8.onnx")
    assert "openvino" in result.unreadable
    run = lq.load(tmp_path / "int8.onnx")
    assert isinstance(run, lq.InferenceModel) and run.runtime == "onnxruntime"
    with pytest.raises(ValueError, match="int8.onnx"):
        lq.load(tmp_path / "int8.onnx", "openvino")


def _with_constants(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return self.conv(x).mean((2, 3)), self.anchors, torch.arange(5)


def test_constants_are_returned(tmp_path: Path) -> None:
    x = noise(4)
    network = Forward(_with_constants, conv=nn.Conv2d(3, 8, 3))
    network.register_buffer("anchors", torch.rand(3, 4))
    model = calibrated(network, x, target=TARGET)
    lq.export(model, tmp_path / "int8.onnx")
    for runtime in ("onnxruntime", "openvino"):
        _, anchors, numbers = lq.load(tmp_path / "int8.onnx", runtime)(x)
        assert torch.equal(anchors, network.anchors)
        assert torch.equal(numbers.long(), torch.arange(5))
