"""What the steps call is what is quantized, by whatever spelling they call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.nn import functional as F

import lq
from helpers import step_shapes as shapes
from helpers.classifiers import images
from helpers.modes import both_modes
from helpers.modules import NeverTrained
from helpers.runs import (
    StopBehind,
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
from lq import Int8Module
from lq.int8.parts import Int8Part

#: Where INT8 stands in each of them.
PLACES = {
    shapes.RoundCall: ("int8",),
    shapes.RoundCallInside: ("model",),
    shapes.Apart: ("features", "head"),
    shapes.Heads: ("backbone", "heads.0", "heads.1"),
    shapes.Ensemble: ("first", "second"),
    shapes.Twice: ("model",),
    shapes.GoesRound: ("net.features", "net.classifier"),
    shapes.LossInside: ("model",),
    shapes.CalledGraph: ("int8",),
    shapes.FirstArgument: ("model",),
    shapes.Distilled: ("student",),
    shapes.SmallSteps: ("model",),
}


def places_of(model: torch.nn.Module) -> tuple[str, ...]:
    """Where INT8 computes."""
    found = [path for path, m in model.named_modules() if isinstance(m, (Int8Part, Int8Module))]
    return tuple(path for path in found if not path.endswith(".network"))


@both_modes
@pytest.mark.parametrize("cls", PLACES)
@pytest.mark.support("Modules", "`self.forward(x)`, parts called apart, several networks, a loss in the forward")
def test_what_the_steps_call_is_quantized(cls: Any, mode: str, tmp_path: Path) -> None:
    model, callback = module(cls), quantization(tmp_path, mode=mode, evaluate=True, rehearse=True)
    run = trainer(tmp_path, callback, every_epoch(tmp_path), epochs=4)
    run.fit(model, train_data(), val_data())
    assert places_of(model) == PLACES[cls]
    assert callback.result is not None
    assert callback.result.int8_side.metrics["val_acc"] >= 0.9
    # What was reported is what there is, and it is not the float network's.
    again = run.validate(model, val_data(), verbose=False)[0]
    assert again == pytest.approx(callback.result.int8_side.metrics)
    assert again["val_loss"] != callback.result.float_side.metrics["val_loss"]

    assert isinstance(lq.load(callback.result.artifact), Int8Module)


@pytest.mark.parametrize("cls", [shapes.Averaged, shapes.AveragedByTorch, shapes.MeanTeacher])
@pytest.mark.support("Modules", "An average that validation uses (EMA, `AveragedModel`): PTQ converts it")
def test_an_average_that_validation_uses_is_converted(cls: Any, tmp_path: Path) -> None:
    model, callback = module(cls), quantization(tmp_path, rehearse=True, evaluate=True)
    run = trainer(tmp_path, callback, epochs=3)
    run.fit(model, train_data(), val_data())
    assert places_of(model) == ("average",)
    assert callback.result is not None
    assert run.validate(model, val_data(), verbose=False)[0] == pytest.approx(callback.result.int8_side.metrics)


@pytest.mark.parametrize("cls", [shapes.Averaged, shapes.AveragedByTorch])
def test_an_average_learns_nothing_of_qat(cls: Any, tmp_path: Path) -> None:
    class Model(cls):  # type: ignore[misc]
        on_train_start = NeverTrained.on_train_start

    run = trainer(tmp_path, quantization(tmp_path, rehearse=True, mode="qat"))
    with pytest.raises(ValueError, match=r"validation_step of Model uses 'average', which training_step does not call"):
        run.fit(module(Model), train_data(), val_data())


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (shapes.MeanTeacher, "of which no optimizer has a parameter"),
        (shapes.FrozenTeacher, "of which no parameter requires a gradient"),
    ],
)
def test_a_teacher_that_is_an_average_learns_nothing_of_qat(cls: Any, reason: str, tmp_path: Path) -> None:
    class Model(cls):  # type: ignore[misc]
        on_train_start = NeverTrained.on_train_start

    run = trainer(tmp_path, quantization(tmp_path, rehearse=True, mode="qat"))
    with pytest.raises(ValueError, match=f"validation_step of Model uses 'average', {reason}"):
        run.fit(module(Model), train_data(), val_data())


def test_validation_that_uses_something_else_than_what_is_named(tmp_path: Path) -> None:
    class Model(shapes.Ensemble):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.first(batch[0]), batch[1])

        def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
            return self.second(batch[0]), batch[1]

    run = trainer(tmp_path, quantization(tmp_path, rehearse=True, module="first"))
    with pytest.warns(UserWarning, match=r"validation_step of Model does not call 'first'.*say nothing of INT8"):
        run.fit(module(Model), train_data(), val_data())


@both_modes
@pytest.mark.parametrize("cls", [shapes.DataInSetup, shapes.NetworkInSetup])
@pytest.mark.support("Modules", "Data sets and layers that are made in `setup`")
def test_what_is_made_in_setup_is_there(cls: Any, mode: str, tmp_path: Path) -> None:
    seen: list[bool] = []

    class Model(cls):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            seen.append("forward" in self.model.__dict__)
            return super().configure_optimizers()

    model = module(Model)
    run = trainer(tmp_path, quantization(tmp_path, rehearse=True, mode=mode), epochs=3)
    run.fit(model)
    assert places_of(model) == ("model",)
    assert "setup" not in model.__dict__
    assert seen == [mode == "qat"]
    run.validate(model, val_data(), verbose=False)


def test_data_made_in_setup_come_too_late_for_an_average(tmp_path: Path) -> None:
    run = trainer(tmp_path, quantization(tmp_path, mode="qat"), EMAWeightAveraging())
    with pytest.raises(ValueError, match=r"EMAWeightAveraging copies the model before LightningModule.setup has made"):
        run.fit(module(shapes.DataInSetup))


def test_every_call_is_calibrated_on(tmp_path: Path) -> None:
    model = module(shapes.Twice)
    trainer(tmp_path, quantization(tmp_path), epochs=1).fit(model, train_data(), val_data())
    widest = float(4 * images(64)[0].abs().max())
    low, high = lq.quantizers(model._lq_unit.unit)["input"].observer.range()
    assert max(-float(low), float(high)) == widest


@pytest.mark.support("Checkpoints", "Parts that are called apart: QAT resumes exactly, and from a checkpoint to INT8")
def test_parts_resume_exactly(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mode": "qat", "convert": False, "observer_freeze": None}
    whole = module(shapes.Apart)
    trainer(tmp_path, quantization(tmp_path, **settings), epochs=3).fit(whole, train_data())
    checkpoint = every_epoch(tmp_path)
    first = trainer(tmp_path, quantization(tmp_path, **settings), StopBehind(9), checkpoint, epochs=3)
    interrupted(first, module(shapes.Apart), train_data())
    again = module(shapes.Apart, seed=1)
    second = trainer(tmp_path, quantization(tmp_path, **settings), every_epoch(tmp_path), epochs=3)
    second.fit(again, train_data(), ckpt_path="last")
    assert_same(state_of(again), state_of(whole))
    result = lq.quantize_checkpoint(checkpoint.last_model_path, shapes.Apart, evaluate=False, analyze=False)
    assert len(result.report.int8_layers) == 3


@both_modes
def test_checkpoints_of_parts_are_the_float_network(mode: str, tmp_path: Path) -> None:
    model = module(shapes.GoesRound)
    run = trainer(tmp_path, quantization(tmp_path, mode=mode), epochs=2)
    run.fit(model, train_data(), val_data())
    run.save_checkpoint(tmp_path / "after.ckpt")
    before = run.validate(model, val_data(), verbose=False)
    plain = shapes.GoesRound.load_from_checkpoint(tmp_path / "after.ckpt")
    assert torch.isfinite(plain(images(4)[0])).all()
    assert run.validate(model, val_data(), ckpt_path=tmp_path / "after.ckpt", verbose=False) == before
    run.fit_loop.max_epochs = 3
    run.fit(model, train_data(), val_data())
    assert places_of(model) == PLACES[shapes.GoesRound]


def test_a_part_says_what_it_was_made_for(tmp_path: Path) -> None:
    model = module(shapes.Apart)
    trainer(tmp_path, quantization(tmp_path)).fit(model, train_data(), val_data())
    with pytest.raises(TypeError, match=r"in place of 'head' was made for calls of the form \(tensor\); got"):
        model.head(images(4)[0].flatten(1), None)


def test_a_step_that_calls_nothing(tmp_path: Path) -> None:
    class Model(NeverTrained):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.zeros((), requires_grad=True)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    for mode in ("ptq", "qat"):
        with pytest.raises(ValueError, match=r"training_step never called the Sequential.*module='\.\.\.'"):
            trainer(tmp_path, quantization(tmp_path, rehearse=True, mode=mode)).fit(
                module(Model), train_data(), val_data()
            )
