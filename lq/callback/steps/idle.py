"""A user's step outside of the loop that it is written for: it computes what it computes, and changes nothing."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from lq.callback.steps.seen import idle_optimizers, seeing
from lq.callback.support import lightning_package

#: What a step calls that only its loop may do, or that changes what is trained; here none does anything.
_SILENT = (
    "backward",
    "clip_gradients",
    "log",
    "log_dict",
    "manual_backward",
    "toggle_optimizer",
    "untoggle_optimizer",
)


def run_idle(pl_module: Any, step: Callable[[], Any]) -> None:
    """Call ``step``, in which ``pl_module`` logs nothing, optimizers and schedulers stand still, no gradient is made.

    Before ``fit`` has set them up, there are optimizers and schedulers as ``configure_optimizers`` makes them, and the
    loop has its data, for a step that asks for them. Whether parameters want gradients is afterwards as before, also
    where the step was left halfway: between switching a discriminator's parameters off and on again.
    """
    trainer = getattr(pl_module, "_trainer", None)
    strategy = getattr(trainer, "strategy", None)
    if strategy is None or is_set_up(trainer):
        with _idle(pl_module):
            step()
        return
    try:
        if strategy.optimizers or pl_module.automatic_optimization:  # which seldom asks for them
            with _idle(pl_module):
                step()
            return
    except Exception:
        with set_up(pl_module, trainer) as there_are_some, _idle(pl_module):
            if not there_are_some:
                raise
            step()
        return
    with set_up(pl_module, trainer), _idle(pl_module):
        step()


@contextmanager
def _idle(pl_module: Any) -> Iterator[None]:
    wanted = [(parameter, parameter.requires_grad) for parameter in pl_module.parameters()]
    replaced: dict[str, Any] = {
        **dict.fromkeys(_SILENT, _nothing),
        "toggled_optimizer": lambda *_, **__: nullcontext(),
    }
    trainer = getattr(pl_module, "_trainer", None)
    if trainer is not None:
        replaced["optimizers"] = idle_optimizers(trainer)
    before = {name: pl_module.__dict__[name] for name in replaced if name in pl_module.__dict__}
    pl_module.__dict__.update(replaced)
    try:
        with nullcontext() if trainer is None else seeing(pl_module, trainer):
            yield
    finally:
        for name in replaced:
            pl_module.__dict__.pop(name, None)
        pl_module.__dict__.update(before)
        for parameter, requires_grad in wanted:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for what is not to happen."""


def is_set_up(trainer: Any) -> bool:
    """Whether there are all of the things that ``fit`` makes before the first step."""
    return bool(trainer.strategy.optimizers) and trainer.fit_loop._combined_loader is not None


@contextmanager
def set_up(pl_module: Any, trainer: Any) -> Iterator[bool]:
    """Give the Trainer what ``fit`` gives it before the first step, and take it back; whether that went well.

    Optimizers that it makes are not those that will train: the user's ``configure_optimizers`` is called once more.
    """
    strategy, loop = trainer.strategy, trainer.fit_loop
    # A loop that has its data already would not bring them to where a run that is resumed was within its epoch.
    before = dict(loop.__dict__)
    has_optimizers = bool(strategy.optimizers)
    try:
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when fit does it
            loop.setup_data()
            if not has_optimizers:
                core = importlib.import_module(f"{lightning_package(pl_module)}.core.optimizer")
                strategy.optimizers, strategy.lr_scheduler_configs = core._init_optimizers_and_lr_schedulers(pl_module)
        yield bool(strategy.optimizers)
    finally:
        loop.__dict__.update(before)
        if not has_optimizers:
            strategy._reset_optimizers_and_schedulers()
