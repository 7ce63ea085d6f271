"""What other callbacks would still do to a module when INT8 stands in its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from lq.callback.averages import averages_weights
from lq.callback.support import class_names


def release_other_callbacks(trainer: Any) -> None:
    """Let the other callbacks forget the float model, which has become INT8: what they do is done in another fit.

    Lightning's average would be put into the INT8 network for each validation, value by value, and the weights that
    were trained when a checkpoint is loaded. Pruning looks for the layers that it pruned whenever a Trainer begins.
    """
    for callback in trainer.callbacks:
        if averages_weights(callback):
            callback._average_model = None
        if "ModelPruning" in class_names(callback) and "setup" not in vars(callback):
            callback.setup = partial(_set_up_to_fit, callback.setup)


def _set_up_to_fit(setup: Callable[..., None], trainer: Any, pl_module: Any, stage: str) -> None:
    if stage == TrainerFn.FITTING:
        setup(trainer, pl_module, stage)
