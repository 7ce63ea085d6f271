"""What fit ends with: a row for each engine that is installed, and the one to take; a pure default run among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.classifiers import Wrapped, loader
from helpers.fits import fit, quantization
from helpers.modes import both_modes
from lq import QuantizationCallback
from lq.callback import QuantizationResult, outputs
from lq.callback.end import conversion, engine_runs, joining
from lq.callback.end.engines import EAGER, Engine, recommendation, recommended
from lq.schemes import targets
from lq.timing.measure import Timing
from lq.util.cpu import has_vnni

STAGES = {"evaluation", "calibration", "conversion", "export", "verification", "timing", "analysis", "page"}


def result_of(callback: QuantizationCallback) -> QuantizationResult:
    assert callback.result is not None
    return callback.result


def test_a_run_with_nothing_but_defaults(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(name)
    monkeypatch.setattr(outputs, "UNASKED", ("onnx",))
    monkeypatch.setattr(targets, "has_vnni", has_vnni)  # the target is this CPU's own
    caplog.set_level("INFO")
    callback = QuantizationCallback()
    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[callback],
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Wrapped(), loader(), loader(seed=1))
    result = result_of(callback)
    folder = Path(logger.log_dir) / "int8"
    assert {path.name for path in folder.iterdir()} == {"int8.pt2", "int8.onnx", "int8.json", "int8.html"}
    assert [engine.runtime for engine in result.engines] == ["eager", "folded", "torch", "openvino", "onnxruntime"]
    for engine in result.engines:
        assert engine.note == ""
        assert engine.latency is not None
        assert engine.batch is not None
        assert engine.size_bytes is not None
        assert engine.metrics.keys() == result.float_side.metrics.keys()
        assert engine.agreement is not None
        assert engine.agreement > 0.9
    rows = {engine.runtime: engine for engine in result.engines}
    assert rows["eager"].agreement == 1.0
    assert rows["eager"].metrics == result.float_side.metrics
    assert rows["torch"].metrics == result.int8_side.metrics
    assert result.recommended is not None
    # The page, the log, the loggers and the file say the same.
    said = capsys.readouterr().out
    for engine in result.engines:
        assert engine.title in said
    assert f"recommended: {result.recommended.title}" in said
    page = (folder / "int8.html").read_text()
    assert f"Recommended: {result.recommended.title}" in page
    assert "engines/openvino/latency_p50_ms" in (Path(logger.log_dir) / "metrics.csv").read_text()
    assert QuantizationResult.from_json((folder / "int8.json").read_text()) == result
    assert result.stages.keys() == STAGES
    assert json.loads((folder / "int8.json").read_text())["stages"].keys() == STAGES
    assert "the end of fit took" in caplog.text
    assert all(f"{stage} " in caplog.text for stage in STAGES)


class Swish(nn.Module):
    """What ONNX Runtime has INT8 kernels for, and other engines in their convolutions."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, channels, 3)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(F.silu(self.stem(x)))).mean((2, 3)))


@both_modes
def test_a_file_for_onnx_runtime_alone(mode: Literal["ptq", "qat"], tmp_path: Path, monkeypatch: Any) -> None:
    """It is written unasked where it is another one, and what the engine's row in the table stands for."""
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(outputs, "UNASKED", ("onnx", "onnxruntime"))
    callback = quantization(tmp_path, mode=mode, calibrator=None if mode == "qat" else "minmax")
    model = Wrapped()
    model.model = Swish()
    fit(model, tmp_path, callback)
    files = {engine.runtime: engine.file for engine in result_of(callback).engines}
    assert files["openvino"] == "int8.onnx"
    assert files["onnxruntime"] == ("int8.onnxruntime.onnx" if mode == "ptq" else "int8.onnx")
    fit(Wrapped(), tmp_path, other := quantization(tmp_path, calibrator="minmax"))
    assert [Path(path).name for path in result_of(other).exports] == ["int8.pt2", "int8.onnx"]


def test_a_format_that_is_not_asked_for_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained is not lost for a file that nobody asked for; one that was asked for is an error."""
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(outputs, "UNASKED", ("onnx",))
    export = joining.export

    def failing(model: Any, path: Path, **kwargs: Any) -> Any:
        if kwargs["format"] == "onnx":
            raise ValueError("no such operator")
        return export(model, path, **kwargs)

    monkeypatch.setattr(joining, "export", failing)
    with pytest.warns(UserWarning, match="int8.onnx, which is written by default, is left out: no such operator"):
        fit(Wrapped(), tmp_path, by_default := quantization(tmp_path, calibrator="minmax", evaluate=False))
    assert [Path(path).name for path in result_of(by_default).exports] == ["int8.pt2"]
    asked = quantization(tmp_path, calibrator="minmax", evaluate=False, export=["onnx"])
    with pytest.raises(ValueError, match="no such operator"):
        fit(Wrapped(), tmp_path, asked)


def test_an_engine_that_fails_is_a_row_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no luck here")

    monkeypatch.setattr(engine_runs, "folded_float", failing)
    callback = quantization(tmp_path, calibrator="minmax")
    fit(Wrapped(), tmp_path, callback)
    rows = {engine.runtime: engine for engine in result_of(callback).engines}
    assert rows["folded"].note == "no luck here"
    assert rows["folded"].latency is None
    assert rows["torch"].latency is not None
    assert "float, folded: no luck here" in str(callback.result)


def test_what_takes_too_long_is_not_validated_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_runs, "VALIDATION_SECONDS", 0.0)
    callback = quantization(tmp_path, calibrator="minmax")
    fit(Wrapped(), tmp_path, callback)
    folded = next(engine for engine in result_of(callback).engines if engine.runtime == "folded")
    assert folded.metrics == {}
    assert folded.agreement == 1.0
    assert "not validated" in folded.note


def test_an_engine_computes_what_its_place_in_the_module_says(tmp_path: Path) -> None:
    """The metrics of a row are those of the engine: ONNX Runtime's are those of its file."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    callback = quantization(tmp_path, calibrator="minmax", export=["onnx"])
    model = Wrapped()
    fit(model, tmp_path, callback)
    rows = {engine.runtime: engine for engine in result_of(callback).engines}
    run = lq.load(tmp_path / "int8" / "int8.onnx", "onnxruntime")
    correct = torch.cat([run(x).argmax(1) == y for x, y in loader(seed=1)])
    assert rows["onnxruntime"].metrics["val_acc"] == pytest.approx(float(correct.double().mean()))
    assert isinstance(model.model, lq.Int8Module)  # in whose place it was for a while


def engine(runtime: str, ms: float | None, **metrics: float) -> Engine:
    timing = None if ms is None else Timing(ms, ms, 1e3 / ms)
    file = "" if runtime in ("eager", "folded") else "int8.onnx"
    return Engine(runtime, file, metrics, latency=timing)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([engine(EAGER, 5, acc=0.8), engine("torch", 3, acc=0.79), engine("openvino", 1, acc=0.8)], "openvino"),
        # The fastest one lost its accuracy.
        ([engine(EAGER, 5, acc=0.8), engine("torch", 3, acc=0.79), engine("openvino", 1, acc=0.7)], "torch"),
        # INT8 is slower than float.
        ([engine(EAGER, 5, acc=0.8), engine("folded", 4), engine("torch", 4.5, acc=0.8)], "folded"),
        # A loss says less than an accuracy, and all where it is alone.
        ([engine(EAGER, 5, acc=0.8, loss=1.0), engine("torch", 3, acc=0.8, loss=1.5)], "torch"),
        ([engine(EAGER, 5, loss=1.0), engine("torch", 3, loss=1.5)], EAGER),
        # Percent have a tolerance of their size.
        ([engine(EAGER, 5, acc=80.0), engine("torch", 3, acc=79.0)], "torch"),
        # Nothing to validate with: time alone decides. One that was not validated beside others is not taken.
        ([engine(EAGER, 5), engine("torch", 3)], "torch"),
        ([engine(EAGER, 5, acc=0.8), engine("torch", 3, acc=0.8), engine("openvino", 1)], "torch"),
        ([engine(EAGER, None), engine("torch", None)], None),
    ],
)
def test_the_fastest_engine_with_intact_metrics_is_recommended(rows: list[Engine], expected: str | None) -> None:
    chosen = recommended(rows)
    assert (None if chosen is None else chosen.runtime) == expected
    text = recommendation(rows)
    if chosen is None:
        assert text == ""
    elif chosen.is_float:
        assert "no INT8 engine here is faster" in text
    else:
        assert f"lq.load('int8.onnx', {expected!r})" in text


def test_layers_that_int8_slows_down_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(model: Any, int8: lq.Int8Module, inputs: Any) -> list[dict[str, float]]:
        assert int8.report is not None
        return [{"float_ms": 1.0, "int8_ms": 2.5 if i == 0 else 0.5} for i, _ in enumerate(int8.report.layers)]

    monkeypatch.setattr(conversion, "time_layers", times)
    callback = quantization(tmp_path, calibrator="minmax")
    fit(Wrapped(), tmp_path, callback)
    report = result_of(callback).report
    slow = report.layers[0].name
    assert [layer.name for layer in report.slower_layers] == [slow]
    told = f"{slow} (2.5 ms, float 1 ms)"
    assert told in str(callback.result)
    assert report.layers[0].note == "slower than float: 2.5 ms, float 1 ms"
    page = (tmp_path / "int8" / "int8.html").read_text()
    assert "layers are slower in INT8 than in float" in page
    kept = QuantizationResult.from_json((tmp_path / "int8" / "int8.json").read_text())
    assert kept.report.slower_layers == report.slower_layers
