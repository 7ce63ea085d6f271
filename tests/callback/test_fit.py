"""The callback through real fits: what is there when they end."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lq
from helpers.classifiers import Configured, DictBatches, Direct, TwoParts, Wrapped, dict_loader, images, loader
from helpers.fits import TARGET, fit, quantization
from helpers.modes import both_modes
from lq import Int8Module, QuantizationCallback
from lq.deployment import formats


@both_modes
@pytest.mark.parametrize("model_class", [Wrapped, Direct, TwoParts, Configured, DictBatches])
def test_every_shape_of_lightning_module(mode: str, model_class: type, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model, callback = model_class(), quantization(tmp_path, mode=mode)
    data = dict_loader() if model_class is DictBatches else loader(seed=1)
    train = dict_loader() if model_class is DictBatches else loader()
    trainer = fit(model, tmp_path, callback, epochs=4, data=train)
    result = callback.result
    assert result is not None
    assert result.int8_side.metrics["val_acc"] > 0.9
    # What the user validates afterwards is the INT8 network, and gives the figures that were logged.
    again = trainer.validate(model, data, verbose=False)[0]
    assert again == pytest.approx(result.int8_side.metrics)
    assert any(isinstance(m, Int8Module) for m in model.modules())
    predictions = torch.cat(trainer.predict(model, data))
    assert predictions.shape == (64, 4)


def test_artifact_holds_the_network_that_runs(tmp_path: Path) -> None:
    model, callback = Wrapped(), quantization(tmp_path)
    fit(model, tmp_path, callback)
    x, _ = images(16, seed=1)
    assert callback.result is not None
    loaded = lq.load(callback.result.artifact)
    assert torch.equal(loaded(x), model(x))
    assert (tmp_path / "int8" / "int8.json").stat().st_size > 0
    assert callback.result.int8_side.size_bytes == Path(callback.result.artifact).stat().st_size


def test_ptq_leaves_training_untouched(tmp_path: Path) -> None:
    def trained(callback: QuantizationCallback | None, folder: Path) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        checkpoint = ModelCheckpoint(dirpath=folder, filename="last")
        fit(Wrapped(), tmp_path, callback, callbacks=[checkpoint], enable_checkpointing=True, data=loader(shuffle=True))
        state: dict[str, torch.Tensor] = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        return state

    plain = trained(None, tmp_path / "plain")
    with_callback = trained(quantization(tmp_path), tmp_path / "ptq")
    assert plain.keys() == with_callback.keys()
    assert all(torch.equal(plain[key], with_callback[key]) for key in plain)


def test_qat_does_not_change_the_order_of_the_data(tmp_path: Path) -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    class Recording(Wrapped):
        name = ""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.setdefault(self.name, []).append(batch[1].clone())

    for name, callback in (("plain", None), ("qat", quantization(tmp_path, mode="qat", evaluate=False))):
        seed_everything(0, verbose=False)
        model = Recording()
        model.name = name
        fit(model, tmp_path, callback, data=loader(shuffle=True))
    assert all(torch.equal(a, b) for a, b in zip(seen["plain"], seen["qat"], strict=True))


def test_qat_trains_with_fake_quantizers_and_the_same_parameters(tmp_path: Path) -> None:
    states = []

    class Watched(Wrapped):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            states.append({name for name, _ in self.named_parameters()})
            assert lq.quantizers(self.model)  # already there
            return super().configure_optimizers()

        def on_train_batch_end(self, *args: Any) -> None:
            assert lq.quantizers(self.model)["input"].calibrated

    float_names = {name for name, _ in Wrapped().named_parameters()}
    model, callback = Watched(), quantization(tmp_path, mode="qat")
    fit(model, tmp_path, callback)
    assert states == [float_names]


def test_qat_model_and_int8_model_agree(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model = Wrapped()
    fit(model, tmp_path, quantization(tmp_path, mode="qat", convert=False), epochs=3)
    x, _ = images(256, seed=3)
    model.eval()
    int8 = lq.convert(model.model)
    with torch.no_grad():
        trained = model(x)
    assert (trained.argmax(1) == int8(x).argmax(1)).float().mean() >= 0.995


def test_qat_freezes_ranges_and_batch_norm(tmp_path: Path) -> None:
    ranges, means = [], []

    class Watched(Wrapped):
        def on_train_batch_end(self, *args: Any) -> None:
            ranges.append(lq.quantizers(self.model)["input"].scale.clone())
            means.append(self.model[1].running_mean.clone())

    callback = quantization(
        tmp_path, mode="qat", observer_freeze=0.5, batch_norm_freeze=0.75, convert=False, evaluate=False
    )
    fit(Watched(), tmp_path, callback, epochs=2, data=loader(shuffle=True))  # 8 steps
    assert not torch.equal(ranges[2], ranges[3])
    assert all(torch.equal(ranges[3], later) for later in ranges[4:])
    assert not torch.equal(means[4], means[5])
    assert all(torch.equal(means[5], later) for later in means[6:])


def test_every_logger_gets_float_int8_and_drop(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    callback = quantization(tmp_path)
    fit(Wrapped(), tmp_path, callback, logger=loggers)
    names = {"float/val_acc", "int8/val_acc", "drop/val_acc", "float/size_mb", "int8/size_mb", "speedup/latency"}
    names |= {"int8/latency_p50_ms", "int8/latency_p95_ms", "int8/throughput"}
    with open(Path(loggers[0].log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(any(row.get(name) for row in rows) for name in names)
    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    assert names <= set(events.Tags()["scalars"])


def test_evaluation_leaves_the_trainer_alone(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=5)
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor="val_loss")
    before: dict[str, Any] = {}

    class Snapshot(Wrapped):
        def on_fit_end(self) -> None:  # runs after the callbacks'
            before["trainer"] = self.trainer

        def on_train_end(self) -> None:
            metrics = {name: value.clone() for name, value in self.trainer.callback_metrics.items()}
            before.update(metrics=metrics, best=checkpoint.best_model_score, waited=stopping.wait_count)

    model, callback = Snapshot(), quantization(tmp_path)
    trainer = fit(model, tmp_path, callback, callbacks=[stopping, checkpoint], enable_checkpointing=True)
    assert before["trainer"] is trainer
    assert model.trainer is trainer
    assert trainer.callback_metrics == before["metrics"]
    assert (checkpoint.best_model_score, stopping.wait_count) == (before["best"], before["waited"])


def test_without_evaluation_there_are_no_metrics(tmp_path: Path) -> None:
    callback = quantization(tmp_path, evaluate=False)
    fit(Wrapped(), tmp_path, callback)
    assert callback.result is not None
    assert callback.result.int8_side.metrics == {}
    assert callback.result.int8_side.latency is None
    assert "size" in str(callback.result)


def test_a_checkpoint_is_quantized_without_an_epoch(tmp_path: Path) -> None:
    callback = quantization(tmp_path)
    fit(Wrapped(), tmp_path, callback, epochs=0)
    assert callback.result is not None
    assert set(callback.result.int8_side.metrics) == {"val_loss", "val_acc"}


def test_default_output_goes_to_the_log_directory(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    callback = QuantizationCallback(target=TARGET)
    fit(Wrapped(), tmp_path, callback, logger=logger)
    assert callback.result is not None
    assert Path(callback.result.artifact) == Path(logger.log_dir) / "int8" / "int8.pt2"


def test_named_module(tmp_path: Path) -> None:
    model = TwoParts()
    fit(model, tmp_path, quantization(tmp_path, module="backbone"))
    assert isinstance(model.backbone, Int8Module)
    assert isinstance(model.head, torch.nn.Linear)


def test_pytorch_lightning_trainer(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Wrapped().model

        training_step = Wrapped.training_step
        validation_step = Wrapped.validation_step
        logits = Wrapped.logits
        configure_optimizers = Wrapped.configure_optimizers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    callback = quantization(tmp_path)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader(), loader())
    assert callback.result is not None
    assert "val_acc" in callback.result.int8_side.metrics


class _Described(LightningDataModule):
    """What the files say of the data comes from here."""

    classes = ("ant", "bee", "cat", "dog")
    mean = (0.5, 0.5, 0.5)
    std = torch.tensor([0.25, 0.25, 0.25])

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


@both_modes
def test_export_on_request(mode: str, tmp_path: Path) -> None:
    callback = quantization(tmp_path, mode=mode, export=["onnx", "pt2"])
    model = Wrapped()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule=_Described())
    assert callback.result is not None
    assert [Path(path).name for path in callback.result.exports] == ["int8.pt2", "int8.onnx"]
    x, _ = images(8, seed=1)
    expected = model(x)
    for path in callback.result.exports:
        loaded = lq.load(path)
        assert loaded.metadata is not None
        assert loaded.metadata.labels == _Described.classes
        assert loaded.metadata.preprocessing == {"mean": [0.5] * 3, "std": [0.25] * 3}
        assert ((loaded(x) - expected).abs() < 0.1 * expected.abs().max()).float().mean() > 0.9


def test_an_export_that_fails_comes_after_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise lq.ExportMismatchError("the ONNX file differs")

    monkeypatch.setattr(formats, "to_onnx", fail)
    callback, model = quantization(tmp_path, export=["onnx"], rehearse=False), Wrapped()
    with pytest.raises(lq.ExportMismatchError, match="the ONNX file differs"):
        fit(model, tmp_path, callback)
    assert isinstance(model.model, Int8Module)
    assert callback.result is not None
    assert [Path(path).name for path in callback.result.exports] == ["int8.pt2"]
    assert lq.load(callback.result.artifact)(images(2)[0]).shape == (2, 4)


class Rewired(Wrapped):
    """Between epochs a callback changes what the network computes."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:  # heard by the check of the next epoch
            self.model[0].register_forward_hook(lambda module, args, output: output * 0.5)


def test_a_forward_that_changes_between_epochs_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seed_everything(0, verbose=False)
    model, callback = Rewired(), quantization(tmp_path, mode="qat")
    with caplog.at_level("WARNING", logger="lq"):
        fit(model, tmp_path, callback, epochs=4)
    told = [text for text in caplog.messages if "has changed since it was prepared" in text]
    assert len(told) == 1
    assert callback.result is not None
