"""When a run ends unhappily: what is left, and how an INT8 model is made of it."""

from __future__ import annotations

import inspect
import logging
import shlex
import sys
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
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
    by_hand = [_call(settings, pl_module, path)]
    if not _missing(pl_module) and not _is_pickled(path):
        by_hand += _command(settings, pl_module, path)
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
    name, missing = type(pl_module).__name__, _missing(pl_module)
    model = f"{name}({', '.join(f'{each}=...' for each in missing)})" if missing else name
    data = f", data, target={settings.target.name!r}" if settings.mode == "ptq" else ""
    pickled = ", weights_only=False" if _is_pickled(path) else ""
    return f"lq.quantize_checkpoint({path!r}, {model}{data}{pickled})"


def _missing(pl_module: Any) -> list[str]:
    """The arguments that a module of its class cannot be made without, and that no checkpoint holds."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(type(pl_module).__init__).parameters.values())[1:]
    needed = [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    return [name for name in needed if name not in pl_module.hparams]


def _is_pickled(path: str) -> bool:
    """Whether a checkpoint holds more than plain values."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        return True
    except Exception:  # a remote path, say: this is no place to fail
        return False
    return False


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
