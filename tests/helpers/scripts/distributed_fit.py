"""What test_distributed runs in each of two processes: ``distributed_fit.py FOLDER SCENARIO...``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torchmetrics.classification import MulticlassAccuracy

import lq
from helpers.classifiers import Wrapped, images
from helpers.runs import every_epoch, module, quantization, train_data, trainer, val_data
from lq import Int8Module
from lq.callback.end.conversion import Conversion

TWO = {"devices": 2, "strategy": "ddp"}


class WithMetric(Wrapped):
    """A torchmetrics metric, which waits for all processes when it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(4, average="micro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        logits, y = self.logits(batch)
        self.accuracy.update(logits, y)
        self.log("accuracy", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        self.log("spread", self.all_gather(torch.tensor(1.0)).sum())


def summary(model: Any) -> dict[str, Any]:
    with torch.no_grad():
        logits = model.eval()(images(16, seed=7)[0])
    return {"logits": logits.tolist(), "int8": isinstance(model.model, Int8Module)}


def ptq(folder: Path) -> dict[str, Any]:
    model, callback = module(WithMetric), quantization(folder, rehearse=True, evaluate=True)
    run = trainer(folder, callback, every_epoch(folder, monitor="val_loss"), **TWO)
    run.fit(model, train_data(), val_data())
    metrics = None if callback.result is None else callback.result.float_side.metrics
    (tested,) = run.validate(model, val_data(), ckpt_path="best", verbose=False)
    return summary(model) | {"metrics": metrics, "tested": tested, "is_first": run.is_global_zero}


def max_drop(folder: Path) -> dict[str, Any]:
    model = module(WithMetric)
    callback = quantization(
        folder,
        evaluate=True,
        calibrator=None,
        max_drop=0.0,
        max_drop_metric="val_acc",
        max_drop_runtime="torch",
        max_drop_float_layers=1,
        max_drop_epochs=1,
        overrides={"*": {"weight_bits": 2}},
    )
    trainer(folder, callback, epochs=1, **TWO).fit(model, train_data(), val_data())
    tuning = None if callback.result is None else callback.result.tuning
    return summary(model) | {"tuning": None if tuning is None else tuning.to_dict()}


class Watching(Wrapped):
    """Keeps minimum and maximum of each training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((float(batch[0].min()), float(batch[0].max())))


def qat(folder: Path) -> dict[str, Any]:
    model = module(Watching)
    callback = quantization(folder, rehearse=True, mode="qat", convert=False, observer_freeze=None)
    run = trainer(folder, callback, every_epoch(folder), **TWO)
    run.fit(model, train_data(), val_data())
    ranges = {}
    for name, q in lq.quantizers(model.model).items():
        ranges[name] = [q.scale.tolist(), q.observer.min_val.tolist(), q.observer.max_val.tolist()]
    resumed = module(seed=3)
    again = trainer(folder, quantization(folder, rehearse=True, mode="qat"), epochs=3, **TWO)
    again.fit(resumed, train_data(), val_data(), ckpt_path=folder / "checkpoints" / "last.ckpt")
    return summary(resumed) | {"ranges": ranges, "seen": model.seen}


def _expecting_failure(run: Trainer, model: Any) -> dict[str, Any]:
    try:
        run.fit(model, train_data(), val_data())
    except RuntimeError as error:
        return {"error": str(error), **summary(model)}
    return {"error": None}


def failure_in_the_first_process(folder: Path) -> dict[str, Any]:
    original = Conversion.run

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no space left in this test")

    Conversion.run = fail  # type: ignore[method-assign]
    try:
        return _expecting_failure(trainer(folder, quantization(folder), epochs=1, **TWO), module())
    finally:
        Conversion.run = original  # type: ignore[method-assign]


def failure_in_the_second_process(folder: Path) -> dict[str, Any]:
    class Fails(Wrapped):
        trained = False

        def on_train_end(self) -> None:
            self.trained = True

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.trained and self.trainer.global_rank == 1:
                raise RuntimeError("a broken image in this test")
            return super().training_step(batch, batch_idx)

    return _expecting_failure(trainer(folder, quantization(folder), epochs=1, **TWO), module(Fails))


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    f.__name__: f for f in (ptq, max_drop, qat, failure_in_the_first_process, failure_in_the_second_process)
}


def main(folder: Path, names: list[str]) -> None:
    found = {}
    for name in names:
        found[name] = SCENARIOS[name](folder / name)
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
