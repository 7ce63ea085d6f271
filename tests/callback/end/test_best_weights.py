"""Which weights become INT8, and that choosing and judging them leaves the run's own records alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from helpers.classifiers import Wrapped
from helpers.modes import both_modes
from helpers.runs import (
    converted_from,
    every_epoch,
    module,
    quantization,
    state_of,
    train_data,
    trainer,
    val_data,
    weights,
)
from lq import Int8Module


class WorseAndWorse(Wrapped):
    """Its metric is best after the first epoch."""

    def on_validation_epoch_end(self) -> None:
        self.log("harm", float(self.current_epoch))


@both_modes
@pytest.mark.support("Best weights", "`ModelCheckpoint(monitor=...)`: the best become INT8, and the log says so")
def test_best_weights_are_converted(mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = every_epoch(tmp_path, monitor="harm")
    callback, model = quantization(tmp_path, mode=mode), module(WorseAndWorse)
    run = trainer(tmp_path, callback, checkpoint, epochs=3)
    with caplog.at_level(logging.INFO):
        run.fit(model, train_data(), val_data())
    best, last = weights(checkpoint.best_model_path), weights(checkpoint.last_model_path)
    found = converted_from(run, model, tmp_path)
    assert any(not torch.equal(best[key], last[key]) for key in best)
    assert all(torch.equal(found[key], best[key]) for key in best)
    assert f"the best checkpoint, {checkpoint.best_model_path}" in caplog.text
    assert callback.result is not None and checkpoint.best_model_path in callback.result.weights


@pytest.mark.support("Best weights", '`weights="last"`, or no monitored metric: the weights that training ended with')
def test_last_weights(tmp_path: Path) -> None:
    for name, monitor, wanted in (("last", "harm", "last"), ("none", None, None)):
        checkpoint = every_epoch(tmp_path / name, monitor=monitor)
        callback, model = quantization(tmp_path, weights=wanted), module(WorseAndWorse)
        run = trainer(tmp_path, callback, checkpoint, epochs=2)
        run.fit(model, train_data(), val_data())
        last, found = weights(checkpoint.last_model_path), converted_from(run, model, tmp_path)
        assert all(torch.equal(found[key], last[key]) for key in last)
        assert callback.result is not None and callback.result.weights == "the weights that training ended with"


def test_best_weights_without_a_metric_are_an_error(tmp_path: Path) -> None:
    model = module()
    with pytest.raises(ValueError, match=r"weights='best': no ModelCheckpoint with monitor='\.\.\.'.*weights='last'"):
        trainer(tmp_path, quantization(tmp_path, weights="best"), epochs=1).fit(model, train_data())
    assert state_of(model).keys() == Wrapped().state_dict().keys()
    with pytest.raises(ValueError, match=r"weights='worst' is unknown; choose 'best' or 'last'"):
        quantization(tmp_path, weights="worst")


@both_modes
@pytest.mark.support("Best weights", "Judging INT8 leaves `ModelCheckpoint`, `EarlyStopping`, `callback_metrics` alone")
def test_evaluation_leaves_the_records_alone(mode: str, tmp_path: Path) -> None:
    checkpoint: ModelCheckpoint = every_epoch(tmp_path, monitor="val_loss", save_top_k=1)
    stopping = EarlyStopping("val_loss", patience=5)
    before: dict[str, Any] = {}

    def records(run: Trainer) -> dict[str, Any]:
        return {
            "stopping": stopping.state_dict(),
            "checkpoint": checkpoint.state_dict(),
            "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
            "files": sorted((tmp_path / "checkpoints").iterdir()),
        }

    class Remember(Callback):
        def on_train_end(self, run: Trainer, pl_module: LightningModule) -> None:
            before["model"] = pl_module.trainer

        def on_fit_end(self, run: Trainer, pl_module: LightningModule) -> None:
            before["records"] = records(run)

    callback, model = quantization(tmp_path, mode=mode, evaluate=True), module()
    run = trainer(tmp_path, stopping, Remember(), callback, checkpoint, epochs=2)
    run.fit(model, train_data(), val_data())
    assert callback.result is not None and "val_loss" in callback.result.int8_side.metrics
    assert records(run) == before["records"]
    assert model.trainer is run is before["model"]


@pytest.mark.support("Best weights", "Layers that `setup` builds anew each time are not lost when INT8 is judged")
def test_evaluation_does_not_set_the_module_up_anew(tmp_path: Path) -> None:
    calls = []

    class Rebuilt(Wrapped):
        def setup(self, stage: str) -> None:
            calls.append(stage)
            self.model = Wrapped().model

        def configure_callbacks(self) -> list[Callback]:
            return [Late()]

    class Late(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            calls.append("callback")

    callback, model = quantization(tmp_path, evaluate=True), module(Rebuilt)
    trainer(tmp_path, callback, epochs=1, num_sanity_val_steps=0).fit(model, train_data(), val_data())
    assert calls == ["fit", "callback"]
    assert isinstance(model.model, Int8Module)
