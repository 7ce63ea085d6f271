"""Nothing that fails while a model is looked at loses the run; what cannot be shown is left out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import lq
from helpers.classifiers import DictBatches, Direct, TwoParts, Wrapped, dict_loader, loader
from helpers.fits import fit, quantization
from helpers.modes import both_modes
from lq import QuantizationCallback
from lq.callback.end import inspection


def fails(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("no luck")


def test_failures_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = {
        "end.inspection._weights": "reading the graph",
        "end.inspection.analyze": "analyzing the layers",
        "end.fit_end.compare_predictions": "comparing predictions",
        "end.inspection._activations": "collecting histograms",
        "end.conversion.result_page": "writing the page",
        "logging.result.add_chart": "writing to TensorBoard",
    }
    for name in failing:
        monkeypatch.setattr(f"lq.callback.{name}", fails)
    callback = quantization(tmp_path, analyze=True, calibrator="minmax")
    with pytest.warns(UserWarning, match="the run goes on without: RuntimeError: no luck") as warned:
        fit(Wrapped(), tmp_path, callback, logger=TensorBoardLogger(tmp_path))
    said = [str(warning.message) for warning in warned]
    for what in failing.values():
        assert any(message.startswith(f"lq: {what} failed") for message in said), what
    assert callback.result is not None
    assert lq.load(callback.result.artifact)(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


@both_modes
@pytest.mark.parametrize("model_class", [Direct, DictBatches])
def test_every_shape_of_module_is_analyzed(mode: str, model_class: type, tmp_path: Path) -> None:
    data = dict_loader() if model_class is DictBatches else loader()
    callback = quantization(tmp_path, mode=mode, analyze=True, evaluate=False, calibrator="minmax")
    fit(model_class(), tmp_path, callback, data=data)
    assert callback.result is not None
    assert callback.result.analysis is not None
    assert callback.result.analysis.samples == inspection.SAMPLES
    assert all(layer.int8_ms is None for layer in callback.result.analysis.layers)  # evaluate=False times nothing


@pytest.mark.parametrize(
    ("model_class", "module", "reason"),
    [
        (DictBatches, None, "the batches are not (images, labels)"),
        (TwoParts, "backbone", "there are layers after or beside the unit that is quantized"),
    ],
)
def test_what_is_no_classifier_has_no_predictions(
    model_class: type, module: str | None, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="lq")
    data = dict_loader() if model_class is DictBatches else loader()
    callback = quantization(tmp_path, module=module, analyze=True, evaluate=False, calibrator="minmax")
    fit(model_class(), tmp_path, callback, data=data)
    assert reason in caplog.text
    assert "chart-confusion" not in (tmp_path / "int8" / "int8.html").read_text()


def test_nothing_is_analyzed_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "analyze", fails)
    callback = quantization(tmp_path, analyze=False, evaluate=False, calibrator="minmax")
    fit(Wrapped(), tmp_path, callback)
    assert callback.result is not None
    assert callback.result.analysis is None
    assert (tmp_path / "int8" / "int8.html").stat().st_size > 0


def test_analysis_is_the_default() -> None:
    assert QuantizationCallback().analyze
