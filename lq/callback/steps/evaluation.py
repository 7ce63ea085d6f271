"""The user's own validation, run beside the Trainer without touching its state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torchmetrics import Metric
from torchmetrics.wrappers import MetricTracker, MinMaxMetric

from lq.callback.steps.attributes import same_attributes
from lq.callback.steps.batches import validation_dataloaders
from lq.callback.steps.calls import Step
from lq.callback.steps.idle import is_set_up, set_up
from lq.callback.steps.seen import SeesTheTrainer, idle_optimizers, seeing
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
    judge = partial(_validate, trainer, pl_module, dataloaders, limit)
    # Whether a validation of this Trainer's needed to be run as a sanity check, in a look and at the end.
    needs_checks = _NEEDS_CHECKS.setdefault(trainer, {})
    is_look = limit_batches is not None  # at a few batches, before training
    if needs_checks.get(is_look):
        return judge(checks=True)
    with unnoticed(dataloaders) if is_look else nullcontext():
        try:
            metrics = judge()
            needs_checks[is_look] = False
            return metrics
        except Exception as error:
            if needs_checks.get(is_look) is False:
                raise  # it is the network that was judged
            reason = error
        if not is_set_up(trainer):
            try:
                with set_up(pl_module, trainer):  # for a step that asks for that
                    return judge()
            except Exception as error:
                reason = error
        try:
            metrics = judge(checks=True)
        except Exception:
            raise reason from None
    needs_checks[is_look] = True
    rank_zero_warn(
        f"lq: {type(pl_module).__name__} is validated as in a sanity check (trainer.sanity_checking), since its "
        f"validation asks for what a training gathers ({type(reason).__name__}: {reason}): what it leaves out then is "
        f"not compared"
    )
    return metrics


#: What is known of the Trainers' validations, see :func:`evaluate`: the float network comes first.
_NEEDS_CHECKS: WeakKeyDictionary[Any, dict[bool, bool]] = WeakKeyDictionary()


def _validate(
    trainer: Any, pl_module: Any, dataloaders: Any, limit_batches: int | float, *, checks: bool = False
) -> dict[str, float]:
    """By a Trainer of its own, on one device, without loggers and checkpoints: metrics, callbacks and progress of
    ``trainer`` stay as they are, though the user's code sees it and no other."""
    with (
        quiet(*REPEATED),
        as_it_is(pl_module),
        same_attributes(pl_module),
        seeing(pl_module, trainer),
        torch.compiler.set_stance("force_eager"),
    ):
        pl_module.optimizers = idle_optimizers(trainer)
        judge = plain_trainer_class(trainer)(
            **one_device(trainer),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=limit_batches,
            callbacks=[SeesTheTrainer(trainer, checks=checks)],
        )
        results = judge.validate(pl_module, dataloaders=dataloaders, verbose=False)
    return {name: float(value) for result in results for name, value in result.items()}


@contextmanager
def as_it_is(pl_module: Any) -> Iterator[None]:
    """Inside, the module is neither set up nor torn down anew, and its metrics wait for no other process.

    The metrics begin anew: one that Lightning does not reset, as the best value so far, would speak of the training, or
    of the network that was judged before. Afterwards they are as they were.
    """
    metrics = [metric for metric in pl_module.modules() if isinstance(metric, (Metric, MetricTracker))]
    before = [_attributes(metric) for metric in metrics]
    own = {name: pl_module.__dict__.get(name) for name in ("setup", "teardown", "configure_callbacks", "optimizers")}
    try:
        for metric in metrics:
            if isinstance(metric, Metric):
                metric.distributed_available_fn = lambda: False
                metric.reset()
            if isinstance(metric, MinMaxMetric):  # whose own reset leaves them (torchmetrics 1.9)
                metric.min_val, metric.max_val = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        # A `setup` that builds the layers would build them anew, without what they have learnt.
        pl_module.setup = pl_module.teardown = lambda stage: None
        pl_module.configure_callbacks = list
        yield
    finally:
        for metric, attributes in zip(metrics, before, strict=True):
            metric.__dict__.clear()
            metric.__dict__.update(attributes)
        for name, hook in own.items():
            pl_module.__dict__.pop(name, None)
            if hook is not None:
                setattr(pl_module, name, hook)


def _attributes(metric: nn.Module) -> dict[str, Any]:
    """All that a metric keeps. A reset empties lists in place, and an update appends to them."""
    return {name: copy.copy(v) if isinstance(v, (list, dict)) else v for name, v in vars(metric).items()}


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
