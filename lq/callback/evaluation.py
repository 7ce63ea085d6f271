"""The user's own validation, run beside the Trainer without touching its state."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lq.callback.batches import validation_dataloaders


@contextmanager
def _quiet() -> Iterator[None]:
    """No lines about GPUs and worker counts: the user has read them when training began."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trainer_class(trainer: Any) -> type[Any]:
    """The plain Trainer of the distribution in use (``lightning`` or ``pytorch_lightning``)."""
    for cls in reversed(type(trainer).__mro__):
        if cls.__name__ == "Trainer":
            return cls
    return type(trainer)


def evaluate(trainer: Any, pl_module: Any) -> dict[str, float]:
    """Metrics of the user's ``validation_step`` over the Trainer's validation data.

    A Trainer of its own does it, one device, no loggers, no checkpoints: metrics, callbacks and progress of ``trainer``
    stay as they are.

    Returns:
        Metric by name; empty where there is nothing to validate with.
    """
    dataloaders = validation_dataloaders(trainer)
    if dataloaders is None or not _is_overridden("validation_step", pl_module):
        return {}
    with _quiet():
        quiet = _trainer_class(trainer)(
            accelerator=type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=trainer.limit_val_batches,
        )
        try:
            results = quiet.validate(pl_module, dataloaders=dataloaders, verbose=False)
        finally:
            pl_module.trainer = trainer
    return {name: float(value) for result in results for name, value in result.items()}


def _is_overridden(name: str, pl_module: Any) -> bool:
    for cls in type(pl_module).__mro__:
        if name in cls.__dict__:
            return cls.__name__ != "LightningModule"
    return False
