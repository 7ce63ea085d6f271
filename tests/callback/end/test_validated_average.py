"""An average that the user's own callback puts in the model's place for validation is what becomes INT8."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from helpers.classifiers import Wrapped
from helpers.modes import both_modes
from helpers.runs import converted_from, every_epoch, module, quantization, train_data, trainer, val_data

SAYS = "validation uses other weights than those that are trained"


class StateDictEMA(Callback):
    """Loads the average into the model for validation, and the trained weights afterwards."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.validated: list[dict[str, Tensor]] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for key, value in pl_module.named_parameters():
            mean = self.average.setdefault(key, value.detach().clone())
            mean.mul_(0.9).add_(value.detach(), alpha=0.1)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or not self.average:
            return
        self.kept = copy.deepcopy(pl_module.state_dict())
        pl_module.load_state_dict(self.average, strict=False)
        self.validated.append(copy.deepcopy(self.average))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.kept:
            pl_module.load_state_dict(self.kept)
            self.logged.append(float(trainer.callback_metrics["val_loss"]))


class DataEMA(StateDictEMA):
    """Writes through ``.data``, which no version counter notices."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None: ...

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and self.average:
            self.kept = {key: value.detach().clone() for key, value in pl_module.named_parameters()}
            for key, value in pl_module.named_parameters():
                value.data.copy_(self.average[key])
            self.validated.append(copy.deepcopy(self.average))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        for key, value in pl_module.named_parameters():
            value.data.copy_(self.kept.get(key, value.data))
        if self.kept:
            self.logged.append(float(trainer.callback_metrics["val_loss"]))


class SwappedEMA(StateDictEMA):
    """Swaps the tensors themselves; the checkpoints get the average under ``state_dict``."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and self.average:
            self.validated.append(copy.deepcopy(self.average))
            self._swap(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.average:
            self._swap(pl_module)
            self.logged.append(float(trainer.callback_metrics["val_loss"]))

    def _swap(self, pl_module: Any) -> None:
        for key, value in pl_module.named_parameters():
            value.data, self.average[key] = self.average[key], value.data

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **copy.deepcopy(self.average)}


class BestInTheMiddle(Wrapped):
    def on_validation_epoch_end(self) -> None:
        self.log("harm", abs(self.current_epoch - 1.0))


@both_modes
@pytest.mark.parametrize("average", [StateDictEMA, DataEMA, SwappedEMA])
@pytest.mark.support("Best weights", "An average (EMA) that a callback swaps in for validation is converted")
def test_what_validation_used_is_converted(
    average: type[StateDictEMA], mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback, ema, model = quantization(tmp_path, mode=mode, evaluate=True), average(), module()
    run = trainer(tmp_path, callback, ema, epochs=2)
    with caplog.at_level(logging.INFO):
        run.fit(model, train_data(), val_data())
    found = converted_from(run, model, tmp_path)
    assert ema.validated and all(torch.equal(found[key], value) for key, value in ema.validated[-1].items())
    assert caplog.text.count(SAYS) == 1
    assert "INT8 is made of the average that validation used last" in caplog.text
    assert callback.result is not None
    # QAT's own validation runs with fake-quantizers.
    if mode == "ptq":
        assert callback.result.float_side.metrics["val_loss"] == pytest.approx(ema.logged[-1], rel=1e-5)


@both_modes
@pytest.mark.parametrize("average", [StateDictEMA, SwappedEMA])
def test_the_best_average(average: type[StateDictEMA], mode: str, tmp_path: Path) -> None:
    checkpoint = every_epoch(tmp_path, monitor="harm")
    callback, ema, model = quantization(tmp_path, mode=mode), average(), module(BestInTheMiddle)
    run = trainer(tmp_path, callback, ema, checkpoint, epochs=3)
    run.fit(model, train_data(), val_data())
    best = str(checkpoint.best_model_path)
    found = converted_from(run, model, tmp_path)
    assert len(ema.validated) == 3
    assert all(torch.equal(found[key], value) for key, value in ema.validated[1].items())
    assert callback.result is not None and best in callback.result.weights


class Clipped(Callback):
    """Changes the weights for good, in a hook where an average would come in."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        for value in pl_module.parameters():
            value.data.clamp_(-0.2, 0.2)


@pytest.mark.parametrize("others", [[], [Clipped]])
def test_nothing_is_said_where_training_goes_on_with_them(
    others: list[type[Callback]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback, model = quantization(tmp_path), module()
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, callback, *(other() for other in others), epochs=2).fit(model, train_data(), val_data())
    assert SAYS not in caplog.text
    assert "INT8 is made of the weights that training ended with" in caplog.text
