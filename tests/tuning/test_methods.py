"""Bias correction, equalisation and learned rounding, each against what its formula promises."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lq
from helpers.broken_layers import BATCHES, TEST, explained, network
from helpers.networks import randomize_batch_norm

ALL = torch.cat(BATCHES)


class Depthwise(nn.Module):
    """An inverted residual, as in MobileNetV2, with the activation that is given."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.expand, self.bn1, self.act1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), activation()
        self.depth, self.bn2, self.act2 = (
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            activation(),
        )
        self.project, self.bn3 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.fc1, self.act3, self.fc2 = nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act1(self.bn1(self.expand(x)))
        y = self.act2(self.bn2(self.depth(y)))
        x = x + self.bn3(self.project(y))
        return self.fc2(self.act3(self.fc1(x.mean((2, 3)))))  # type: ignore[no-any-return]


def depthwise(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norm(Depthwise(activation)).eval()


def calibrated(model: nn.Module, **kwargs: Any) -> nn.Module:
    return lq.calibrate(lq.prepare(copy.deepcopy(model), BATCHES[0], **kwargs), BATCHES)


def outputs(model: nn.Module, x: Tensor = TEST) -> Tensor:
    with torch.no_grad():
        return model(x).double()  # type: ignore[no-any-return]


def made_by(model: nn.Module, layers: list[str]) -> dict[str, Tensor]:
    """What some layers make of all of ``BATCHES``."""
    values: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: values.update({name: out.double().clone()})
        )
        for name in layers
    ]
    outputs(model, ALL)
    for hook in hooks:
        hook.remove()
    return values


@pytest.mark.parametrize("bits", [8, 4])
def test_bias_correction_leaves_no_mean_error_in_any_layer(bits: int) -> None:
    float_model = depthwise()
    layers = ["stem", "bn1", "bn2", "bn3", "fc1", "fc2"]
    everywhere = {name: {"weight_bits": bits} for name in ("stem", "expand", "depth", "project", "fc1", "fc2")}
    model = calibrated(float_model, overrides=everywhere)

    def mean_errors(model: nn.Module) -> dict[str, float]:
        expected, found = made_by(float_model, layers), made_by(model, layers)
        errors = {name: (expected[name] - found[name]).transpose(0, 1).flatten(1).mean(1) for name in layers}
        return {name: float(error.abs().max() / expected[name].abs().max()) for name, error in errors.items()}

    before = mean_errors(model)
    ranges = {name: (q.scale.clone(), q.zero_point.clone()) for name, q in lq.quantizers(model).items()}
    assert lq.correct_bias(model, BATCHES) is model
    after = mean_errors(model)
    assert max(before.values()) > 1e-3
    # A value in the middle between two steps may round the other way after a change in the last bit.
    assert all(after[name] < 1e-4 for name in layers), after
    for name, quantizer in lq.quantizers(model).items():
        assert torch.equal(quantizer.scale, ranges[name][0]) and torch.equal(quantizer.zero_point, ranges[name][1])
    # What the batch norms have got is in the INT8 network, too.
    int8 = lq.convert(model)
    assert torch.allclose(outputs(int8).mean(0), outputs(model).mean(0), atol=0.02 * float(outputs(model).abs().max()))


def test_bias_correction_leaves_alone_what_has_no_bias_of_its_own() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, bias=False)
            self.twice = nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.first(x))))))
            return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    model = calibrated(Bare().eval())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lq.correct_bias(model, BATCHES)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"fc.bias"}


def channel_ranges(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Of what makes each channel, folded, and of what reads it; of all connected pairs in :class:`Depthwise`."""

    def folded(conv: Any, norm: Any) -> Tensor:
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return (conv.weight * factor.reshape(-1, 1, 1, 1)).abs().amax((1, 2, 3)).detach()

    m: Any = model
    depth = m.depth.weight.abs().amax((1, 2, 3)).detach()
    project = m.project.weight.abs().amax((0, 2, 3)).detach()
    rows, columns = m.fc1.weight.abs().amax(1).detach(), m.fc2.weight.abs().amax(0).detach()
    return [(folded(m.expand, m.bn1), depth), (folded(m.depth, m.bn2), project), (rows, columns)]


def test_equalisation_makes_ranges_equal_and_leaves_the_outputs_as_they_are() -> None:
    float_model = depthwise()
    with torch.no_grad():  # channels of very different ranges
        float_model.bn1.weight[::3] *= 100.0  # type: ignore[index, operator, union-attr]
        float_model.bn1.bias[::3] *= 100.0  # type: ignore[index, operator, union-attr]
        float_model.depth.weight[::3] /= 100.0  # type: ignore[index, operator, union-attr]
    assert any(not torch.allclose(a, b, rtol=0.5) for a, b in channel_ranges(float_model))
    model = lq.prepare(copy.deepcopy(float_model), BATCHES[0])
    assert lq.equalize(model, BATCHES, absorb_bias=False) is model
    assert all(torch.allclose(a, b, rtol=0.01) for a, b in channel_ranges(model))
    expected = outputs(float_model)
    assert torch.allclose(outputs(lq.unprepare(copy.deepcopy(model))), expected, rtol=1e-4, atol=1e-4)
    metric = explained(float_model)
    plain = metric(lq.convert(calibrated(float_model)))
    equal = metric(lq.convert(lq.calibrate(model, BATCHES)))
    assert 100 - equal < (100 - plain) / 2


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_a_bias_that_is_high_is_absorbed_by_the_next_layer(activation: type[nn.Module]) -> None:
    float_model = depthwise(activation)
    with torch.no_grad():
        float_model.bn2.bias[::2] = 3.0  # type: ignore[index, operator, union-attr]
        float_model.bn2.weight[::2] = 0.1  # type: ignore[index, operator, union-attr]
    without, absorbing = (lq.prepare(copy.deepcopy(float_model), BATCHES[0]) for _ in range(2))
    lq.equalize(without, BATCHES, absorb_bias=False)
    lq.equalize(absorbing, BATCHES)
    moved = without.bn2.bias - absorbing.bn2.bias  # type: ignore[operator, union-attr]
    assert bool((moved[::2] > 0).all()) and not moved[1::2].any()
    assert torch.equal(without.bn1.bias, absorbing.bn1.bias)  # type: ignore[union-attr]  # the next layer pads
    for model in (without, absorbing):
        assert torch.allclose(outputs(lq.unprepare(model), ALL), outputs(float_model, ALL), rtol=1e-3, atol=1e-3)


def test_before_a_relu6_a_channel_stays_below_six() -> None:
    float_model = depthwise(nn.ReLU6)
    with torch.no_grad():
        float_model.bn1.weight[::2] *= 0.05  # type: ignore[index, operator, union-attr]
        float_model.bn1.bias[::2] *= 0.05  # type: ignore[index, operator, union-attr]
        float_model.bn1.bias[1] = 7.0  # type: ignore[index, union-attr, operator]  # cut off
    before = made_by(float_model, ["bn1"])["bn1"]
    model = lq.prepare(copy.deepcopy(float_model), BATCHES[0])
    lq.equalize(model, BATCHES, absorb_bias=False)
    after = made_by(lq.unprepare(model), ["bn1"])["bn1"]
    high, free = after.amax((0, 2, 3)), before.amax((0, 2, 3)) < 6
    assert float(high[free].max()) <= 6 and not free[1]
    assert torch.equal(after[:, ~free], before[:, ~free])
    assert bool((high[free][::2] > 1.5 * before.amax((0, 2, 3))[free][::2]).any())
    assert torch.allclose(outputs(model, ALL), outputs(float_model, ALL), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("together", ["layers", "blocks"])
def test_learned_rounding_takes_neighbours_on_the_grid_that_the_outputs_err_less_with(together: Any) -> None:
    float_model = network(2)
    layers = ["stem.0", *(f"layer{i}.conv{j}" for i in (0, 1) for j in (1, 2)), "fc"]
    model = calibrated(float_model, overrides={name: {"weight_bits": 3} for name in layers})
    learnt = lq.learn_rounding(copy.deepcopy(model), BATCHES, iterations=200, together=together, progress=False)
    assert all(parameter.grad is None for parameter in learnt.parameters())
    outputs(learnt)
    changed = 0
    for name in layers:
        weight, new = (m.get_submodule(name).weight.detach() for m in (model, learnt))
        assert isinstance(weight, Tensor) and isinstance(new, Tensor)
        shape = (-1, *[1] * (weight.dim() - 1))
        scale = weight.abs().flatten(1).amax(1).reshape(shape) / 3  # 3 bits: -3 to 3
        assert torch.allclose(lq.quantizers(learnt)[f"{name}.weight"].scale.reshape(shape), scale, rtol=1e-5)
        steps = new / scale
        assert torch.allclose(steps, steps.round(), atol=1e-4)
        assert float(((new - weight) / scale).abs().max()) < 1
        changed += int((steps.round() != (weight / scale).round()).sum())
    assert changed

    def error(model: nn.Module) -> float:
        return float((outputs(model) - outputs(float_model)).square().sum())

    assert error(lq.convert(learnt)) < error(lq.convert(model))


def test_learned_rounding_comes_near_to_the_best_of_all_roundings() -> None:
    """Of a linear layer that is small enough to try all of them."""
    nearest_excess, learnt_excess = 0.0, 0.0
    ups = torch.tensor(list(itertools.product([0.0, 1.0], repeat=10)))
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        layer = nn.Linear(10, 3)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(3, 10, generator=generator))
        x = torch.randn(256, 10, generator=generator) @ torch.randn(10, 10, generator=generator) + 1
        model = lq.calibrate(lq.prepare(nn.Sequential(layer), x, overrides={"0": {"weight_bits": 3}}), [x])
        inputs = lq.quantizers(model)["input"].round(x)  # the inputs as INT8 has them
        weight = layer.weight.detach().clone()
        scale = weight.abs().amax(1) / 3
        lq.learn_rounding(model, [x], progress=False)

        def error(row: int, candidates: Tensor, x: Tensor = x, q: Tensor = inputs, w: Tensor = weight) -> Tensor:
            return (q @ candidates.T - (x @ w[row])[:, None]).square().mean(0)

        for row in range(3):
            steps = weight[row] / scale[row]
            # The largest one makes the scale, and stays.
            fixed = steps.round().abs() == 3
            every = torch.where(fixed, steps.round(), steps.floor() + ups) * scale[row]
            best = float(error(row, every).min())
            nearest_excess += float(error(row, steps.round()[None] * scale[row])) - best
            learnt_excess += float(error(row, layer.weight.detach()[row][None])) - best
    assert -1e-4 < learnt_excess < nearest_excess / 2


def test_learned_rounding_has_its_time() -> None:
    model = calibrated(network(1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lq.learn_rounding(model, BATCHES, seconds=1e-9, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("call", [lq.correct_bias, lq.learn_rounding])
def test_methods_need_ranges(call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=rf"have no range yet .* before lq.{call.__name__}\(model, batches\)"):
        call(lq.prepare(network(1), BATCHES[0]), BATCHES)
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        call(calibrated(network(1)), BATCHES, num_samples=0)


def test_mistakes() -> None:
    model = calibrated(network(1))
    with pytest.raises(ValueError, match="iterations=0 must be at least 1"):
        lq.learn_rounding(model, BATCHES, iterations=0)
    with pytest.raises(ValueError, match="seconds=0 must be above 0"):
        lq.learn_rounding(model, BATCHES, seconds=0)
    with pytest.raises(ValueError, match="together='network' must be 'layers' or 'blocks'"):
        lq.learn_rounding(model, BATCHES, together="network")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not prepared"):
        lq.equalize(network(1), BATCHES)
