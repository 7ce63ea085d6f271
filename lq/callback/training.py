"""Quantization-aware training: how far it is, and ranges that all processes share."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lq.numerics.observers import all_reduce_together
from lq.numerics.quantizer import QuantizerState
from lq.workflow.prepare import activation_quantizers


def training_share(trainer: Any, batch_idx: int) -> float:
    """How much of the training is done before batch ``batch_idx`` of this epoch, in [0, 1].

    A function of the place in the run alone, so that a resumed run does everything where the interrupted one would
    have. Counted in batches rather than in optimizer steps, of which one batch can have several, or none. 0 where
    nothing but a time limit ends the training.
    """
    share = 0.0
    if trainer.max_steps is not None and trainer.max_steps > 0:
        share = trainer.global_step / trainer.max_steps
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs > 0 and 0 < batches < math.inf:
        share = max(share, (trainer.current_epoch * batches + batch_idx) / (epochs * batches))
    return min(share, 1.0)


def all_reduce_ranges(unit: nn.Module) -> None:
    """Give all processes the same ranges, of the batches that all of them saw.

    Distributed training copies the first process's buffers to the others before each step, so without this the
    ranges would be of that one's share of the data.
    """
    watching = [q for q in activation_quantizers(unit).values() if q.state & QuantizerState.OBSERVE]
    all_reduce_together([quantizer.observer for quantizer in watching])
    for quantizer in watching:
        if quantizer.rounds and quantizer.calibrated:
            quantizer.update_qparams()
