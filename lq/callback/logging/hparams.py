"""Rows of TensorBoard's HParams view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lq.callback.logging.loggers import is_tensorboard


def drop_hp_metric(trainer: Any) -> None:
    """Before Lightning logs the user's hyperparameters: no ``hp_metric`` of -1, which would be the view's only metric.

    Lightning says with it which columns there are, and TensorBoard believes the first run that says so, for all runs.
    Where none does, the columns are those of every row. The user's hyperparameters are in the row that is written when
    the model was quantized.
    """
    for logger in trainer.loggers:
        if is_tensorboard(logger) and getattr(logger, "_default_hp_metric", False):
            logger._default_hp_metric = False


def write_hparams(folder: Path, settings: dict[str, Any], metrics: dict[str, float], step: int) -> None:
    """A row, as a run of its own: with all scalars of the training run there would be a hundred columns.

    Args:
        folder: of the new run.
        settings: plain values by name.
        metrics: by name.
        step: of the metrics.
    """
    with SummaryWriter(str(folder)) as writer:
        _, *session = hparams(settings, metrics)  # but not which columns there are
        for summary in session:
            writer._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
