"""Checkpoints of every kind, into modules in every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lq
from helpers.classifiers import Configured, Direct, TwoParts, Wrapped
from helpers.modes import both_modes
from helpers.modules import BuiltInSetup
from helpers.runs import (
    BATCHES,
    Recorder,
    StatefulLoader,
    StopBehind,
    assert_same,
    every_epoch,
    interrupted,
    logits,
    module,
    quantization,
    state_of,
    train_data,
    trainer,
    val_data,
)
from lq import Int8Module


@pytest.mark.parametrize("cls", [Wrapped, Direct, TwoParts, Configured, BuiltInSetup])
@pytest.mark.support("Checkpoints", 'QAT resumes exactly: weights, ranges, metrics (`ckpt_path=PATH` or `"last"`)')
def test_qat_resumes_exactly(cls: type, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mode": "qat", "convert": False, "observer_freeze": 0.7, "batch_norm_freeze": 0.7}
    whole, metrics = module(cls), Recorder()
    trainer(tmp_path, quantization(tmp_path, **settings), metrics, epochs=4).fit(whole, train_data(), val_data())

    first = trainer(
        tmp_path, quantization(tmp_path, **settings), StopBehind(2 * BATCHES + 1), every_epoch(tmp_path), epochs=4
    )
    interrupted(first, module(cls), train_data(), val_data())
    resumed, after = module(cls, seed=1), Recorder()
    second = trainer(tmp_path, quantization(tmp_path, **settings), after, every_epoch(tmp_path), epochs=4)
    second.fit(resumed, train_data(), val_data(), ckpt_path="last")
    assert set(after.epochs) == {2, 3}
    assert_same(state_of(resumed), state_of(whole))
    assert after.epochs == {epoch: metrics.epochs[epoch] for epoch in (2, 3)}


@pytest.mark.support("Checkpoints", "QAT resumes exactly from the middle of an epoch, with a stateful dataloader")
def test_qat_resumes_exactly_from_the_middle_of_an_epoch(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mode": "qat", "convert": False, "observer_freeze": 0.5}
    whole = module()
    trainer(tmp_path, quantization(tmp_path, **settings), epochs=3).fit(whole, StatefulLoader())
    checkpoint = every_epoch(tmp_path, every_n_train_steps=1)
    first = trainer(tmp_path, quantization(tmp_path, **settings), StopBehind(BATCHES + 2), checkpoint, epochs=3)
    interrupted(first, module(), StatefulLoader())
    resumed = module(seed=1)
    second = trainer(tmp_path, quantization(tmp_path, **settings), every_epoch(tmp_path), epochs=3)
    second.fit(resumed, StatefulLoader(), ckpt_path="last")
    assert_same(state_of(resumed), state_of(whole))


def test_ranges_in_a_checkpoint_are_those_of_its_weights(tmp_path: Path) -> None:
    checkpoint = every_epoch(tmp_path, every_n_train_steps=1)
    run = trainer(tmp_path, quantization(tmp_path, mode="qat", convert=False), StopBehind(3), checkpoint)
    interrupted(run, module(), train_data())
    contents = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    weight = contents["state_dict"]["model.3.weight"]
    assert torch.equal(contents["lq"]["quantizers"]["3.weight.quantizer.observer.max_val"], weight.flatten(1).amax(1))


@pytest.mark.support("Checkpoints", "PTQ resumes exactly, and ends with the same INT8 model")
def test_ptq_resumes_exactly(tmp_path: Path) -> None:
    whole, resumed = module(), module(seed=1)
    trainer(tmp_path, quantization(tmp_path), epochs=3).fit(whole, train_data())
    first = trainer(tmp_path, quantization(tmp_path), StopBehind(BATCHES + 1), every_epoch(tmp_path), epochs=3)
    interrupted(first, module(), train_data())
    second = trainer(tmp_path, quantization(tmp_path), every_epoch(tmp_path), epochs=3)
    second.fit(resumed, train_data(), ckpt_path="last")
    assert_same(state_of(resumed), state_of(whole))
    assert torch.equal(logits(resumed), logits(whole))


@pytest.mark.parametrize("cls", [Wrapped, Direct, Configured, BuiltInSetup])
@pytest.mark.support("Checkpoints", "A float checkpoint starts a QAT run")
def test_float_checkpoint_starts_qat(cls: type, tmp_path: Path) -> None:
    trainer(tmp_path, every_epoch(tmp_path), epochs=1).fit(module(cls), train_data())
    path = tmp_path / "checkpoints" / "last.ckpt"
    weights = torch.load(path, weights_only=True)["state_dict"]
    seen = []

    class Watched(cls):  # type: ignore[misc]
        def on_train_start(self) -> None:
            seen.append({key: value.clone() for key, value in self.state_dict().items() if key in weights})

    tuned = module(Watched, seed=1)
    callback = quantization(tmp_path, mode="qat", convert=False)
    trainer(tmp_path, callback, epochs=2).fit(tuned, train_data(), ckpt_path=path)
    assert_same(seen[0], weights)
    assert lq.quantizers(tuned if cls is Direct else tuned.model)["input" if cls is not Direct else "x"].calibrated


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float, a QAT and an INT8 checkpoint of the same module class, and INT8 made by PTQ."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for name, mode in (("float", "ptq"), ("qat", "qat")):
        model, checkpoint = module(), every_epoch(folder / name, monitor="val_loss", save_top_k=1)
        run = trainer(folder, quantization(folder / name, mode=mode), checkpoint, epochs=2)
        run.fit(model, train_data(), val_data())
        paths[name] = Path(checkpoint.best_model_path)
        after = {"float": "int8_ptq", "qat": "int8_qat"}[name]
        paths[after] = folder / f"{after}.ckpt"
        run.save_checkpoint(paths[after])
        torch.save(logits(model), folder / f"{after}.logits")
        only = folder / f"{name}_weights_only.ckpt"
        run.save_checkpoint(only, weights_only=True)
        paths[f"{after}_weights_only"] = only
    return paths


@pytest.mark.support("Checkpoints", "All load into the plain module: `load_from_checkpoint`, strict")
def test_every_checkpoint_is_a_float_checkpoint(checkpoints: dict[str, Path]) -> None:
    float_keys = Wrapped().state_dict().keys()
    for name, path in checkpoints.items():
        contents = torch.load(path, weights_only=True)  # tensors and primitives alone
        assert contents["state_dict"].keys() == float_keys
        loaded = Wrapped.load_from_checkpoint(path, weights_only=True)
        assert type(loaded.model) is nn.Sequential
        assert ("lq" in contents) == (name != "float")
        if name.startswith("int8"):
            network = "float" if "ptq" in name else "qat"
            best = torch.load(checkpoints[network], weights_only=True)["state_dict"]
            assert_same(contents["state_dict"], best)


@pytest.mark.support("Checkpoints", "`save_weights_only=True`, and `weights_only=True` when loading")
def test_weights_only_checkpoints_keep_the_ranges(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name in ("int8_ptq", "int8_qat"):
        whole = torch.load(checkpoints[name], weights_only=True)
        weights = torch.load(checkpoints[f"{name}_weights_only"], weights_only=True)
        assert "optimizer_states" in whole and "optimizer_states" not in weights
        assert_same(whole["lq"]["quantizers"], weights["lq"]["quantizers"])
    model = module(seed=2)
    checkpoint = every_epoch(tmp_path, save_weights_only=True)
    trainer(tmp_path, quantization(tmp_path, mode="qat", convert=False), checkpoint).fit(model, train_data())
    contents = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert contents["state_dict"].keys() == Wrapped().state_dict().keys()
    assert contents["lq"]["stage"] == "prepared"


def kind_of(model: Any) -> str:
    if isinstance(model.model, Int8Module):
        return "int8"
    return "qat" if "forward" in model.model.__dict__ else "float"


@both_modes
@pytest.mark.parametrize("stage", ["fresh", "prepared", "converted"])
@pytest.mark.parametrize("name", ["float", "qat", "int8_ptq", "int8_qat"])
@pytest.mark.support(
    "Checkpoints", "`validate`, `test`, `predict` with `ckpt_path=PATH`, before and after conversion: float, QAT, INT8"
)
def test_evaluation_of_a_checkpoint(
    name: str, stage: str, mode: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model, callback = module(seed=3), quantization(tmp_path, mode=mode)
    run = trainer(tmp_path, callback, epochs=1)
    if stage == "prepared":
        lq.prepare(model.model, torch.randn(2, 3, 8, 8), target=callback.target, mode="qat")
    if stage == "converted":
        run.fit(model, train_data(1))
    path = checkpoints[name]
    warns = name == "float" and stage != "fresh"
    if warns:
        with pytest.warns(UserWarning, match="is the float network again.*quantize_checkpoint"):
            found = run.validate(model, val_data(), ckpt_path=path, verbose=False)[0]
    else:
        found = run.validate(model, val_data(), ckpt_path=path, verbose=False)[0]
    expected = {"float": "float", "qat": "int8" if stage == "converted" else "qat"}.get(name, "int8")
    assert kind_of(model) == expected
    if name.startswith("int8"):
        assert torch.equal(logits(model), torch.load(path.with_suffix(".logits")))
    else:
        callbacks = torch.load(path, weights_only=True)["callbacks"]
        truth = next(float(state["best_model_score"]) for key, state in callbacks.items() if "ModelCheckpoint" in key)
        assert found["val_loss"] == pytest.approx(truth, rel=0.01 if expected == "int8" else 1e-6)
    assert torch.cat(run.predict(model, val_data(), ckpt_path=path)).shape == (64, 4)


@both_modes
@pytest.mark.support("Checkpoints", '`ckpt_path="best"` after conversion: the INT8 model that was made of it')
def test_best_after_conversion_is_the_int8_model(mode: str, tmp_path: Path) -> None:
    model, checkpoint = module(), every_epoch(tmp_path, monitor="val_loss", save_top_k=1)
    run = trainer(tmp_path, quantization(tmp_path, mode=mode), checkpoint, epochs=2)
    run.fit(model, train_data(), val_data())
    before = logits(model)
    for path in ("best", "last"):  # the last epoch is the best here
        run.validate(model, val_data(), ckpt_path=path, verbose=False)
        assert kind_of(model) == "int8"
        assert torch.equal(logits(model), before)
    run.validate(dataloaders=val_data(), ckpt_path="best", verbose=False)
    assert kind_of(model) == "int8"


@pytest.mark.support("Checkpoints", 'A QAT checkpoint trains on in float with `mode="ptq"`, or without the callback')
def test_qat_checkpoint_trains_on_in_float(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for callbacks in ((), (quantization(tmp_path, convert=False),)):
        model = module(seed=4)
        trainer(tmp_path, *callbacks, epochs=3).fit(model, train_data(), ckpt_path=checkpoints["qat"])
        assert kind_of(model) == "float"


@pytest.mark.support("Checkpoints", "One of another target or network is refused, with the reason")
def test_checkpoint_that_does_not_fit(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    run = trainer(tmp_path, quantization(tmp_path, mode="qat", target="tensorrt"), epochs=3)
    with pytest.raises(ValueError, match=r"for target 'x86_avx2', and this run is for 'tensorrt'.*target='x86_avx2'"):
        run.fit(module(), train_data(), ckpt_path=checkpoints["qat"])
    with pytest.raises(ValueError, match="written for another network than this TwoParts"):
        trainer(tmp_path, quantization(tmp_path, mode="qat"), epochs=3).fit(
            module(TwoParts), train_data(), ckpt_path=checkpoints["qat"]
        )
    later = torch.load(checkpoints["qat"], weights_only=True)
    later["lq"]["version"] = 2
    torch.save(later, tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match=r"has version 2, and this lq reads 1; update lq"):
        trainer(tmp_path, quantization(tmp_path)).validate(module(), val_data(), ckpt_path=tmp_path / "later.ckpt")


def test_float_state_loads_into_a_prepared_model() -> None:
    """The same without a Trainer."""
    model = lq.prepare(Wrapped().model, torch.randn(2, 3, 8, 8), mode="qat")
    model(torch.randn(4, 3, 8, 8))
    scale = lq.quantizers(model)["input"].scale.clone()
    other = Wrapped().model
    model.load_state_dict(other.state_dict())
    assert torch.equal(model[0].weight, other[0].weight)
    assert torch.equal(lq.quantizers(model)["input"].scale, scale)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if "input" not in k})
