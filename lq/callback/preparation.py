"""Preparing the unit with what the user's own step calls it with."""

from __future__ import annotations

from typing import Any

import torch

from lq.callback.batches import first_samples
from lq.callback.stages import StagedUnit
from lq.callback.unit import unit_arguments
from lq.modes import evaluating
from lq.overrides import Overrides
from lq.prepare import Mode, prepare
from lq.targets import Target


def prepare_for_batch(
    staged: StagedUnit, batch: Any, *, target: Target, mode: Mode, observer: str, overrides: Overrides
) -> None:
    """Put quantizers on the unit, for inputs as ``training_step`` makes them of ``batch``.

    Args:
        staged: the unit, in float.
        batch: of a dataloader, on the module's device.
        target: see :func:`lq.prepare`.
        mode: likewise.
        observer: likewise.
        overrides: likewise.
    """
    pl_module, unit = staged.pl_module, staged.unit
    with evaluating(pl_module), torch.no_grad():
        args, kwargs = unit_arguments(pl_module, unit, batch)
    args, kwargs = first_samples((args, kwargs))
    prepare(unit, args, example_kwargs=kwargs, target=target, mode=mode, observer=observer, overrides=overrides)
