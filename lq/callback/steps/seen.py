"""What the user's code sees as its Trainer and its loggers where it is called outside of the loop it is written for."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from operator import attrgetter
from typing import Any

from lightning.pytorch import Callback

from lq.callback.steps.calls import Step
from lq.callback.steps.progress import last_seen
from lq.callback.support import lightning_package

#: What a Trainer that runs a step for lq does not know, or only the Trainer of the training does.
_OF_TRAINING = {
    "accumulate_grad_batches",
    "callbacks",
    "check_val_every_n_epoch",
    "checkpoint_callback",
    "checkpoint_callbacks",
    "ckpt_path",
    "datamodule",
    "default_root_dir",
    "early_stopping_callback",
    "early_stopping_callbacks",
    "enable_validation",
    "estimated_stepping_batches",
    "fast_dev_run",
    "fit_loop",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_predict_batches",
    "limit_test_batches",
    "limit_train_batches",
    "limit_val_batches",
    "log_dir",
    "log_every_n_steps",
    "max_epochs",
    "max_steps",
    "max_time",
    "min_epochs",
    "min_steps",
    "num_training_batches",
    "overfit_batches",
    "progress_bar_callback",
    "reload_dataloaders_every_n_epochs",
    "train_dataloader",
    "val_check_batch",
    "val_check_interval",
}

_STAGES: dict[Step, Any] = {"training_step": attrgetter("TRAINING"), "validation_step": attrgetter("VALIDATING")}

#: What a logger or its experiment is asked for is given as it is, or as a copy; other objects of theirs might write.
_VALUES = (bool, int, float, str, bytes, type(None), os.PathLike)
_CONTAINERS = (list, tuple, dict, set)


class _View:
    """Passes for another object."""

    _original: Any

    def __init__(self, original: Any) -> None:
        self.__dict__["_original"] = original

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._original)

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self._original,)


class SilentLogger(_View):
    """A logger, its experiment, or anything that one gives: can be asked where it writes to, and writes nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._original is None:  # what a call gave that was not made
            return SilentLogger(None)
        value = getattr(self._original, name)
        if type(value) in _CONTAINERS:
            return copy.copy(value)
        return value if isinstance(value, _VALUES) else SilentLogger(value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Nothing is changed."""

    def __call__(self, *args: Any, **kwargs: Any) -> SilentLogger:
        return SilentLogger(None)

    def __getitem__(self, key: Any) -> SilentLogger:
        return SilentLogger(None)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing is written."""

    def __enter__(self) -> SilentLogger:
        return self

    def __exit__(self, *args: object) -> None:
        """Nothing was opened."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0


class Idle(_View):
    """An optimizer or a scheduler that can be read, and does not step."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Copies: a warm-up sets their learning rates."""
        return [dict(group) for group in self._original.param_groups]

    def step(self, *args: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Runs a closure, which is where a step may call the network."""
        closure = next((value for value in args if callable(value)), closure)
        return None if closure is None else closure()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Gradients stay."""

    def toggle_model(self, *args: Any, **kwargs: Any) -> Any:
        """There is nothing to synchronise."""
        return nullcontext()


class SeenTrainer(_View):
    """The Trainer of a training, for reading: nothing that is done to it changes the training, or is logged.

    Its epoch and step are the last ones that a step of the training has seen.

    Args:
        trainer: the Trainer.
        runner: the one that runs the step, whose state, metrics and device are seen; by default ``trainer`` itself.
        trains: whether ``runner`` steps the optimizers.
        checks: whether it says of itself that it is ``sanity_checking``, as before a training, when there is nothing
            yet of what a training gathers.
    """

    def __init__(self, trainer: Any, runner: Any = None, *, trains: bool = False, checks: bool = False) -> None:
        super().__init__(trainer)
        self.__dict__.update(_runner=trainer if runner is None else runner, _trains=trains, _checks=checks, _own={})

    def __getattr__(self, name: str) -> Any:
        if name in self._own:
            return self._own[name]
        if name in _OF_TRAINING or (not hasattr(type(self._runner), name) and name not in vars(self._runner)):
            return getattr(self._original, name)
        return getattr(self._runner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning's own, which it sets through the module.
        if name.startswith("_"):
            setattr(self._runner, name, value)
        else:
            self._own[name] = value

    @property
    def current_epoch(self) -> int:
        return last_seen(self._original)[0]

    @property
    def global_step(self) -> int:
        return last_seen(self._original)[1]

    @property
    def sanity_checking(self) -> bool:
        return bool(self._checks or self._runner.sanity_checking)

    @property
    def callback_metrics(self) -> dict[str, Any]:
        return {**self._original.callback_metrics, **self._runner.callback_metrics}

    @property
    def logged_metrics(self) -> dict[str, Any]:
        return {**self._original.logged_metrics, **self._runner.logged_metrics}

    @property
    def progress_bar_metrics(self) -> dict[str, Any]:
        return {**self._original.progress_bar_metrics, **self._runner.progress_bar_metrics}

    @property
    def logger(self) -> Any:
        return next(iter(self.loggers), None)

    @property
    def loggers(self) -> list[Any]:
        return [SilentLogger(logger) for logger in self._original.loggers]

    @property
    def optimizers(self) -> list[Any]:
        return self._runner.optimizers if self._trains else [Idle(each) for each in self._original.optimizers]

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        if self._trains:
            return self._runner.lr_scheduler_configs  # type: ignore[no-any-return]
        configs = self._original.lr_scheduler_configs
        return [replace(config, scheduler=Idle(config.scheduler)) for config in configs]

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """None is written."""


def idle_optimizers(trainer: Any) -> Callable[..., Any]:
    """:meth:`LightningModule.optimizers` of those of ``trainer``, which do not step."""

    def optimizers(use_pl_optimizer: bool = True) -> Any:
        own = trainer.strategy._lightning_optimizers if use_pl_optimizer else trainer.optimizers
        idle = [Idle(each) for each in own] or [Idle(None)]
        return idle[0] if len(idle) == 1 else idle

    return optimizers


@contextmanager
def seeing(pl_module: Any, trainer: Any) -> Iterator[None]:
    """Afterwards the Trainer of a module, and of its datamodule, is the one of the training again.

    Inside it is a :class:`SeenTrainer`, or whatever a Trainer that is run meanwhile makes it.
    """
    datamodule = trainer.datamodule
    see(pl_module, datamodule, SeenTrainer(trainer))
    try:
        yield
    finally:
        see(pl_module, datamodule, trainer)


@contextmanager
def at_stage(pl_module: Any, step: Step) -> Iterator[None]:
    """Inside, the Trainer of a module says of itself that it is where ``step`` and its batches are: ``training`` or
    ``validating``, which augmentations ask for."""
    trainer = pl_module._trainer
    if trainer is None:
        yield
        return
    states = importlib.import_module(f"{lightning_package(pl_module)}.trainer.states")
    before = trainer.state.stage
    trainer.state.stage = _STAGES[step](states.RunningStage)
    try:
        yield
    finally:
        trainer.state.stage = before


def see(pl_module: Any, datamodule: Any, trainer: Any) -> None:
    """Make ``trainer`` the one that a module and its datamodule know."""
    pl_module.trainer = trainer
    if datamodule is not None:
        datamodule.trainer = trainer


class SeesTheTrainer(Callback):
    """Of a Trainer that lq runs: the module, and the datamodule whose hooks it calls, see the one of the training.

    Args:
        trainer: the one of the training.
        trains: whether this one steps the optimizers.
        checks: see :class:`SeenTrainer`.
    """

    def __init__(self, trainer: Any, *, trains: bool = False, checks: bool = False) -> None:
        self._trainer, self._given = trainer, {"trains": trains, "checks": checks}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        datamodule = self._trainer.datamodule
        trainer._data_connector._datahook_selector.datamodule = datamodule
        see(pl_module, datamodule, SeenTrainer(self._trainer, trainer, **self._given))
