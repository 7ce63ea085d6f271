"""Learning-rate schedules against closed forms and torch's own."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR

from lq.models import SCHEDULES, lr_factor
from lq.models.schedules import ScheduleName


@pytest.mark.parametrize(("total", "warmup"), [(50, 0.3), (37, 0.25), (10, 0.5), (20, 0.0)])
def test_onecycle_is_the_curve_of_torch(total: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=total, pct_start=warmup)
    expected = []
    for _ in range(total):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        if len(expected) < total:
            scheduler.step()
    assert [lr_factor("onecycle", step, total, warmup) for step in range(total)] == pytest.approx(expected)


def test_cosine_falls_from_the_peak_towards_zero() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert [lr_factor("cosine", step, 20) for step in range(20)] == pytest.approx(expected)


def test_warmup_rises_in_equal_steps_to_the_peak() -> None:
    assert [lr_factor("constant", step, 10, warmup=0.4) for step in range(6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1, 1]
    )
    assert lr_factor("cosine", 4, 10, warmup=0.4) == 1
    assert lr_factor("cosine", 7, 10, warmup=0.4) == pytest.approx(0.5)


def test_step_drops_at_its_milestones() -> None:
    curve = [lr_factor("step", step, 8, milestones=(0.5, 0.75), gamma=0.1) for step in range(8)]
    assert curve == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@given(
    schedule=st.sampled_from(get_args(ScheduleName)),
    total=st.integers(0, 1000),
    step=st.integers(0, 1100),
    warmup=st.floats(0, 0.99),
)
def test_factor_stays_between_zero_and_the_peak(schedule: ScheduleName, total: int, step: int, warmup: float) -> None:
    factor = lr_factor(schedule, step, total, warmup)
    assert 0 < factor <= 1
    if step >= total > 0:
        assert factor == lr_factor(schedule, total - 1, total, warmup)


def test_unknown_schedule_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="schedule='linear' is not one of onecycle, cosine, step, constant"):
        lr_factor("linear", 0, 10)
    assert SCHEDULES == ("onecycle", "cosine", "step", "constant")
