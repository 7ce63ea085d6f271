"""The epoch and the step that the user's steps see where they are called outside of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def as_in_training(trainer: Any) -> Iterator[None]:
    """Inside, ``current_epoch`` and ``global_step`` are what a training step has seen.

    When an epoch has ended, Lightning has counted it, and its last step: after the training, schedules by epoch or by
    step would be asked for one that there never was.

    Args:
        trainer: the Trainer, or None.
    """
    loop = getattr(trainer, "fit_loop", None)
    epoch = None if loop is None else loop.epoch_progress.current
    if epoch is None or epoch.processed == 0 or epoch.processed < epoch.ready:  # none has ended, or one is under way
        yield
        return
    steps = _steps(trainer)
    before = epoch.processed, epoch.completed, [step.completed for step in steps]
    epoch.processed -= 1
    epoch.completed = epoch.processed
    for step in steps:
        step.completed = max(0, step.completed - 1)
    try:
        yield
    finally:
        epoch.processed, epoch.completed, counts = before
        for step, count in zip(steps, counts, strict=True):
            step.completed = count


def carry_progress(source: Any, judge: Any) -> None:
    """Have a Trainer count as another one does.

    Args:
        source: the other one, or None.
        judge: the Trainer.
    """
    if getattr(source, "fit_loop", None) is None:
        return
    with as_in_training(source):
        ours, theirs = (trainer.fit_loop.epoch_progress.current for trainer in (judge, source))
        ours.processed, ours.completed = theirs.processed, theirs.completed
        for step, count in zip(_steps(judge), _steps(source), strict=True):
            step.completed = count.completed


def _steps(trainer: Any) -> list[Any]:
    """The counts of optimizer steps, in automatic and in manual optimization."""
    loop = trainer.fit_loop.epoch_loop
    return [
        loop.automatic_optimization.optim_progress.optimizer.step.total,
        loop.manual_optimization.optim_step_progress.total,
    ]
