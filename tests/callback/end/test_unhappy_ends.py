"""Runs that end unhappily: nothing is lost, and the message says how to go on."""

from __future__ import annotations

import io
import logging
import re
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer

import lq
from helpers.classifiers import Wrapped, images
from helpers.modes import both_modes
from helpers.modules import FromCommandLine
from helpers.processes import finish as finish_process
from helpers.processes import start
from helpers.runs import (
    BATCHES,
    InterruptionError,
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


class AtTheEnd(Callback):
    """Remembers the trained state, and then does something that makes conversion fail."""

    def __init__(self, act: Any = None) -> None:
        self.act = act

    def on_fit_end(self, run: Trainer, pl_module: Any) -> None:
        self.state = state_of(pl_module)
        if self.act is not None:
            self.act(pl_module)


class Fragile(Wrapped):
    """Its steps fail once they are told to."""

    error: BaseException | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return super().training_step(batch, batch_idx)


class FailsInInt8(Fragile):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if isinstance(self.model, Int8Module):
            raise InterruptionError
        super().validation_step(batch, batch_idx)


def finish(message: str) -> lq.QuantizationResult:
    """Do what the message says."""
    (call,) = re.findall(r"(lq\.quantize_checkpoint\(.*\))", message)
    names = {"lq": lq, "data": train_data(), "Wrapped": Wrapped, "Fragile": Fragile, "FailsInInt8": FailsInInt8}
    result: lq.QuantizationResult = eval(call.removesuffix(")") + ", evaluate=False)", names)
    return result


@both_modes
@pytest.mark.parametrize("error", [KeyboardInterrupt(), InterruptionError()], ids=["ctrl-c", "exception"])
@pytest.mark.support("Unhappy ends", "Ctrl-C, an exception in training: the message says how to go on")
def test_in_training(error: BaseException, mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = module()
    run = trainer(
        tmp_path, quantization(tmp_path, mode=mode), StopBehind(BATCHES + 1, error), every_epoch(tmp_path), epochs=3
    )
    interrupted(run, model, train_data(), error=(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)))
    path = str(tmp_path / "checkpoints" / "last.ckpt")
    assert "Training was interrupted, and nothing is converted to INT8" in caplog.text
    assert f"To go on training: trainer.fit(model, ckpt_path={path!r})" in caplog.text
    assert not any(isinstance(m, Int8Module) for m in model.modules())
    result = finish(caplog.text)
    assert result.weights == f"the weights of {path}"
    assert lq.load(result.artifact)(images(4)[0]).shape == (4, 4)
    assert result.mode == mode


def test_a_resumed_run_that_has_written_nothing_yet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, quantization(tmp_path, convert=False), every_epoch(tmp_path), epochs=1).fit(
        module(), train_data()
    )
    path = tmp_path / "checkpoints" / "last.ckpt"
    run = trainer(tmp_path, quantization(tmp_path), StopBehind(2), every_epoch(tmp_path))
    interrupted(run, module(), train_data(), ckpt_path=path)
    assert repr(str(path)) in caplog.text


def test_before_the_first_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, quantization(tmp_path), StopBehind(2), every_epoch(tmp_path))
    interrupted(run, module(), train_data())
    assert "No checkpoint was written yet" in caplog.text


@both_modes
def test_before_training_the_error_says_it_all(mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, quantization(tmp_path, mode=mode, overrides={"nowhere": None}))
    with pytest.raises(ValueError, match="'nowhere' matches nothing"):
        run.fit(module(), train_data())
    assert "interrupted" not in caplog.text
    assert run.global_step == 0


def _nan(model: Any) -> None:
    model.trainer.train_dataloader.dataset.tensors[0][:] = torch.nan


def _broken_batch_norm(model: Any) -> None:
    def fail(module: Any, args: Any, output: Any) -> Any:
        return output * torch.nan if len(output) <= 4 else output  # for the example inputs, which folding is checked on

    model.model[1].register_forward_hook(fail)


FAILURES = {
    "calibration: NaN": ("ptq", _nan, lq.CalibrationError),
    "calibration: Ctrl-C": ("ptq", lambda model: setattr(model, "error", KeyboardInterrupt()), SystemExit),
    "calibration: exception": ("ptq", lambda model: setattr(model, "error", InterruptionError()), InterruptionError),
    "INT8 evaluation, PTQ": ("ptq", None, InterruptionError),
    "INT8 evaluation, QAT": ("qat", None, InterruptionError),
    "conversion, PTQ": ("ptq", _broken_batch_norm, lq.FoldError),
    "conversion, QAT": ("qat", _broken_batch_norm, lq.FoldError),
}


@pytest.mark.parametrize("saved", [True, False], ids=["with checkpoints", "without"])
@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.support(
    "Unhappy ends", "A failure in calibration, conversion or INT8 evaluation: the module is as training left it"
)
@pytest.mark.in_turns("saved")
def test_after_training(name: str, saved: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mode, act, error = FAILURES[name]
    model, at_the_end = module(Fragile if act else FailsInInt8), AtTheEnd(act)
    callback = quantization(tmp_path, mode=mode, evaluate=act is None)
    run = trainer(tmp_path, at_the_end, callback, *([every_epoch(tmp_path)] if saved else []), epochs=1)
    interrupted(run, model, train_data(), val_data(), error=error)
    assert_same(state_of(model), at_the_end.state)
    assert not any(isinstance(m, Int8Module) for m in model.modules())
    assert ("forward" in model.model.__dict__) == (mode == "qat")
    assert logits(model).shape == (32, 4)
    assert callback.result is None
    assert "Training ended, but not the conversion to INT8" in caplog.text
    kept = tmp_path / "checkpoints" / "last.ckpt" if saved else tmp_path / "int8" / "unconverted.ckpt"
    assert repr(str(kept)) in caplog.text
    weights = torch.load(kept, weights_only=True)["state_dict"]
    assert all(torch.equal(weights[key], at_the_end.state[key]) for key in Wrapped().state_dict())
    # By hand, with what was wrong mended:
    assert lq.load(finish(caplog.text).artifact)


def test_the_message_names_what_was_written_last_and_not_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Worse(FailsInInt8):
        def on_validation_epoch_end(self) -> None:
            self.log("harm", float(self.current_epoch))

    model, at_the_end = module(Worse), AtTheEnd()
    checkpoint = every_epoch(tmp_path, monitor="harm", save_last=False)
    callback = quantization(tmp_path, evaluate=True, weights="last")
    interrupted(trainer(tmp_path, at_the_end, callback, checkpoint), model, train_data(), val_data())
    (named,) = re.findall(r"They are in the checkpoint '(.*?)'", caplog.text)
    assert named != checkpoint.best_model_path
    weights = torch.load(named, weights_only=True)["state_dict"]
    assert all(torch.equal(value, at_the_end.state[key]) for key, value in weights.items())


def on_a_full_disk(folder: Path, mode: str, saved: bool) -> None:
    """Runs in a process of its own, whose files end at 2 kB once training has: the system refuses to write on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(_: Any) -> None:
        sys.stderr = io.StringIO()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))

    log = io.StringIO()
    logging.getLogger("lq").addHandler(logging.StreamHandler(log))
    model, at_the_end = module(), AtTheEnd(fill_up)
    checkpoints = [every_epoch(folder)] if saved else []
    run = trainer(folder, at_the_end, quantization(folder, mode=mode), *checkpoints, epochs=1)
    with pytest.raises((OSError, RuntimeError)):
        run.fit(model, train_data())
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sys.stderr = sys.__stderr__
    assert_same(state_of(model), at_the_end.state)
    assert list((folder / "int8").iterdir()) == []
    if saved:
        path = folder / "checkpoints" / "last.ckpt"
        assert repr(str(path)) in log.getvalue(), log.getvalue()
        weights = Wrapped.load_from_checkpoint(path).state_dict()
        assert all(torch.equal(value, at_the_end.state[key]) for key, value in weights.items())
    else:
        assert "No checkpoint holds them, and" in log.getvalue(), log.getvalue()
        assert "cannot be written" in log.getvalue()


@pytest.mark.parametrize("saved", [True, False], ids=["with checkpoints", "without"])
@both_modes
@pytest.mark.support("Unhappy ends", "A full disk: no half-written file, the checkpoints are intact")
def test_full_disk(mode: str, saved: bool, tmp_path: Path) -> None:
    process = start(on_a_full_disk, tmp_path / "run", mode, saved, output=tmp_path / "output")
    finish_process(process, tmp_path / "output")


@pytest.mark.support("Unhappy ends", "`lq.quantize_checkpoint` and `python -m lq.recipes.quantize_checkpoint`")
def test_quantize_checkpoint_is_what_the_run_would_have_done(tmp_path: Path) -> None:
    for mode in ("ptq", "qat"):
        folder = tmp_path / mode
        model, callback = module(FromCommandLine), quantization(folder, mode=mode, calibrator=None)
        run = trainer(folder, callback, every_epoch(folder), epochs=2)
        run.fit(model)
        data = None if mode == "qat" else model.train_dataloader()
        by_hand = lq.quantize_checkpoint(
            folder / "checkpoints" / "last.ckpt",
            FromCommandLine,
            data,
            target="x86_avx2" if mode == "ptq" else None,
            evaluate=False,
        )
        assert callback.result is not None
        assert (by_hand.mode, by_hand.target, by_hand.calibrator) == (mode, "x86_avx2", callback.result.calibrator)
        x = images(32, seed=5)[0]
        assert torch.equal(lq.load(by_hand.artifact)(x), lq.load(callback.result.artifact)(x))


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return train_data()

    def val_dataloader(self) -> Any:
        return val_data()


def test_quantize_checkpoint_into_an_instance_measures(tmp_path: Path) -> None:
    run = trainer(tmp_path, every_epoch(tmp_path), epochs=3)
    run.fit(module(), train_data())
    path, model = tmp_path / "checkpoints" / "last.ckpt", module(seed=3)
    result = lq.quantize_checkpoint(path, model, Data(), target="x86_avx2", output_dir=tmp_path / "out")
    assert isinstance(model.model, Int8Module)
    assert result.float_side.metrics["val_acc"] > 0.9
    assert result.int8_side.metrics["val_acc"] > 0.9
    assert (tmp_path / "out" / "int8.json").stat().st_size > 0


def test_quantize_checkpoint_says_what_it_needs(tmp_path: Path) -> None:
    trainer(tmp_path, every_epoch(tmp_path), epochs=1).fit(module(), train_data())
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"last.ckpt' holds a float model, which has to be calibrated: give data"):
        lq.quantize_checkpoint(path, Wrapped)
    with pytest.raises(FileNotFoundError, match=r"no\.ckpt"):
        lq.quantize_checkpoint(tmp_path / "no.ckpt", Wrapped)
    with pytest.raises(ValueError, match="target='arm' is unknown"):
        lq.quantize_checkpoint(path, Wrapped, train_data(), target="arm")


class Given(Wrapped):
    """Is given its network, and keeps what it needs to be made again only as far as it may."""

    def __init__(self, net: Any = None, optimizer: Any = None, *, keeps: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, **({} if keeps else {"ignore": ["net", "optimizer"]}))
        self.model = self.model if net is None else net


class Required(Given):
    def __init__(self, net: Any) -> None:
        super().__init__(net)


def test_a_module_that_a_checkpoint_cannot_make(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, quantization(tmp_path), StopBehind(BATCHES + 1), every_epoch(tmp_path), epochs=3)
    interrupted(run, Required(Wrapped().model), train_data())
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert f"lq.quantize_checkpoint({str(path)!r}, Required(net=...), data" in caplog.text
    assert "python -m lq.recipes.quantize_checkpoint" not in caplog.text
    with pytest.raises(TypeError, match=r"no Required can be made of .*'net'.*, Required\(\.\.\.\), \.\.\.\)"):
        lq.quantize_checkpoint(path, Required, train_data(), target="x86_avx2", evaluate=False)
    assert lq.quantize_checkpoint(
        path, Required(Wrapped().model), train_data(), target="x86_avx2", evaluate=False, analyze=False
    ).artifact


def test_a_checkpoint_with_pickled_objects(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, quantization(tmp_path), StopBehind(BATCHES + 1), every_epoch(tmp_path), epochs=3)
    interrupted(run, Given(None, partial(torch.optim.Adam, lr=1e-3), keeps=True), train_data())
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert f"lq.quantize_checkpoint({str(path)!r}, Given, data, target='x86_avx2', weights_only=False)" in caplog.text
    with pytest.raises(ValueError, match="holds pickled objects, .* Where you trust it: .*weights_only=False"):
        lq.quantize_checkpoint(path, Given, train_data(), target="x86_avx2", evaluate=False)
    result = lq.quantize_checkpoint(
        path, Given, train_data(), target="x86_avx2", evaluate=False, analyze=False, weights_only=False
    )
    assert lq.load(result.artifact)(images(4)[0]).shape == (4, 4)
