"""Learning-rate schedules as pure functions of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

ScheduleName = Literal["onecycle", "cosine", "step", "constant"]

SCHEDULES: tuple[str, ...] = get_args(ScheduleName)

# The start and the end of the one-cycle curve as fractions of the peak: the defaults of torch's OneCycleLR.
_ONECYCLE_START = 1 / 25
_ONECYCLE_END = _ONECYCLE_START / 1e4


def lr_factor(
    schedule: ScheduleName,
    step: int,
    total_steps: int,
    warmup: float = 0.0,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> float:
    """The learning rate at an optimizer step, as a fraction of the peak learning rate.

    Pure in its arguments, so a run that is resumed with another length gets the curve of its new length.

    Args:
        schedule: ``"onecycle"`` rises from 1/25 to 1 and falls to 4e-6, both along half a cosine (Smith and Topin,
            "Super-Convergence", 2018; the curve of ``torch.optim.lr_scheduler.OneCycleLR``). The others rise linearly
            during the warm-up, then ``"cosine"`` falls to 0 along half a cosine, ``"step"`` is multiplied by
            ``gamma`` at each milestone, and ``"constant"`` stays at 1.
        step: the optimizer step, from 0. Steps past the end get the last step's value.
        total_steps: optimizer steps in the whole run.
        warmup: fraction of ``total_steps`` spent rising to the peak.
        milestones: where ``"step"`` drops, as fractions of ``total_steps``.
        gamma: what ``"step"`` multiplies by at a milestone.

    Returns:
        A factor in [0, 1].

    Example:
        >>> [round(lr_factor("cosine", step, 4), 3) for step in range(4)]
        [1.0, 0.854, 0.5, 0.146]
    """
    step = min(step, max(total_steps - 1, 0))
    if schedule == "onecycle":
        return _onecycle(step, total_steps, warmup)
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        # Not from 0, where the first step would be wasted, and one below the peak at the end, which comes next.
        return (step + 1) / (warmup_steps + 1)
    match schedule:
        case "cosine":
            return _half_cosine(1.0, 0.0, (step - warmup_steps) / max(total_steps - warmup_steps, 1))
        case "step":
            return gamma ** sum(step >= milestone * total_steps for milestone in milestones)
        case "constant":
            return 1.0
    raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")


def _onecycle(step: int, total_steps: int, warmup: float) -> float:
    # The peak lies on step `peak`, which need not be whole; torch's OneCycleLR places it in the same way.
    peak, last = warmup * total_steps - 1, total_steps - 1
    if step < peak:
        return _half_cosine(_ONECYCLE_START, 1.0, step / peak)
    return _half_cosine(1.0, _ONECYCLE_END, (step - peak) / (last - peak) if last > peak else 0.0)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
