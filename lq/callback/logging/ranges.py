"""The ranges of activations while training moves them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lq.workflow.prepare import activation_quantizers

#: Points of a range's curve that a run has at most, so that event files stay small.
POINTS = 64


class RangeLog:
    """Logs both ends of every range now and then: as often as the Trainer logs, and so many times a run at most."""

    def __init__(self) -> None:
        self._last = -1

    def reset(self) -> None:
        """Begin anew, with a new run."""
        self._last = -1

    def log(self, trainer: Any, unit: nn.Module) -> None:
        """Log the ranges where it is time to.

        Args:
            trainer: the Trainer, after a training batch.
            unit: prepared.
        """
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if not trainer.loggers or step == self._last or step % _interval(trainer):
            return
        self._last = step
        quantizers = {name: q for name, q in activation_quantizers(unit).items() if q.rounds and q.calibrated}
        if not quantizers or not trainer.is_global_zero:
            return
        # One transfer from the device for all of them.
        ends = torch.stack([torch.stack(quantizer.quantized_range()) for quantizer in quantizers.values()]).tolist()
        values = {}
        for name, (low, high) in zip(quantizers, ends, strict=True):
            values[f"ranges/{name}/low"], values[f"ranges/{name}/high"] = low, high
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)


def _interval(trainer: Any) -> int:
    """Optimizer steps from one point to the next."""
    ends = [math.inf]
    if trainer.max_steps is not None and trainer.max_steps > 0:
        ends.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        ends.append(trainer.max_epochs * trainer.num_training_batches / max(1, trainer.accumulate_grad_batches))
    total = min(ends)
    every: int = trainer.log_every_n_steps
    thinned = 1 if total == math.inf else math.ceil(total / POINTS)
    return max(1, every, thinned)
