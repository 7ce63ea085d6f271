"""``QuantizationCallback(max_drop=...)``: INT8 networks that keep to an accuracy, by the user's own validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import lq
from helpers.classifiers import Wrapped, images, loader
from helpers.fits import fit, quantization
from helpers.notes import Notes
from helpers.quantized import TARGET
from lq import QuantizationCallback, QuantizationResult
from lq.int8.module import Int8Module
from lq.numerics.quantizer import QuantizerState


class Broken(Wrapped):
    """Weights for a channel that is always zero are so large that all others in their layer round to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.model[1].requires_grad_(False)
        self.model[3].requires_grad_(False)
        with torch.no_grad():
            self.model[1].weight[0] = 1000.0  # as large as those that read it: nothing is to be equalised
            self.model[1].bias[0] = -1e6
            self.model[3].weight[:, 0] = 1000.0


def test_the_broken_layer_stays_in_float(tmp_path: Path) -> None:
    model = Broken()
    callback = quantization(tmp_path, max_drop=0.5, max_drop_metric="val_acc", rehearse=True)
    trainer = fit(model, tmp_path, callback)
    result = callback.result
    assert result is not None and result.tuning is not None
    tuning = result.tuning
    assert tuning.met and tuning.float_layers == ("3",)
    assert tuning.metric_name == "val_acc" and tuning.allowed_drop == pytest.approx(0.005)
    # By the user's own validation, of float and of what stands in the module now.
    assert tuning.float_metric == result.float_side.metrics["val_acc"]
    assert tuning.step.metric == result.int8_side.metrics["val_acc"]
    assert tuning.steps[0].drop > 0.005
    (again,) = trainer.validate(model, loader(seed=1), verbose=False)
    assert again["val_acc"] == pytest.approx(tuning.step.metric)
    assert isinstance(model.model, Int8Module)
    precisions = {layer.name: layer.precision for layer in result.report.layers}
    assert (precisions["0"], precisions["3"], precisions["8"]) == ("int8", "float", "int8")
    # In the file, and in what is printed.
    written = (tmp_path / "int8" / "int8.json").read_text()
    assert QuantizationResult.from_json(written) == result
    assert [step["change"] for step in json.loads(written)["tuning"]["steps"]] == [s.change for s in tuning.steps]
    assert tuning.verdict in str(result)
    file = lq.load(tmp_path / "int8" / "int8.pt2")
    x = next(iter(loader(seed=1)))[0]
    assert torch.allclose(file(x), model(x), atol=1e-5)


def test_the_engine_that_is_named_judges(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    named = {"max_drop_metric": "val_acc", "max_drop_runtime": "onnxruntime"}
    callback = quantization(tmp_path, max_drop=0.5, **named, export=["onnx"])
    fit(Broken(), tmp_path, callback)
    result = callback.result
    assert result is not None and result.tuning is not None
    assert result.tuning.runtime == "onnxruntime" and result.tuning.float_layers == ("3",)
    engines = {engine.runtime: engine for engine in result.engines}
    assert engines["onnxruntime"].metrics["val_acc"] == pytest.approx(result.tuning.step.metric)
    assert all(step.latency_ms is not None for step in result.tuning.steps)
    page = (tmp_path / "int8" / "int8.html").read_text()
    for text in (">Accuracy</h2>", "3 in float", "as &#x27;onnxruntime&#x27; runs it"):
        assert text in page


class Flat(Broken):
    """Broken, with the layers in the LightningModule itself."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model:
            x = layer(x)
        return x


def test_a_monitored_loss_may_rise_by_so_much(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", mode="min")
    callback = quantization(tmp_path, max_drop=0.05, calibrator="mse")
    fit(Flat(), tmp_path, callback, callbacks=[checkpoint], enable_checkpointing=True)
    assert callback.result is not None and callback.result.tuning is not None
    tuning = callback.result.tuning
    assert (tuning.metric_name, tuning.allowed_drop) == ("val_loss", 0.05)
    assert tuning.steps[0].drop == tuning.steps[0].metric - tuning.float_metric > 0.05
    assert tuning.met and tuning.step.drop <= 0.05
    assert {step.calibrator for step in tuning.steps} == {"mse"}


def test_a_checkpoint_of_the_run_is_restored_as_it_was_quantized(tmp_path: Path) -> None:
    model = Broken()
    callback = quantization(tmp_path, max_drop=0.5, max_drop_metric="val_acc")
    trainer = fit(model, tmp_path, callback)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    x = next(iter(loader(seed=1)))[0]
    expected = model(x)
    other = Broken()
    fresh = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[quantization(tmp_path)],
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    fresh.validate(other, loader(seed=1), ckpt_path=tmp_path / "after.ckpt", verbose=False)
    assert isinstance(other.model, Int8Module)
    assert torch.equal(other(x), expected)


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(seed=1)


def test_a_checkpoint_that_was_trained_without(tmp_path: Path) -> None:
    trainer = fit(Broken(), tmp_path, None)
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    settings: dict[str, Any] = {"max_drop": 0.5, "analyze": False, "target": TARGET, "accelerator": "cpu"}
    settings["max_drop_runtime"] = "torch"
    with pytest.raises(ValueError, match="max_drop=0.5: no callback monitors a metric"):
        lq.quantize_checkpoint(tmp_path / "float.ckpt", Broken, Data(), **settings)
    result = lq.quantize_checkpoint(tmp_path / "float.ckpt", Broken, Data(), max_drop_metric="val_acc", **settings)
    assert result.tuning is not None and result.tuning.met
    assert result.tuning.float_layers == ("3",) and result.tuning.runtime == "torch"


def test_what_cannot_be_kept_is_said_with_how_much_is_missing(tmp_path: Path) -> None:
    callback = quantization(tmp_path, max_drop=0.0, max_drop_metric="val_acc", max_drop_seconds=1e-6)
    with pytest.warns(UserWarning, match=r"max_drop=0.0: val_acc .* falls short by .* leave no time for another"):
        fit(Broken(), tmp_path, callback)
    assert callback.result is not None and callback.result.tuning is not None
    assert not callback.result.tuning.met and callback.result.tuning.evaluations == 2


def test_mistakes_are_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_drop=-1 must be a number of points"):
        quantization(tmp_path, max_drop=-1)
    with pytest.raises(ValueError, match="max_drop_runtime='tpu' is unknown; choose one of 'auto', 'torch'"):
        quantization(tmp_path, max_drop=1, max_drop_runtime="tpu")
    with pytest.raises(ValueError, match="max_drop_seconds=0 must be above 0"):
        quantization(tmp_path, max_drop=1, max_drop_seconds=0)
    for name in ("max_drop_float_layers", "max_drop_epochs"):
        with pytest.raises(ValueError, match=f"{name}=-1 must be a whole number, at least 0"):
            quantization(tmp_path, max_drop=1, **{name: -1})
    with pytest.raises(ValueError, match="max_drop=1 is for mode='ptq'"):
        quantization(tmp_path, max_drop=1, mode="qat")
    with pytest.raises(ValueError, match="max_drop=1 needs evaluate=True"):
        quantization(tmp_path, max_drop=1, evaluate=False)
    model = Wrapped()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="max_drop=1: no callback monitors a metric that could drop"):
        fit(model, tmp_path, quantization(tmp_path, max_drop=1))
    with pytest.raises(ValueError, match="gives no 'val_f1', by which .* it gives 'val_loss', 'val_acc'"):
        fit(model, tmp_path, quantization(tmp_path, max_drop=1, max_drop_metric="val_f1", rehearse=True))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Watched(Wrapped):
    """Keeps what the training steps after training saw."""

    def __init__(self) -> None:
        super().__init__()
        self.late = Notes()
        self.validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.training and hasattr(self.model, "lq_quantizers"):
            assert (self.current_epoch, self.trainer.max_epochs) == (7, 8)  # the last of the training
            (optimizer,) = self.trainer.optimizers
            prepared = lq.quantizers(self.model)
            rounds = [q.state for q in prepared.values()]
            self.late.add({"lr": optimizer.param_groups[0]["lr"], "training": self.training, "states": rounds})
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.filterwarnings("ignore:.*falls short by")
def test_some_epochs_with_fake_quantizers_come_last(tmp_path: Path) -> None:
    model = Watched()
    overrides = {"*": {"weight_bits": 2}}
    callback = quantization(
        tmp_path,
        max_drop=0.0,
        max_drop_runtime="torch",
        max_drop_float_layers=0,
        max_drop_epochs=3,
        calibrator="minmax",
        overrides=overrides,
        rehearse=True,
    )
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", mode="min")
    settings = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    trainer = fit(model, tmp_path, callback, 8, callbacks=[checkpoint], **settings)
    assert callback.result is not None and callback.result.tuning is not None
    tuning = callback.result.tuning
    print(tuning)
    assert tuning.steps[-1].fine_tuned and "fine-tuned with fake-quantizers" in str(tuning)
    assert len(model.late.all) == 3 * len(loader()) and all(step["training"] for step in model.late.all)
    assert all(step["lr"] == pytest.approx(0.001) for step in model.late.all)
    assert all(state & QuantizerState.FAKE_QUANTIZE for step in model.late.all for state in step["states"])
    assert model.trainer is trainer and trainer.max_epochs == trainer.current_epoch == 8
    assert isinstance(model.model, Int8Module)
    assert callback.result.int8_side.metrics["val_loss"] == pytest.approx(tuning.step.metric)
    assert QuantizationResult.from_json((tmp_path / "int8" / "int8.json").read_text()) == callback.result
    assert tuning.step.fine_tuned and tuning.step.drop < min(step.drop for step in tuning.steps[:-1])
    trainer.save_checkpoint(tmp_path / "after.ckpt")  # with the weights that were trained last
    again = Watched()
    judge = Trainer(accelerator="cpu", logger=False, callbacks=[quantization(tmp_path)], enable_progress_bar=False)
    (metrics,) = judge.validate(again, loader(seed=1), ckpt_path=tmp_path / "after.ckpt", verbose=False)
    assert metrics["val_loss"] == pytest.approx(tuning.step.metric)


class Killed(Broken):
    """Ends the run in a validation after training."""

    def __init__(self, evaluations: int) -> None:
        super().__init__()
        self.left = evaluations
        self.evaluations = Notes()

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == "validate":  # not in the course of fit
            self.evaluations.add(self.trainer.global_step)
            if len(self.evaluations.all) > self.left:
                raise KeyboardInterrupt


def test_a_search_that_was_killed_goes_on(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_drop": 0.5, "max_drop_metric": "val_acc", "max_drop_runtime": "torch"}

    def run(model: Any, **more: Any) -> QuantizationCallback:
        callback = quantization(tmp_path, calibrator="minmax", **arguments)
        saved = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
        fit(model, tmp_path, callback, callbacks=[saved], enable_checkpointing=True, **more)
        return callback

    with pytest.raises(SystemExit):
        run(Killed(4))
    (journal,) = tmp_path.glob(".lq-search-*.json")
    kept = len(json.loads(journal.read_text())["steps"])
    assert kept == 3  # the float model is the fourth
    model = Killed(1000)
    result = run(model, ckpt_path=tmp_path / "checkpoints" / "last.ckpt").result
    assert result is not None and result.tuning is not None and result.tuning.float_layers == ("3",)
    whole = Killed(1000)
    run(whole, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert len(model.evaluations.all) == len(whole.evaluations.all) - kept
    assert not list(tmp_path.glob(".lq-search-*.json"))


class Scaled(Wrapped):
    """Parameters of its own behind the network, which a fine-tuning trains along with it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))
        self.seen = 0
        self.rate = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)

    def on_train_end(self) -> None:
        self.rate = 1e5  # from now on, training does nothing but harm


def test_a_fine_tuning_that_is_not_taken_leaves_nothing_behind(tmp_path: Path) -> None:
    model = Scaled()
    settings: dict[str, Any] = {"max_drop": 0.0, "max_drop_metric": "val_loss", "max_drop_float_layers": 0}
    settings["overrides"] = {"*": {"weight_bits": 2}}
    callback = quantization(tmp_path, module="model", max_drop_epochs=1, **settings)
    early = EarlyStopping("val_loss", mode="min", patience=9)
    with pytest.warns(UserWarning, match="falls short"):
        trainer = fit(model, tmp_path, callback, callbacks=[early])
    assert callback.result is not None and callback.result.tuning is not None
    tuning = callback.result.tuning
    assert tuning.steps[-1].fine_tuned and not tuning.step.fine_tuned
    assert model.scale.abs().max() < 10 and model.seen == 2 * trainer.num_training_batches
    (metrics,) = trainer.validate(model, loader(seed=1), verbose=False)
    assert metrics["val_loss"] == pytest.approx(tuning.step.metric, rel=1e-4)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        x, y = images(16)
        while True:
            yield from zip(x, y, strict=True)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_fine_tuning_with_data_that_never_end(tmp_path: Path) -> None:
    class Counted(Broken):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            steps.append(batch_idx)

    steps: list[int] = []
    arguments: dict[str, Any] = {"max_drop": 0.0, "max_drop_metric": "val_acc", "max_drop_float_layers": 0}
    callback = quantization(tmp_path, max_drop_epochs=2, calibration_batches=2, **arguments)
    with pytest.warns(UserWarning, match="falls short"):
        fit(Counted(), tmp_path, callback, epochs=-1, max_steps=5, data=DataLoader(Endless(), 8), val_check_interval=5)
    assert steps == [*range(5)] * 3
