"""Runs with the callback that have ended, one layer of the model broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

import lq
from helpers.classifiers import Wrapped, loader
from helpers.fits import quantization
from lq.callback import QuantizationResult
from lq.callback.end import fit_end
from lq.callback.steps.stages import StagedUnit

#: The layer whose input's range is cut to a tenth.
BROKEN = "3"

#: The quantizer of that input.
BROKEN_INPUT = "2"


class PictureLogger(Logger):
    """What a logger with ``log_image`` is given, as WandbLogger has it."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}
        self.images: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "pictures"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.update(metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.settings.update(params)

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.images[key] = images


class Colours(LightningDataModule):
    """With names of the classes."""

    classes = ("red", "green <&>", "blue", "dark")

    def train_dataloader(self) -> Any:
        return loader(96)

    def val_dataloader(self) -> Any:
        return loader(seed=1)


@dataclass(frozen=True)
class FinishedRun:
    """Where everything is.

    Args:
        folder: below which all files are.
        result: of the callback.
        tensorboard: the logger's folder.
        csv: the CSV logger's folder.
        pictures: a logger with ``log_image``.
        int8: folder of the INT8 files.
    """

    folder: Path
    result: QuantizationResult
    tensorboard: Path
    csv: Path
    pictures: PictureLogger
    int8: Path


def finished_run(folder: Path, mode: str) -> FinishedRun:
    """A fit with the callback's own analysis, of a model one layer of which has a tenth of its input's range."""
    seed_everything(0, verbose=False)
    loggers = [TensorBoardLogger(folder, name="board"), CSVLogger(folder, name="csv"), PictureLogger()]
    callback = quantization(folder, mode=mode, analyze=True, calibrator="minmax", evaluate=mode == "ptq")
    convert = fit_end.Conversion.run

    def with_a_broken_layer(self: Any, staged: StagedUnit, *args: Any) -> Any:
        quantizer = lq.quantizers(staged.unit)[BROKEN_INPUT]
        low, high = quantizer.quantized_range()
        quantizer.set_range(low / 10, high / 10)
        return convert(self, staged, *args)

    with mock.patch.object(fit_end.Conversion, "run", with_a_broken_layer):
        trainer = Trainer(
            max_epochs=3,
            accelerator="cpu",
            default_root_dir=folder,
            callbacks=[callback],
            logger=loggers,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Model(), datamodule=Colours())
    assert callback.result is not None
    return FinishedRun(
        folder=folder,
        result=callback.result,
        tensorboard=Path(loggers[0].log_dir),  # type: ignore[arg-type]
        csv=Path(loggers[1].log_dir),  # type: ignore[arg-type]
        pictures=loggers[2],  # type: ignore[arg-type]
        int8=folder / "int8",
    )


class Model(Wrapped):
    """With hyperparameters, which Lightning logs when training begins."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
