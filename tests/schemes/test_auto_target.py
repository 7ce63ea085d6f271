"""``target="auto"``: what this machine's CPU wants, whatever it is; a target given by name stays what it is."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import lq
from helpers.classifiers import Wrapped
from helpers.fits import fit
from helpers.networks import Residual
from helpers.quantized import noise
from helpers.runs import module, quantization, train_data, trainer, val_data
from lq import QuantizationCallback
from lq.callback import QuantizationResult
from lq.deployment.formats import read_metadata
from lq.schemes import targets
from lq.util import cpu

X = noise(2)

CPUS = {
    "x86": ("x86_64", True, "x86"),
    "x86 without VNNI": ("AMD64", False, "x86_avx2"),
    "ARM": ("aarch64", False, "xnnpack"),
    "another": ("riscv64", False, "onnxruntime"),
}


def this_is(monkeypatch: pytest.MonkeyPatch, architecture: str, vnni: bool) -> None:
    """Let the machine have another CPU, as far as the choice of a target is concerned."""
    monkeypatch.setattr(cpu.platform, "machine", lambda: architecture)
    monkeypatch.setattr(targets, "is_x86", cpu.is_x86)
    monkeypatch.setattr(targets, "has_vnni", lambda: vnni)


@pytest.mark.parametrize(("architecture", "vnni", "expected"), CPUS.values(), ids=list(CPUS))
def test_auto_is_what_the_cpu_wants(
    architecture: str, vnni: bool, expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    this_is(monkeypatch, architecture, vnni)
    with caplog.at_level(logging.INFO, "lq"):
        model = lq.prepare(Residual().eval(), X)
    assert f"target {expected!r}: this" in caplog.text
    lq.calibrate(model, [X])
    assert lq.report(model).target == expected


@pytest.mark.parametrize("named", ["x86", "x86_avx2", "tensorrt"])
def test_a_target_given_by_name_stays_what_it_is(
    named: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    this_is(monkeypatch, "aarch64", False)
    with caplog.at_level(logging.INFO, "lq"):
        model = lq.prepare(Residual().eval(), X, target=named)
    assert lq.report(model).target == named
    assert "target" not in caplog.text


def test_auto_is_the_default_wherever_a_target_is_given() -> None:
    for function in (lq.prepare, QuantizationCallback):
        assert inspect.signature(function).parameters["target"].default == "auto"


def test_a_wrong_name_is_refused_with_auto_among_the_choices() -> None:
    with pytest.raises(ValueError, match="target='avx' is unknown; choose one of 'auto', 'x86'"):
        lq.prepare(Residual(), X, target="avx")


def test_result_report_and_files_have_the_name_that_auto_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    this_is(monkeypatch, "x86_64", False)
    callback = QuantizationCallback(
        output_dir=str(tmp_path / "int8"), evaluate=False, analyze=False, calibrator="minmax"
    )
    with caplog.at_level(logging.INFO):
        fit(Wrapped(), tmp_path, callback, epochs=1)
    assert "target 'x86_avx2': this CPU has no VNNI" in caplog.text
    result = callback.result
    assert result is not None
    assert result.target == result.report.target == "x86_avx2"
    assert read_metadata(result.artifact).target == "x86_avx2"
    assert QuantizationResult.from_json((tmp_path / "int8" / "int8.json").read_text()).target == "x86_avx2"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*this CPU's INT8 kernels get it wrong")
@pytest.mark.filterwarnings("ignore:.*this CPU has no VNNI")
def test_a_qat_run_is_resumed_for_the_target_that_it_was_begun_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster has CPUs of several kinds, and a run is resumed on whichever is free."""

    def resume(epochs: int, path: str | None) -> QuantizationResult:
        callback = quantization(tmp_path, mode="qat", target="auto")
        training = trainer(tmp_path, callback, checkpoint, epochs=epochs)
        training.fit(module(), train_data(), val_data(), ckpt_path=path)
        assert callback.result is not None
        return callback.result

    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    this_is(monkeypatch, "x86_64", False)
    assert resume(1, None).target == "x86_avx2"
    first = checkpoint.best_model_path
    # The kernels of this machine are still those of its CPU: only what is chosen changes.
    this_is(monkeypatch, "aarch64", False)
    assert resume(2, first).target == "x86_avx2"
    assert resume(1, None).target == "xnnpack"
