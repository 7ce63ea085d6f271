"""A second fit, a second model, a fit behind conversion: it works, or says why not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import lq
from helpers.classifiers import Direct, Wrapped
from helpers.modes import both_modes
from helpers.runs import every_epoch, is_int8, logits, module, quantization, state_of, train_data, trainer, val_data
from lq import QuantizerState


def float_weights(run: Any, folder: Path) -> dict[str, torch.Tensor]:
    run.save_checkpoint(folder / "now.ckpt")
    found: dict[str, torch.Tensor] = torch.load(folder / "now.ckpt", weights_only=True)["state_dict"]
    return found


@both_modes
@pytest.mark.parametrize("cls", [Wrapped, Direct])
@pytest.mark.support("Reuse", "A second `fit` after conversion trains on from the float weights, and converts again")
def test_fit_after_conversion(cls: type, mode: str, tmp_path: Path) -> None:
    model, callback, starts = module(cls), quantization(tmp_path, mode=mode), []
    run = trainer(tmp_path, callback, epochs=1)
    run.fit(model, train_data(), val_data())
    converted, weights = logits(model), float_weights(run, tmp_path)

    class Watch(Callback):
        def on_train_start(self, run: Any, pl_module: Any) -> None:
            starts.append(state_of(pl_module))
            if mode == "qat":
                unit = pl_module if cls is Direct else pl_module.model
                assert all(q.state & QuantizerState.OBSERVE for q in lq.quantizers(unit).values())

    again = trainer(tmp_path, callback, Watch(), epochs=2)
    again.fit(model, train_data(), val_data())
    assert all(torch.equal(starts[0][key], value) for key, value in weights.items())
    assert is_int8(model)
    assert callback.result is not None
    after = float_weights(again, tmp_path)
    assert not all(torch.equal(after[key], value) for key, value in weights.items())
    assert not torch.equal(logits(model), converted)


@both_modes
@pytest.mark.support("Reuse", "The same Trainer and callback once more, with more epochs")
def test_same_trainer(mode: str, tmp_path: Path) -> None:
    model = module()
    run = trainer(tmp_path, quantization(tmp_path, mode=mode), epochs=1)
    run.fit(model, train_data(), val_data())
    first = logits(model)
    run.fit_loop.max_epochs = 3
    run.fit(model, train_data(), val_data())
    assert run.current_epoch == 3
    assert is_int8(model)
    assert not torch.equal(logits(model), first)


@pytest.mark.support("Reuse", "PTQ and then QAT of the same module, and the other way round")
def test_one_mode_after_the_other(tmp_path: Path) -> None:
    model = module()
    for mode in ("ptq", "qat", "ptq"):
        callback = quantization(tmp_path, mode=mode)
        trainer(tmp_path, callback, epochs=1).fit(model, train_data(), val_data())
        assert callback.result is not None and callback.result.mode == mode
        assert is_int8(model)


@pytest.mark.filterwarnings("ignore:lq. this CPU has no VNNI")
@pytest.mark.support("Reuse", "QAT for another target after conversion")
@pytest.mark.filterwarnings("ignore:.*this CPU's INT8 kernels get it wrong")
def test_another_target(tmp_path: Path) -> None:
    model = module()
    for target in ("x86_avx2", "tensorrt"):
        callback = quantization(tmp_path, mode="qat", target=target, export=["pt2"])
        trainer(tmp_path, callback, epochs=1).fit(model, train_data(), val_data())
        assert callback.result is not None and callback.result.target == target


@both_modes
@pytest.mark.support("Reuse", "A second model with the same callback and Trainer")
def test_second_model(mode: str, tmp_path: Path) -> None:
    callback = quantization(tmp_path, mode=mode)
    for seed in range(2):
        model = module(seed=seed)
        trainer(tmp_path, callback, epochs=1).fit(model, train_data(), val_data())
        assert is_int8(model)
        assert callback.result is not None


@pytest.mark.support("Reuse", "`convert=False`, and a later run that converts")
def test_conversion_in_a_later_run(tmp_path: Path) -> None:
    model = module()
    trainer(tmp_path, quantization(tmp_path, mode="qat", convert=False), epochs=1).fit(model, train_data())
    assert not is_int8(model)
    trainer(tmp_path, quantization(tmp_path, mode="qat"), epochs=2).fit(model, train_data())
    assert is_int8(model)


@pytest.mark.support("Reuse", "A module that was prepared by hand for something else is refused before training")
def test_prepared_by_hand(tmp_path: Path) -> None:
    for mode, target in (("ptq", "x86_avx2"), ("qat", "tensorrt")):
        model = module()
        lq.prepare(model.model, torch.randn(2, 3, 8, 8), target=target, mode=mode)
        callback = quantization(tmp_path, mode="qat")
        with pytest.raises(ValueError, match=rf"prepared for mode='{mode}' and target '{target}'; call lq.unprepare"):
            trainer(tmp_path, callback, epochs=1).fit(model, train_data())
    model = module()
    lq.prepare(model.model, torch.randn(2, 3, 8, 8), target="x86_avx2", mode="qat")
    trainer(tmp_path, quantization(tmp_path, mode="qat"), epochs=1).fit(model, train_data())
    assert is_int8(model)


@both_modes
@pytest.mark.support("Reuse", "`fit(ckpt_path=...)` into a converted module")
def test_resume_after_conversion(mode: str, tmp_path: Path) -> None:
    model = module()
    run = trainer(tmp_path, quantization(tmp_path, mode=mode), every_epoch(tmp_path), epochs=1)
    run.fit(model, train_data(), val_data())
    whole = module()
    trainer(tmp_path, quantization(tmp_path / "whole", mode=mode, observer_freeze=None), epochs=2).fit(
        whole, train_data(), val_data()
    )
    again = trainer(tmp_path, quantization(tmp_path, mode=mode, observer_freeze=None), epochs=2)
    again.fit(model, train_data(), val_data(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert is_int8(model)
    assert again.current_epoch == 2
    if mode == "ptq":
        assert torch.equal(logits(model), logits(whole))


@pytest.mark.support("Reuse", "A module that is copied or pickled keeps its stage and its checkpoints")
def test_copies(tmp_path: Path) -> None:

    model = module()
    trainer(tmp_path, quantization(tmp_path, mode="qat", convert=False), epochs=1).fit(model, train_data())
    model.trainer = None
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    checkpoint: dict[str, Any] = {"state_dict": twin.state_dict()}
    twin.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == Wrapped().state_dict().keys()
    with torch.no_grad():
        twin.model[0].weight.zero_()
    checkpoint = {"state_dict": twin.state_dict()}
    twin.on_save_checkpoint(checkpoint)
    assert not checkpoint["state_dict"]["model.0.weight"].any()
