"""The user's own validation, run beside the Trainer without touching its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Trainer
from torchmetrics import Metric

from lq.callback.steps.batches import validation_dataloaders
from lq.callback.steps.calls import Step
from lq.callback.steps.progress import carry_progress
from lq.callback.steps.stages import StagedUnit
from lq.callback.steps.unnoticed import unnoticed
from lq.util.quiet import quiet

#: Lines about GPUs and worker counts, which the user has read when training began.
REPEATED = ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")


def evaluate(trainer: Any, pl_module: Any, limit_batches: int | float | None = None) -> dict[str, float]:
    """Metrics of the user's ``validation_step`` over the Trainer's validation data, in this process alone.

    Args:
        trainer: the Trainer.
        pl_module: the LightningModule, or a copy of it.
        limit_batches: how many batches, or what share of them; by default what the Trainer validates with.

    Returns:
        Metric by name; empty where there is nothing to validate with.
    """
    dataloaders = validation_dataloaders(trainer)
    if dataloaders is None or not is_overridden("validation_step", pl_module):
        return {}
    limit = trainer.limit_val_batches if limit_batches is None else limit_batches
    # A look at a few batches comes before training.
    reading = nullcontext() if limit_batches is None else unnoticed(dataloaders)
    try:
        with reading:
            return validate(pl_module, dataloaders, one_device(trainer), limit, plain_trainer_class(trainer))
    finally:
        pl_module.trainer = trainer


def validate(
    pl_module: Any,
    dataloaders: Any,
    device: Mapping[str, Any] | None = None,
    limit_batches: int | float = 1.0,
    trainer_class: type[Any] = Trainer,
) -> dict[str, float]:
    """Metrics of ``validation_step`` over ``dataloaders``.

    A Trainer of its own does it, one device, no loggers, no checkpoints: metrics, callbacks and progress of any other
    stay as they are.

    Args:
        pl_module: the LightningModule.
        dataloaders: as a Trainer takes them.
        device: ``accelerator`` and ``devices`` of that Trainer; by default a CPU.
        limit_batches: how many batches, or what share of them.
        trainer_class: of that Trainer.
    """
    with quiet(*REPEATED), as_it_is(pl_module), torch.compiler.set_stance("force_eager"):
        judge = trainer_class(
            **(device or {"accelerator": "cpu", "devices": 1}),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=limit_batches,
        )
        carry_progress(getattr(pl_module, "_trainer", None), judge)
        results = judge.validate(pl_module, dataloaders=dataloaders, verbose=False)
    return {name: float(value) for result in results for name, value in result.items()}


@contextmanager
def as_it_is(pl_module: Any) -> Iterator[None]:
    """Inside, the module is neither set up nor torn down anew, and its metrics wait for no other process.

    The metrics begin anew: one that Lightning does not reset, as the best value so far, would speak of the training, or
    of the network that was judged before. Afterwards they are as they were.
    """
    # No dict by metric: its hash is that of its state.
    metrics = [(m, m.distributed_available_fn, _metric_state(m)) for m in pl_module.modules() if isinstance(m, Metric)]
    hooks = {name: pl_module.__dict__.get(name) for name in ("setup", "teardown", "configure_callbacks")}
    try:
        for metric, _, _ in metrics:
            metric.distributed_available_fn = lambda: False
            metric.reset()
        # A `setup` that builds the layers would build them anew, without what they have learnt.
        pl_module.setup = pl_module.teardown = lambda stage: None
        pl_module.configure_callbacks = list
        yield
    finally:
        for metric, is_distributed, state in metrics:
            metric.distributed_available_fn = is_distributed
            metric.__dict__.update(state)
        for name, hook in hooks.items():
            del pl_module.__dict__[name]
            if hook is not None:
                setattr(pl_module, name, hook)


def _metric_state(metric: Metric) -> dict[str, Any]:
    """What :meth:`torchmetrics.Metric.reset` changes; a list is emptied in place."""
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache", "_cache", "_is_synced"]
    state = {name: getattr(metric, name) for name in names if hasattr(metric, name)}
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}


def one_device(trainer: Any) -> dict[str, Any]:
    """``accelerator`` and ``devices`` of a Trainer that runs on the one device that this process trained on."""
    accelerator = type(trainer.accelerator).__name__.removesuffix("Accelerator").lower()
    index = trainer.strategy.root_device.index
    return {"accelerator": accelerator, "devices": 1 if index is None else [index]}


def plain_trainer_class(trainer: Any) -> type[Any]:
    """The plain Trainer of the distribution in use (``lightning`` or ``pytorch_lightning``)."""
    for cls in reversed(type(trainer).__mro__):
        if cls.__name__ == "Trainer":
            return cls
    return type(trainer)


def judged_step(trainer: Any, staged: StagedUnit) -> Step:
    """The step that says what the network is for: the validation's, where there is one with data that the unit takes
    part in.

    Args:
        trainer: the Trainer, for its data.
        staged: the unit.
    """
    judges = is_overridden("validation_step", staged.pl_module) and staged.is_judged
    return "validation_step" if judges and validation_dataloaders(trainer) is not None else "training_step"


def is_overridden(name: str, pl_module: Any) -> bool:
    """Whether the user's LightningModule has a method of its own of that name."""
    base = next(cls for cls in type(pl_module).__mro__ if cls.__name__ == "LightningModule")
    return getattr(type(pl_module), name, None) is not getattr(base, name, None)
