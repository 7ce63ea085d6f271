"""The weights that validation uses, where these are not the ones that are trained.

Callbacks and hooks that keep an average (EMA) put it in the model's place for validation, and take it out again
afterwards. Nothing but the weights themselves tells that they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lq.callback.averages import averages_buffers
from lq.callback.end.weights import copied_weights, known_checkpoints
from lq.graph.forward import QUANTIZERS


class ValidatedWeights:
    """Keeps the weights of the last validation, and of the one that the best checkpoint was written after.

    They lie in memory, on the CPU, from a validation to the next training step, which tells whether they were replaced;
    until the end of the fit where they were.

    Args:
        checkpoints: what :func:`~lq.callback.end.weights.known_checkpoints` says as the fit begins.
    """

    def __init__(self, checkpoints: Mapping[str, Any]) -> None:
        self._checkpoints = checkpoints
        self._pending: dict[str, Tensor] | None = None
        self._last: dict[str, Tensor] | None = None
        self._best: dict[str, Tensor] | None = None
        self._told = False

    def take(self, trainer: Any, pl_module: Any) -> None:
        """Copy the weights; a validation begins, and whatever replaces them has done so."""
        # An average that Lightning makes is in its checkpoints, and in the model when training has ended.
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not averages_buffers(trainer):
            weights = copied_weights(pl_module)
            # An average of a state dict has the quantizers' state in it as well, as of the first step: ranges are those
            # of the training.
            self._pending = {name: value for name, value in weights.items() if QUANTIZERS not in name.split(".")}

    def compare(self, trainer: Any, pl_module: Any) -> None:
        """Look whether the weights of the last validation are those that training goes on with."""
        if self._pending is None:
            return
        self._last = self._pending if differs(pl_module, self._pending) else None
        self._pending = None
        checkpoints = known_checkpoints(trainer)
        if checkpoints != self._checkpoints:
            self._best, self._checkpoints = self._last, checkpoints
        if self._last is not None and not self._told:
            self._told = True
            rank_zero_info(
                "lq: validation uses other weights than those that are trained, an average that a callback or a hook "
                "puts in their place: INT8 will be made of these"
            )

    def of(self, checkpoint: str | None) -> dict[str, Tensor] | None:
        """What validation used in place of the weights in the best checkpoint, or of the last ones.

        Args:
            checkpoint: path of the best checkpoint, or None for the weights that training ended with.

        Returns:
            A state dict of the LightningModule, or None where validation used these weights themselves.
        """
        return self._last if checkpoint is None else self._best


def differs(pl_module: Any, state: dict[str, Tensor]) -> bool:
    """Whether a parameter of ``pl_module`` is another than in ``state``."""
    return any(
        name in state and not torch.equal(parameter.detach().cpu(), state[name])
        for name, parameter in pl_module.named_parameters()
    )
