"""Before training begins the whole way to INT8 is gone on a copy, and nothing notices that."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import lq
from helpers import step_shapes as shapes
from helpers.classifiers import Direct, Wrapped, images
from helpers.modes import both_modes
from helpers.modules import Manual, NeverTrained
from helpers.runs import (
    InterruptionError,
    StatefulLoader,
    assert_same,
    every_epoch,
    interrupted,
    module,
    quantization,
    state_of,
    train_data,
    trainer,
    val_data,
)
from lq import QuantizationCallback
from lq.callback.end import joining


class Counting(Wrapped):
    """Keeps a metric, a counter and a list of what its steps saw, and draws numbers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.seen_loss = MeanMetric()
        self.count = 0
        self.order: list[float] = []
        self.drawn: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen_loss.update(loss.detach())
        self.count += 1
        self.order.append(float(batch[0].sum()))
        self.drawn += [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return loss


def drawing_loader() -> DataLoader[Any]:
    """Shuffled with a generator of its own."""
    data = TensorDataset(*images(64))
    return DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))


@both_modes
@pytest.mark.parametrize("make_data", [drawing_loader, StatefulLoader, train_data])
@pytest.mark.support("Training", "The rehearsal changes nothing: weights, data order, random numbers, metrics")
def test_it_changes_nothing(mode: str, make_data: Any, tmp_path: Path) -> None:
    found = []
    for rehearse in (False, True):
        kept: dict[str, Any] = {}

        class Model(Counting):
            def on_train_end(self, kept: dict[str, Any] = kept) -> None:
                kept["state"] = state_of(self)
                kept["rest"] = (self.count, self.order, self.drawn, float(self.seen_loss.compute()))
                raise InterruptionError  # what comes after training is not looked at

        folder = tmp_path / str(rehearse)
        callback = quantization(folder, mode=mode, rehearse=rehearse, export=["onnx"], evaluate=rehearse)
        interrupted(trainer(folder, callback, epochs=2), module(Model), make_data(), val_data())
        found.append(kept)
    assert_same(found[0]["state"], found[1]["state"])
    assert found[0]["rest"] == found[1]["rest"]


@both_modes
def test_it_changes_nothing_of_a_run_that_is_resumed(mode: str, tmp_path: Path) -> None:
    checkpoint = every_epoch(tmp_path)
    trainer(tmp_path, quantization(tmp_path, mode=mode, convert=False), checkpoint, epochs=1).fit(
        module(), train_data()
    )
    states = []
    for rehearse in (False, True):
        model = module(seed=1)
        callback = quantization(tmp_path, mode=mode, rehearse=rehearse)
        run = trainer(tmp_path, callback, epochs=2)
        run.fit(model, train_data(), val_data(), ckpt_path=checkpoint.last_model_path)
        states.append(state_of(model))
    assert_same(*states)


@both_modes
def test_an_export_that_fails(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(int8: Any, path: Path, format: str = "pt2", **kwargs: Any) -> None:
        if format == "onnx":
            raise lq.ExportMismatchError("the ONNX file differs")

    monkeypatch.setattr(joining, "export", fail)
    callback = quantization(tmp_path, mode=mode, rehearse=True, export=["onnx"])
    with pytest.raises(lq.ExportMismatchError, match="the ONNX file differs"):
        trainer(tmp_path, callback).fit(module(NeverTrained), train_data(), val_data())
    assert not (tmp_path / "int8" / "int8.pt2").exists()


@both_modes
def test_a_validation_that_int8_cannot_do(mode: str, tmp_path: Path) -> None:
    class Model(NeverTrained):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.model.get_parameter("0.weight")  # a buffer of integers in INT8
            super().validation_step(batch, batch_idx)

    callback = quantization(tmp_path, mode=mode, rehearse=True, evaluate=True)
    run = trainer(tmp_path, callback, num_sanity_val_steps=0)
    with pytest.raises(AttributeError, match="`weight` is not an nn.Parameter"):
        run.fit(module(Model), train_data(), val_data())


def test_nan_in_the_first_batches(tmp_path: Path) -> None:
    x, y = images(64)
    x[0] = torch.nan
    data = DataLoader(TensorDataset(x, y), batch_size=16)
    with pytest.raises(lq.CalibrationError, match="NaN or an infinity"):
        trainer(tmp_path, quantization(tmp_path, rehearse=True)).fit(module(NeverTrained), data)


@both_modes
@pytest.mark.parametrize("cls", [Direct, Manual, shapes.Apart])
def test_it_leaves_no_file_and_says_how_long_it_took(
    cls: Any, mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stops(cls):  # type: ignore[misc]
        def on_train_start(self) -> None:
            raise RuntimeError("stop")

    callback = QuantizationCallback(mode=mode, target="x86_avx2", output_dir=str(tmp_path / "int8"), export=["onnx"])
    run = trainer(tmp_path, callback)
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(RuntimeError, match="stop"),
    ):
        run.fit(module(Stops), train_data(), val_data())
    assert any("what follows the training was rehearsed in" in text for text in caplog.messages)
    assert not any("INT8 model written" in text for text in caplog.messages)
    assert not [path for path in (tmp_path / "int8").glob("**/*") if path.is_file()]


def test_a_module_that_cannot_be_copied_goes_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Model(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            self.stream = (number for number in range(3))

    callback, model = quantization(tmp_path, rehearse=True), module(Model)
    with caplog.at_level(logging.INFO, logger="lq"):
        trainer(tmp_path, callback, epochs=1).fit(model, train_data(), val_data())
    (told,) = [text for text in caplog.messages if "no rehearsal: Model cannot be copied" in text]
    assert "stream (cannot pickle 'generator' object" in told
    assert callback.result is not None


def test_features_that_hooks_keep_are_no_hindrance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As for distillation: they have a history, which torch copies no tensor with."""

    class Model(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[str, torch.Tensor] = {}
            self.model[3].register_forward_hook(lambda module, args, output: self.kept.update(conv=output))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) + 1e-3 * self.kept["conv"].square().mean()

    model = module(Model)
    model(images(2)[0])
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, quantization(tmp_path, rehearse=True), epochs=1).fit(model, train_data(), val_data())
    assert any("was rehearsed in" in text for text in caplog.messages)


def test_data_that_can_be_read_once_are_left_for_the_training(tmp_path: Path) -> None:
    seen: list[float] = []

    class Model(Wrapped):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.append(float(batch[0].sum()))

    batches = list(train_data())
    callback = quantization(tmp_path, rehearse=True, calibration_dataloader=train_data())
    trainer(tmp_path, callback, epochs=1).fit(module(Model), iter(batches), val_data())
    assert seen == [float(x.sum()) for x, _ in batches]


def test_several_callbacks_are_refused(tmp_path: Path) -> None:
    callbacks = [quantization(tmp_path), quantization(tmp_path, target="tensorrt")]
    with pytest.raises(ValueError, match=r"takes one QuantizationCallback.*lq.quantize_checkpoint\(.*'tensorrt'"):
        trainer(tmp_path, *callbacks).fit(module(NeverTrained), train_data(), val_data())
