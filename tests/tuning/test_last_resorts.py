"""``lq.quantize`` where calibration is not enough: few layers in float, and training with fake-quantizers."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import lq
from helpers.broken_layers import BATCHES, TEST, break_layers, explained, network

FEW_BITS = {"layer*": {"weight_bits": 4}}
ONE_CALIBRATOR = {"calibrator": "minmax", "equalization": False, "bias_correction": False}


def distil(student: nn.Module) -> None:
    """Trains towards the float network's outputs, with batch norm as it is."""
    assert student.training and torch.is_grad_enabled()
    student.eval()
    teacher = network(2)
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    for index in range(120):
        x = BATCHES[index % len(BATCHES)]
        with torch.no_grad():
            wanted = teacher(x)
        loss = (student(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_training_with_fake_quantizers_comes_last() -> None:
    model = network(2)
    before = copy.deepcopy(model.state_dict())
    metric = explained(model)
    calls: list[nn.Module] = []

    def fine_tune(student: nn.Module) -> None:
        calls.append(student)
        distil(student)

    quantized = lq.quantize(
        model,
        BATCHES,
        metric,
        max_drop=5,
        overrides=FEW_BITS,
        max_float_layers=0,
        fine_tune=fine_tune,
        **ONE_CALIBRATOR,
    )
    tuning = quantized.tuning
    assert [step.fine_tuned for step in tuning.steps] == [False, True] and len(calls) == 1
    assert tuning.steps[0].drop > 4 * tuning.step.drop and tuning.step.fine_tuned
    assert not tuning.float_layers and "fine-tuned" in str(quantized)
    # What is returned is what was measured, and the model is what it was made of.
    assert metric(quantized.int8) == tuning.step.metric
    assert metric(lq.convert(quantized.model)) == pytest.approx(tuning.step.metric, abs=1e-3)
    assert not quantized.model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_nothing_is_trained_where_layers_in_float_are_enough() -> None:
    def fine_tune(student: nn.Module) -> None:
        raise AssertionError("not needed")

    model = break_layers(network(), ["layer2"])
    quantized = lq.quantize(model, BATCHES, explained(model), max_drop=8, fine_tune=fine_tune, **ONE_CALIBRATOR)
    assert quantized.tuning.met and quantized.tuning.float_layers == ("layer2.conv2",)


def test_an_evaluation_is_left_for_it() -> None:
    model = network(2)
    arguments = {"max_drop": 0, "overrides": FEW_BITS, "fine_tune": distil, "max_evaluations": 6, **ONE_CALIBRATOR}
    tuning = lq.quantize(model, BATCHES, explained(model), **arguments).tuning
    assert tuning.evaluations == 6 and [step.fine_tuned for step in tuning.steps].count(True) == 1
    assert tuning.steps[-1].fine_tuned and any(step.float_layers for step in tuning.steps)


def test_what_it_raises_does_not_cost_the_network_found_before(caplog: pytest.LogCaptureFixture) -> None:
    def fine_tune(student: nn.Module) -> None:
        with torch.no_grad():
            next(student.parameters()).zero_()
        raise RuntimeError("out of memory in this test")

    model = network(2)
    arguments = {"max_drop": 0, "overrides": FEW_BITS, "max_float_layers": 0, **ONE_CALIBRATOR}
    with caplog.at_level(logging.WARNING, "lq"):
        quantized = lq.quantize(model, BATCHES, explained(model), fine_tune=fine_tune, **arguments)
    assert "fine-tuning failed" in caplog.text and "out of memory in this test" in caplog.text
    without = lq.quantize(model, BATCHES, explained(model), **arguments)
    assert torch.equal(quantized.int8(TEST), without.int8(TEST))
    assert torch.equal(quantized.model(TEST), without.model(TEST))


@pytest.mark.parametrize("most", [0, 1, 2])
def test_no_more_layers_stay_in_float_than_may(most: int) -> None:
    model = break_layers(network(), ["layer2", "layer5", "layer6"])
    tuning = lq.quantize(model, BATCHES, explained(model), max_drop=8, max_float_layers=most, **ONE_CALIBRATOR).tuning
    assert max(len(step.float_layers) for step in tuning.steps) == most
    assert not tuning.met and tuning.ended == "everything was tried"


def test_a_number_of_layers_below_none() -> None:
    with pytest.raises(
        ValueError, match="max_float_layers=-1 must be a whole number, at least 0, or None for no limit"
    ):
        lq.quantize(network(), BATCHES, explained(network()), max_drop=8, max_float_layers=-1)


@pytest.mark.parametrize("most", [3, 4, 5])
def test_an_evaluation_is_left_for_it_also_where_methods_take_the_others(most: int) -> None:
    model = network(2)
    arguments = {"max_drop": 0, "overrides": FEW_BITS, "fine_tune": distil, "max_evaluations": most}
    tuning = lq.quantize(model, BATCHES, explained(model), **arguments).tuning
    assert tuning.evaluations == most and tuning.steps[-1].fine_tuned
    assert tuning.met or tuning.ended == f"max_evaluations={most} is reached"


def test_no_gradients_are_left() -> None:
    model = network(2)
    arguments = {"max_drop": 0, "overrides": FEW_BITS, "max_float_layers": 0, **ONE_CALIBRATOR}
    quantized = lq.quantize(model, BATCHES, explained(model), fine_tune=distil, **arguments)
    assert quantized.tuning.steps[-1].fine_tuned
    assert all(p.grad is None for p in quantized.model.parameters())


@pytest.mark.parametrize("value", [1.5, "2", True])
def test_a_number_of_layers_that_is_none(value: object) -> None:
    with pytest.raises(ValueError, match=f"max_float_layers={value!r} must be a whole number"):
        lq.quantize(network(), BATCHES, lambda _: 1.0, max_drop=1, max_float_layers=value)
