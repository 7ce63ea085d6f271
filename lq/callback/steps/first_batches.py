"""The first batches of the Trainer's data, taken before its loops take them, which notice nothing of that."""

from __future__ import annotations

import itertools
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng

from lq.callback.steps.batches import batches_of, first_of, train_dataloaders, validation_dataloaders
from lq.callback.steps.calls import Step
from lq.callback.steps.unnoticed import can_be_read_again, unnoticed


def first_train_batches(trainer: Any, pl_module: Any, count: int, *, take: bool = False) -> list[Any]:
    """The first training batches.

    Args:
        trainer: the Trainer.
        pl_module: the LightningModule, whose device they are put on.
        count: how many.
        take: whether to take them also of data that cannot be read again, which training will not see any more.
    """
    with isolate_rng():  # making a dataloader may draw random numbers, too
        return first_batches_of(train_dataloaders(trainer), pl_module, count, take=take)


def first_validation_batches(trainer: Any, pl_module: Any, count: int, *, take: bool = False) -> list[Any]:
    """The same of the first validation dataloader; empty without any."""
    with isolate_rng():
        loaders = validation_dataloaders(trainer)
        if loaders is None:
            return []
        return first_batches_of(first_of(loaders), pl_module, count, "validation_step", take=take)


def first_batches_of(
    loaders: Any, pl_module: Any, count: int, step: Step = "training_step", *, take: bool = False
) -> list[Any]:
    """The same of any dataloaders that are read side by side, as ``step`` is given them."""
    # Asking whether they can be read again begins to read them.
    with unnoticed(loaders):
        if not take and not can_be_read_again(loaders):
            return []
        return list(itertools.islice(batches_of(loaders, pl_module, step), count))
