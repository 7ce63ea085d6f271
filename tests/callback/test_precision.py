"""Trainer(precision=...): ranges stay in float32, and the INT8 model is as good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision

import lq
from helpers.modes import both_modes
from helpers.runs import every_epoch, logits, module, quantization, state_of, train_data, trainer, val_data
from lq import Int8Module, QuantizationCallback

PRECISIONS = ["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"]


def precise(folder: Path, callback: QuantizationCallback, precision: Any, **kwargs: Any) -> Trainer:
    if precision == "16-mixed":  # for GPUs: asked for by name, Lightning takes bfloat16 on a CPU
        return trainer(folder, callback, plugins=[MixedPrecision(precision, "cpu")], **kwargs)
    return trainer(folder, callback, precision=precision, **kwargs)


@both_modes
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.support("Precision", "`32-true`, `16-mixed`, `bf16-mixed`, `16-true`, `bf16-true`, `64-true`: PTQ and QAT")
def test_precision(precision: str, mode: str, tmp_path: Path) -> None:
    model = module()
    ranges: dict[str, torch.dtype] = {}

    class Watched(type(model)):  # type: ignore[misc]
        def on_train_end(self) -> None:
            if mode == "qat":
                for name, quantizer in lq.quantizers(self.model).items():
                    ranges.update({f"{name}.{key}": value.dtype for key, value in quantizer.named_buffers()})

    model = module(Watched)
    run = precise(tmp_path, quantization(tmp_path, mode=mode), precision, epochs=4)
    assert run.precision == precision
    run.fit(model, train_data())
    assert isinstance(model.model, Int8Module)
    assert model.dtype == torch.float32
    assert set(ranges.values()) <= {torch.float32, torch.int32}
    assert bool(ranges) == (mode == "qat")
    run.save_checkpoint(tmp_path / "int8.ckpt")
    (int8,) = trainer(tmp_path).validate(model, val_data(), verbose=False)
    weights = type(model).load_from_checkpoint(tmp_path / "int8.ckpt")
    (floating,) = trainer(tmp_path).validate(weights, val_data(), verbose=False)
    assert floating["val_acc"] == 1.0
    assert int8["val_acc"] >= 0.95
    assert int8["val_loss"] == pytest.approx(floating["val_loss"], abs=0.2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.support("Precision", "A resumed QAT run in `bf16-mixed` or `bf16-true` is exact")
def test_resume(precision: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mode": "qat", "convert": False}
    whole, resumed = module(), module(seed=1)
    run = trainer(tmp_path, quantization(tmp_path, **settings), every_epoch(tmp_path), epochs=3, precision=precision)
    run.fit(whole, train_data())
    again = trainer(tmp_path, quantization(tmp_path, **settings), epochs=3, precision=precision)
    again.fit(resumed, train_data(), ckpt_path=tmp_path / "checkpoints" / "epoch=1-step=8.ckpt")
    for key, value in state_of(whole).items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.support("Precision", "QAT under autocast trains to the accuracy of float32")
def test_qat_under_autocast_is_as_accurate(tmp_path: Path) -> None:
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        model = module()
        run = precise(tmp_path, quantization(tmp_path, mode="qat"), precision, epochs=8)
        run.fit(model, train_data())
        losses[precision] = trainer(tmp_path).validate(model, val_data(), verbose=False)[0]["val_loss"]
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], abs=0.02)


@pytest.mark.support("Precision", "A failed conversion leaves a `bf16-true` module in bfloat16")
def test_failure_leaves_the_precision(tmp_path: Path) -> None:
    model = module()
    run = trainer(tmp_path, quantization(tmp_path, weights="best"), epochs=1, precision="bf16-true")
    with pytest.raises(ValueError, match="weights='best'"):
        run.fit(model, train_data())
    assert model.model[0].weight.dtype == torch.bfloat16
    assert logits(model.float()).shape == (32, 4)


@pytest.mark.support("Precision", "Any other (`transformer-engine`, bitsandbytes): refused at once")
def test_other_precisions_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, quantization(tmp_path))
    run.strategy.precision_plugin.precision = "transformer-engine"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="does not work with precision='transformer-engine'; choose one of '32-true'"):
        run.fit(module(), train_data())
