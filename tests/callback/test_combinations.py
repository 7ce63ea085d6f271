"""The callback beside whatever else a training has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelPruning,
    ModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

import lq
from helpers.classifiers import Configured, Direct, TwoParts, Wrapped, images
from helpers.modes import both_modes
from helpers.modules import (
    BuiltInSetup,
    CompiledInside,
    Embedded,
    Finetuned,
    FromCommandLine,
    Manual,
    OtherMethod,
    Several,
)
from helpers.runs import (
    BATCHES,
    StopBehind,
    assert_same,
    every_epoch,
    interrupted,
    is_int8,
    logits,
    module,
    quantization,
    state_of,
    train_data,
    trainer,
    val_data,
)
from lq import Int8Module, QuantizationCallback
from lq.numerics.functional import choose_qparams


def accuracy(model: Any, folder: Path) -> float:
    return trainer(folder).validate(model, val_data(), verbose=False)[0]["val_acc"]


@both_modes
@pytest.mark.parametrize(
    "cls",
    [
        pytest.param(Direct, marks=pytest.mark.support("Modules", "Layers on the LightningModule itself")),
        pytest.param(Wrapped, marks=pytest.mark.support("Modules", "One submodule, such as `self.model`")),
        pytest.param(TwoParts, marks=pytest.mark.support("Modules", "Several submodules, such as backbone and head")),
        pytest.param(BuiltInSetup, marks=pytest.mark.support("Modules", "Layers built in `setup`")),
        pytest.param(Configured, marks=pytest.mark.support("Modules", "Layers built in `configure_model`")),
        pytest.param(
            Several, marks=pytest.mark.support("Modules", "Several inputs, keyword arguments, settings, dict outputs")
        ),
        pytest.param(Embedded, marks=pytest.mark.support("Modules", "Integer inputs")),
        pytest.param(
            OtherMethod,
            marks=pytest.mark.support("Modules", "A `training_step` that does not call `forward`"),
        ),
        pytest.param(Manual, marks=pytest.mark.support("Training", "Manual optimization with several optimizers")),
        pytest.param(CompiledInside, marks=pytest.mark.support("Training", "`torch.compile` of the network")),
    ],
)
def test_modules(cls: type, mode: str, tmp_path: Path) -> None:
    model = module(cls)
    epochs = 12 if cls is Embedded else 4
    trainer(tmp_path, quantization(tmp_path, mode=mode), epochs=epochs).fit(model, train_data(), val_data())
    assert is_int8(model)
    assert accuracy(model, tmp_path) >= (0.8 if cls is Embedded else 0.95)


@both_modes
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler, of itself
@pytest.mark.support("Training", "`torch.compile` of the LightningModule")
def test_compiled_module(mode: str, tmp_path: Path) -> None:
    model = module()
    compiled: Any = torch.compile(model, backend="eager")
    run = trainer(tmp_path, quantization(tmp_path, mode=mode), epochs=4)
    run.fit(compiled, train_data(), val_data())
    assert is_int8(model)
    (found,) = run.validate(compiled, val_data(), verbose=False)
    assert found["val_acc"] >= 0.95


@both_modes
@pytest.mark.support("Training", "`overrides`: in training, in checkpoints, after conversion")
def test_overrides(mode: str, tmp_path: Path) -> None:
    overrides = {"3": {"weight_bits": 4}, "8": None}
    model, checkpoint = module(), every_epoch(tmp_path)
    trainer(tmp_path, quantization(tmp_path, mode=mode, overrides=overrides), checkpoint, epochs=4).fit(
        model, train_data(), val_data()
    )
    assert int(model.model.state_dict()["3.weight"].abs().max()) == 7
    assert model.model.state_dict()["8.weight"].dtype == torch.float32
    assert accuracy(model, tmp_path) >= 0.9
    if mode == "qat":
        by_hand = lq.quantize_checkpoint(checkpoint.last_model_path, Wrapped, evaluate=False)
        loaded = lq.load(by_hand.artifact)
        assert isinstance(loaded, Int8Module)
        assert [layer.name for layer in lq.report(loaded).float_layers if "overrides" in layer.reason] == ["8"]


@pytest.mark.support("Training", "A compiled network trains to the ranges of one that is not")
def test_compiled_network_has_the_same_ranges(tmp_path: Path) -> None:
    plain, compiled = module(), module(CompiledInside)
    compiled.model._orig_mod.load_state_dict(plain.model.state_dict())
    for model in (plain, compiled):
        trainer(tmp_path, quantization(tmp_path, mode="qat", convert=False)).fit(model, train_data())
    inside = lq.quantizers(compiled.model._orig_mod)
    for name, quantizer in lq.quantizers(plain.model).items():
        assert quantizer.calibrated or not quantizer.rounds
        torch.testing.assert_close(inside[name].scale, quantizer.scale)
        # What is only watched for other targets has its scale when it is converted for one of these.
        torch.testing.assert_close(inside[name].observer.range(), quantizer.observer.range())


@both_modes
@pytest.mark.support("Training", "Gradient accumulation and gradient clipping")
def test_accumulation_and_clipping(mode: str, tmp_path: Path) -> None:
    frozen: list[bool] = []

    class Watched(Wrapped):
        def on_train_batch_end(self, *args: Any) -> None:
            if mode == "qat":
                frozen.append(not lq.quantizers(self.model)["input"].state & lq.QuantizerState.OBSERVE)

    model = module(Watched)
    callback = quantization(tmp_path, mode=mode, observer_freeze=0.5)
    run = trainer(tmp_path, callback, epochs=6, accumulate_grad_batches=2, gradient_clip_val=1.0)
    run.fit(model, train_data(), val_data())
    assert accuracy(model, tmp_path) >= 0.9
    # Half of the batches, of which two make a step.
    assert frozen == ([False] * 3 * BATCHES + [True] * 3 * BATCHES if mode == "qat" else [])


@pytest.mark.support("Training", "With several optimizers, which share of the training is over is counted in batches")
def test_share_of_the_training(tmp_path: Path) -> None:
    frozen: list[bool] = []

    class Watched(Manual):
        def on_train_batch_end(self, *args: Any) -> None:
            frozen.append(not lq.quantizers(self.model)["input"].state & lq.QuantizerState.OBSERVE)

    callback = quantization(tmp_path, mode="qat", observer_freeze=0.5, convert=False)
    trainer(tmp_path, callback, epochs=2).fit(module(Watched), train_data())
    assert frozen == [False] * BATCHES + [True] * BATCHES


def converted_from(run: Trainer, folder: Path) -> dict[str, torch.Tensor]:
    run.save_checkpoint(folder / "after.ckpt")
    found: dict[str, torch.Tensor] = torch.load(folder / "after.ckpt", weights_only=True)["state_dict"]
    return found


class Remember(Callback):
    """The weights when everything else that ends with training has ended."""

    def on_fit_end(self, run: Trainer, pl_module: LightningModule) -> None:
        self.weights = state_of(pl_module)


@both_modes
@pytest.mark.support("Callbacks", "`EMAWeightAveraging`, `WeightAveraging`: the average is converted, best or last")
def test_weight_averaging(mode: str, tmp_path: Path) -> None:
    for name, checkpoints in (("last", ()), ("best", (every_epoch(tmp_path, monitor="val_loss"),))):
        averaging, remember = EMAWeightAveraging(decay=0.7), Remember()
        callback, model = quantization(tmp_path, mode=mode), module()
        run = trainer(tmp_path, remember, callback, averaging, *checkpoints, epochs=4)
        if mode == "ptq":
            run = trainer(tmp_path, averaging, remember, callback, *checkpoints, epochs=4)
        run.fit(model, train_data(), val_data())
        expected = remember.weights
        if name == "best":
            expected = torch.load(checkpoints[0].best_model_path, weights_only=True)["state_dict"]
        run._callback_connector.trainer.callbacks.remove(averaging)  # which would write its own average
        found = converted_from(run, tmp_path)
        assert all(torch.equal(found[key], expected[key]) for key in found)
        assert accuracy(model, tmp_path) >= 0.95


@pytest.mark.support("Callbacks", "`EMAWeightAveraging` with QAT: resumes exactly")
def test_weight_averaging_resumes(tmp_path: Path) -> None:
    metrics = {}

    def run(folder: Path, *more: Callback) -> Trainer:
        callbacks = (quantization(folder, mode="qat"), EMAWeightAveraging(decay=0.7), *more)
        return trainer(folder, *callbacks, epochs=3)

    whole, resumed = module(), module(seed=1)
    first = run(tmp_path / "whole")
    first.fit(whole, train_data(), val_data())
    metrics["whole"] = {k: float(v) for k, v in first.callback_metrics.items()}
    checkpoint = every_epoch(tmp_path)
    interrupted(run(tmp_path, StopBehind(2 * BATCHES), checkpoint), module(), train_data(), val_data())
    second = run(tmp_path)
    second.fit(resumed, train_data(), val_data(), ckpt_path=checkpoint.last_model_path)
    assert_same(state_of(resumed), state_of(whole))
    assert {k: float(v) for k, v in second.callback_metrics.items()} == metrics["whole"]


def test_an_averaged_checkpoint_has_the_ranges_of_its_average(tmp_path: Path) -> None:
    checkpoint = every_epoch(tmp_path)
    callbacks = (quantization(tmp_path, mode="qat"), EMAWeightAveraging(decay=0.7), checkpoint)
    model = module()
    trainer(tmp_path, *callbacks, epochs=2).fit(model, train_data(), val_data())
    by_hand = lq.quantize_checkpoint(checkpoint.last_model_path, Wrapped, evaluate=False, output_dir=tmp_path / "hand")
    x, _ = images(32, seed=5)
    assert torch.equal(lq.load(by_hand.artifact)(x), model(x))
    fresh = module(seed=2)
    run = trainer(tmp_path, quantization(tmp_path))
    run.validate(fresh, val_data(), ckpt_path=checkpoint.last_model_path, verbose=False)
    for name, quantizer in lq.quantizers(fresh.model).items():
        if not quantizer.rounds:
            continue  # watched for other targets, and given a scale when it is converted for one of these
        low, high = quantizer.observer.range()
        scale, zero_point = choose_qparams(low, high, quantizer.spec)
        assert torch.equal(quantizer.scale, scale), name
        assert torch.equal(quantizer.zero_point, zero_point), name


@pytest.mark.support("Callbacks", "An averaging callback before the QAT callback is refused, with the order that works")
@pytest.mark.parametrize("averaging", [EMAWeightAveraging(), StochasticWeightAveraging(0.1)])
def test_averaging_before_quantizers_is_refused(averaging: Callback, tmp_path: Path) -> None:
    name = type(averaging).__name__
    with pytest.raises(ValueError, match=rf"{name} copies the model.*callbacks=\[QuantizationCallback.*{name}"):
        trainer(tmp_path, averaging, quantization(tmp_path, mode="qat")).fit(module(), train_data())
    with pytest.raises(ValueError, match=rf"{name} copies the model before LightningModule.setup has made its layers"):
        trainer(tmp_path, quantization(tmp_path, mode="qat"), averaging).fit(module(BuiltInSetup), train_data())


@both_modes
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.support("Callbacks", "`StochasticWeightAveraging`: the average is converted")
def test_stochastic_weight_averaging(mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    swa, remember = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1), Remember()
    callback, model = quantization(tmp_path, mode=mode), module()
    run = trainer(tmp_path, remember, callback, swa, every_epoch(tmp_path, monitor="val_loss"), epochs=4)
    run.fit(model, train_data(), val_data())
    found = converted_from(run, tmp_path)
    assert all(torch.equal(found[key], remember.weights[key]) for key in found)
    assert not torch.equal(found["model.1.running_mean"], torch.zeros(8))
    assert callback.result is not None and "averaged" in callback.result.weights
    assert accuracy(model, tmp_path) >= 0.9


@both_modes
@pytest.mark.support("Callbacks", "`ModelPruning`: pruned weights are zero in INT8")
def test_pruning(mode: str, tmp_path: Path) -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.5, use_global_unstructured=True, verbose=0)
    model = module()
    run = trainer(tmp_path, quantization(tmp_path, mode=mode), pruning, every_epoch(tmp_path), epochs=4)
    run.fit(model, train_data(), val_data())
    assert is_int8(model)
    found = converted_from(run, tmp_path)
    weights = torch.cat(
        [value.flatten() for key, value in found.items() if key in ("model.0.weight", "model.3.weight")]
    )
    assert (weights == 0).float().mean() >= 0.4
    integers = model.model.state_dict()["3.weight"]
    assert (integers == 0).float().mean() >= 0.4
    expected = logits(model)
    run.validate(model, val_data(), verbose=False)
    run.validate(model, val_data(), ckpt_path="best", verbose=False)
    assert is_int8(model) and torch.equal(logits(model), expected)


@both_modes
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.support("Callbacks", "`BackboneFinetuning`")
def test_finetuning(mode: str, tmp_path: Path) -> None:
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.0, verbose=False)
    model = module(Finetuned)
    trainer(tmp_path, quantization(tmp_path, mode=mode), finetuning, epochs=4).fit(model, train_data(), val_data())
    assert is_int8(model)
    assert accuracy(model, tmp_path) >= 0.9


@both_modes
@pytest.mark.filterwarnings("ignore:.*RichProgressBar")
@pytest.mark.support("Callbacks", "`LearningRateMonitor`, `ModelSummary`, `RichProgressBar`")
def test_onlookers(mode: str, tmp_path: Path) -> None:
    class Scheduled(Wrapped):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    onlookers = [LearningRateMonitor(), ModelSummary(max_depth=3), RichProgressBar()]
    model, logger = module(Scheduled), CSVLogger(tmp_path)
    run = trainer(tmp_path, quantization(tmp_path, mode=mode), *onlookers, logger=logger, enable_progress_bar=True)
    run.fit(model, train_data(), val_data())
    assert is_int8(model)
    assert "lr-SGD" in (Path(logger.log_dir) / "metrics.csv").read_text()


@both_modes
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's own call
@pytest.mark.support("Callbacks", "`LightningCLI`: the callback from YAML")
def test_cli(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
        seed_everything: 0
        trainer:
          max_epochs: 2
          accelerator: cpu
          logger: false
          enable_checkpointing: false
          enable_progress_bar: false
          enable_model_summary: false
          log_every_n_steps: 1
          callbacks:
            - class_path: lq.QuantizationCallback
              init_args:
                mode: {mode}
                target: x86_avx2
                evaluate: false
                export: [pt2]
                overrides:
                  "3":
                    weight_bits: 5
                  "8": null
                output_dir: {tmp_path / "int8"}
        """
    )
    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--config", str(config)])
    cli = LightningCLI(FromCommandLine, save_config_callback=None)
    assert is_int8(cli.model)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, QuantizationCallback))
    assert callback.result is not None and callback.result.mode == mode
    assert int(cli.model.model.state_dict()["3.weight"].abs().max()) == 15
