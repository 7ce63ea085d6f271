"""Which weights become INT8: those of the best checkpoint, or those that training ended with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any, Literal

from torch import Tensor

from lq.callback.averages import averages_at_the_end
from lq.util.distributed import world_size

Weights = Literal["best", "last"]


def best_checkpoint(trainer: Any) -> str | None:
    """Path of the best checkpoint of the first ModelCheckpoint that monitors a metric, or None."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None) is not None and _path(callback, "best_model_path"):
            return _path(callback, "best_model_path")
    return None


def last_checkpoint(trainer: Any, global_step: int | None = None) -> str | None:
    """Path of the checkpoint that was written last, or None.

    Args:
        trainer: the Trainer.
        global_step: if given, only one that was written at that step will do.
    """
    for callback in trainer.checkpoint_callbacks:
        step = getattr(callback, "_last_global_step_saved", None)
        # The best and the last one have public names; the one just written can be a third best.
        if _path(callback, "_last_checkpoint_saved") and global_step in (None, step):
            return _path(callback, "_last_checkpoint_saved")
    if global_step is None:  # a run that was resumed knows those of the run before
        for name in ("last_model_path", "best_model_path"):
            for callback in trainer.checkpoint_callbacks:
                if _path(callback, name):
                    return _path(callback, name)
    return None


def _path(callback: Any, name: str) -> str:
    return str(getattr(callback, name, ""))


def choose_weights(trainer: Any, weights: Weights | None) -> tuple[str | None, str]:
    """``(path, sentence)``: the checkpoint to load, None for the weights that are there; and what to tell of it.

    Args:
        trainer: the Trainer, after training.
        weights: what the user wants, or None for the best ones wherever a metric says which these are.

    Raises:
        ValueError: where the best weights are wanted and nothing says which they are.
    """
    best = best_checkpoint(trainer)
    if weights == "best" and best is None:
        raise ValueError(
            "weights='best': no ModelCheckpoint with monitor='...' has written a checkpoint; add one, or use "
            "weights='last'"
        )
    if weights == "last" or best is None:
        return None, "the weights that training ended with"
    if weights is None and averages_at_the_end(trainer):
        return None, "the averaged weights that training ended with"
    return best, f"the weights of the best checkpoint, {best}"


def known_checkpoints(trainer: Any) -> dict[str, Any]:
    """The best checkpoint that the Trainer knows, with what tells whether it is written anew."""
    best = best_checkpoint(trainer)
    return {} if best is None else {best: _stamp(best)}


def copied_weights(pl_module: Any) -> dict[str, Tensor]:
    """A copy of the tensors in the module's state dict, on the CPU."""
    state = pl_module.state_dict().items()
    return {key: value.detach().cpu().clone() for key, value in state if isinstance(value, Tensor)}


def load_weights(trainer: Any, pl_module: Any, path: str, known_before: Mapping[str, Any] | None = None) -> None:
    """Load the ``state_dict`` of a checkpoint of this run into ``pl_module``, the same in every process.

    Args:
        trainer: the Trainer.
        pl_module: the LightningModule.
        path: of the checkpoint.
        known_before: what :func:`known_checkpoints` said before training: a run that is resumed takes the path of its
            best checkpoint from the one that it is resumed from, which may be a stranger's.

    Raises:
        ValueError: where an earlier run wrote it, and it holds pickled objects.
    """
    checkpoint: Any = None
    if trainer.is_global_zero:
        try:
            checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
        except UnpicklingError as error:
            if (known_before or {}).get(path) == _stamp(path):
                raise ValueError(
                    f"the best checkpoint, {path!r}, was written by an earlier run, and holds pickled objects "
                    f"(hyperparameters that are no plain values), which can run code when they are loaded. Where you "
                    f"trust it: lq.quantize_checkpoint({path!r}, MyModule, data, weights_only=False); or convert what "
                    f"training ended with: QuantizationCallback(weights='last')"
                ) from error
            # Written by this very run, so what is pickled in it is the user's own.
            checkpoint = trainer.strategy.load_checkpoint(path, weights_only=False)
        checkpoint = {key: value for key, value in checkpoint.items() if key not in _TRAINING_STATE}
    if world_size() > 1:
        checkpoint = trainer.strategy.broadcast(checkpoint)
    pl_module.on_load_checkpoint(checkpoint)
    pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:  # a URL, or gone
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


#: Parts of a checkpoint that are large and of no use to the weights.
_TRAINING_STATE = ("optimizer_states", "lr_schedulers", "callbacks", "loops", "current_model_state")
