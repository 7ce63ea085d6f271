"""The epoch and the step that the user's steps see where they are called outside of training."""

from __future__ import annotations

from typing import Any


def last_seen(trainer: Any) -> tuple[int, int]:
    """``current_epoch`` and ``global_step`` as a training step has last seen them.

    When an epoch has ended, Lightning has counted it, and its last step: after the training, schedules by epoch or by
    step would be asked for one that there never was.
    """
    epoch = trainer.fit_loop.epoch_progress.current
    has_ended = epoch.processed > 0 and epoch.processed >= epoch.ready
    return max(0, trainer.current_epoch - has_ended), max(0, trainer.global_step - has_ended)
