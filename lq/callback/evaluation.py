"""The user's own validation, run beside the Trainer without touching its state."""

from __future__ import annotations

from typing import Any

from lq.callback.batches import validation_dataloaders
from lq.quiet import quiet

#: Lines about GPUs and worker counts, which the user has read when training began.
_REPEATED = ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")


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
    with quiet(*_REPEATED):
        judge = _trainer_class(trainer)(
            accelerator=type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=trainer.limit_val_batches,
        )
        try:
            results = judge.validate(pl_module, dataloaders=dataloaders, verbose=False)
        finally:
            pl_module.trainer = trainer
    return {name: float(value) for result in results for name, value in result.items()}


def _is_overridden(name: str, pl_module: Any) -> bool:
    for cls in type(pl_module).__mro__:
        if name in cls.__dict__:
            return cls.__name__ != "LightningModule"
    return False
