"""When a run ends unhappily: what is left, and how an INT8 model is made of it."""

from __future__ import annotations

import logging
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lq.callback.averages import averages_at_the_end
from lq.callback.end.weights import choose_weights, last_checkpoint
from lq.callback.settings import QuantizationSettings
from lq.util.files import write_archive, write_atomically

_log = logging.getLogger("lq")


def tell_how_to_finish(
    settings: QuantizationSettings, trainer: Any, pl_module: Any, output_dir: Path, *, training_ended: bool
) -> None:
    """Log where the trained weights are and how to convert them; write them where no checkpoint has them."""
    if training_ended:
        happened = "Training ended, but not the conversion to INT8. The module has its trained weights in float."
        path, note = _trained_weights(settings, trainer, output_dir)
    else:
        happened = "Training was interrupted, and nothing is converted to INT8."
        path, note = last_checkpoint(trainer), "The last checkpoint is"
    if path is None:
        what = note if training_ended else "No checkpoint was written yet."
        _log.error("lq: %s %s", happened, what)
        return
    resume = "" if training_ended else f"To go on training: trainer.fit(model, ckpt_path={path!r}). "
    by_hand = [_call(settings, pl_module, path), *_command(settings, pl_module, path)]
    _log.error("lq: %s %s %r. %sTo convert it as it is:\n    %s", happened, note, path, resume, "\n    ".join(by_hand))


def _trained_weights(settings: QuantizationSettings, trainer: Any, output_dir: Path) -> tuple[str | None, str]:
    """Path of a checkpoint with the weights that were to be converted, and what to say of it."""
    try:
        path, _ = choose_weights(trainer, settings.weights)
    except ValueError:
        path = None
    if path is None and not averages_at_the_end(trainer):
        path = last_checkpoint(trainer, trainer.global_step)
    if path is not None:
        return path, "They are in the checkpoint"
    rescued = output_dir / "unconverted.ckpt"
    try:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
        write_atomically(rescued, lambda beside: write_archive(beside, partial(torch.save, checkpoint)))
    except OSError as error:
        return None, f"No checkpoint holds them, and {str(rescued)!r} cannot be written ({error.strerror or error})."
    return str(rescued), "No checkpoint held them; they were written to"


def _call(settings: QuantizationSettings, pl_module: Any, path: str) -> str:
    data = f", data, target={settings.target.name!r}" if settings.mode == "ptq" else ""
    return f"lq.quantize_checkpoint({path!r}, {type(pl_module).__name__}{data})"


def _command(settings: QuantizationSettings, pl_module: Any, path: str) -> list[str]:
    """The same for the shell, where the module's class can be found from there."""
    cls = type(pl_module)
    if "<locals>" in cls.__qualname__:
        return []
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    place = script if cls.__module__ == "__main__" else cls.__module__
    if place is None:  # an interactive session
        return []
    arguments = [f"ckpt={path}", f"model={place}:{cls.__qualname__}"]
    if settings.mode == "ptq":
        arguments += ["data=MODULE:DATAMODULE", f"target={settings.target.name}"]
    return ["python -m lq.recipes.quantize_checkpoint " + " ".join(map(shlex.quote, arguments))]
