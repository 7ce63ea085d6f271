"""What the steps call is what is quantized, by whatever spelling they call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import shapes
from lifecycle.runs import (
    every_epoch,
    module,
    quantization,
    train_data,
    trainer,
    val_data,
)

import lq
from lq import Int8Module
from lq.int8_parts import Int8Part

both_modes = pytest.mark.parametrize("mode", ["ptq", "qat"])

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
    model, callback = module(cls), quantization(tmp_path, mode=mode, evaluate=True)
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
