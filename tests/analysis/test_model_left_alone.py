"""What an analysis leaves as it was, what it works with, and what it says where it cannot."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from helpers.analysis_references import network
from helpers.quantized import noise
from lq.graph.capture import registry
from lq.numerics.quantizer import QuantizerState


def calibrated(mode: Any = "ptq") -> nn.Module:
    model = lq.prepare(network(), noise(2, 8), mode=mode)
    return lq.calibrate(model, [noise(8, 8)]) if mode == "ptq" else model


def trained() -> nn.Module:
    """In training mode, watching and rounding, with weights whose ranges were taken before they last moved."""
    model = calibrated("qat").train()
    model(noise(8, 8)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model[2].eval()  # type: ignore[index]
    return model


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "states": {name: (q.state, q.calibrated, str(q.calibrator)) for name, q in lq.quantizers(model).items()},
        "flags": [module.training for module in model.modules()],
        "forwards": [module.__dict__.get("forward") for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "grad": torch.is_grad_enabled(),
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("make", [calibrated, trained])
def test_the_model_is_afterwards_as_it_was(make: Callable[[], nn.Module]) -> None:
    model = make()
    model[3].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    before, expected = everything(model), copy.deepcopy(model).eval()(noise(8, 8))
    loader = DataLoader(TensorDataset(noise(8, 8), torch.zeros(8)), batch_size=3, shuffle=True)
    given = noise(8, 8)
    lq.analyze(model, loader, progress=False)
    lq.analyze(model, [given], progress=False)
    assert_same(everything(model), before)
    assert torch.equal(given, noise(8, 8))
    assert torch.equal(model.eval()(noise(8, 8)), expected)


class FailsLate(nn.Module):
    """Goes wrong at its n-th call; depends on data, so that it is called as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return x * 2 if x.sum() > 0 else x * 3


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5])
def test_also_after_an_exception_on_the_way(calls: int) -> None:
    late = FailsLate()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), late, nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).train()
    lq.calibrate(lq.prepare(model, noise(2, 8)), [noise(8, 8)])
    lq.analyze(model, [noise(8, 8)], progress=False)
    before = everything(model)
    late.left = calls
    with pytest.raises(KeyboardInterrupt):
        lq.analyze(model, [noise(8, 8)], progress=False)
    assert_same(everything(model), before)

    def batches() -> Iterator[Tensor]:
        yield noise(3, 8)
        raise OSError("the disk is gone")

    late.left = 10**9
    for given in ({}, {"forward": model}):
        with pytest.raises(OSError, match="the disk is gone"):
            lq.analyze(model, batches(), progress=False, **given)
    assert_same(everything(model), before)


def test_a_model_whose_quantizers_are_off_has_its_ranges_all_the_same() -> None:
    model = calibrated()
    expected = lq.analyze(model, [noise(8, 8)], timing=False, progress=False)
    for quantizer in lq.quantizers(model).values():
        quantizer.state = QuantizerState.OFF
    assert lq.analyze(model, [noise(8, 8)], timing=False, progress=False) == expected


def test_hooks_of_the_users_run_as_in_the_prepared_model() -> None:
    def hooked(shift: float) -> lq.Analysis:
        model = network()
        model[0].register_forward_hook(lambda module, args, out: out * 2)  # type: ignore[index]
        if shift:
            model.register_forward_pre_hook(lambda module, args: (args[0] + shift,))
        lq.calibrate(lq.prepare(model, noise(2, 8)), [noise(8, 8) + 0.5 - shift], calibrator="minmax")
        return lq.analyze(model, [noise(8, 8) + 0.5 - shift], timing=False, progress=False)

    (added, *layers) = hooked(0.5).layers  # the hook's sum is a row of its own
    assert (added.kind, added.precision) == ("add", "float")
    assert tuple(layers) == hooked(0.0).layers
    assert tuple(layers) != lq.analyze(calibrated(), [noise(8, 8) + 0.5], timing=False, progress=False).layers


def test_a_hook_that_came_after_preparation_is_refused_where_it_changes_what_is_rounded() -> None:
    model = calibrated()
    model.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))
    with pytest.raises(lq.CaptureError, match="'add' is rounded .* a hook added"):
        lq.analyze(model, [noise(8, 8)], timing=False, progress=False)


def test_layers_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.gain = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2), nn.Parameter(torch.rand(8, 1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            if not torch.isfinite(x).all():
                raise ValueError("not finite")
            return nn.functional.conv2d(x, self.weight * self.gain)

    def ready(overrides: Any = None) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(Gated(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()
        return lq.calibrate(lq.prepare(model, noise(2, 8), overrides=overrides), [noise(8, 8)])

    unregistered = lq.analyze(ready(), [noise(8, 8)], timing=False, progress=False)
    assert (unregistered.layers[0].name, unregistered.layers[0].precision) == ("0", "float")
    assert unregistered.layers[0].parameters == 8 * 3 * 9 + 8
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    lq.register_layer(Gated, lambda layer, x: nn.functional.conv2d(x, layer.weight * layer.gain))
    analysis = lq.analyze(ready(), [noise(8, 8)], progress=False)
    gated = next(layer for layer in analysis.layers if layer.precision == "int8")
    assert gated.kind == "conv + batch_norm + relu"
    assert gated.weight_sqnr_db is not None and 30 < gated.weight_sqnr_db < 60
    assert gated.weights == 8 * 3 * 9
    with torch.no_grad():
        expected = lq.unprepare(ready())(noise(8, 8))
        error = (ready({gated.name: None})(noise(8, 8)) - expected).square().sum() / expected.square().sum()
    assert gated.all_but_sqnr_db == pytest.approx(-10 * float(error.log10()), abs=1e-3)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"not prepared; call lq\.prepare"):
        lq.analyze(network(), [noise(8, 8)])
    with pytest.raises(ValueError, match=r"no range yet.*or train the model, before lq\.analyze\(model, batches\)"):
        lq.analyze(lq.prepare(network(), noise(2, 8)), [noise(8, 8)])
    model = calibrated()
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        lq.analyze(model, [noise(8, 8)], num_samples=0)
    empty: Any
    for empty in ([], [noise(0, 8)]):
        with pytest.raises(ValueError, match=r"batches has no samples: give lq\.analyze at least one batch"):
            lq.analyze(model, empty, progress=False)
    with pytest.raises(ValueError, match=r"and a forward=\.\.\. that calls the model"):
        lq.analyze(model, [noise(8, 8)], forward=lambda batch: None, progress=False)
    bad = noise(8, 8)
    bad[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="float model's outputs on batches have a NaN or an infinity"):
        lq.analyze(model, [bad], progress=False)
    classes = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), Largest())
    lq.calibrate(lq.prepare(classes, noise(2, 8)), [noise(8, 8)])
    with pytest.raises(ValueError, match="returns no floating-point tensor"):
        lq.analyze(classes, [noise(8, 8)], progress=False)


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        return self.fc(x) * (2 if double else 1)


def test_other_settings_than_those_it_was_prepared_for() -> None:
    x = torch.randn(4, 4)
    model = lq.calibrate(lq.prepare(Flagged(), x), [x])
    with pytest.raises(ValueError, match=r"called with \(x, double=True\), but prepared for \(x, double=False\)"):
        lq.analyze(model, [x], forward=lambda batch: model(batch, double=True), progress=False)


def test_outputs_that_rounding_makes_infinite_are_the_worst_there_is() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)
            nn.init.eye_(self.fc.weight)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.fc(x))

    x = torch.rand(8, 4) + 1e-4
    x[0, 0] = 100.0
    model = lq.calibrate(lq.prepare(Log(), x), [x], calibrator="minmax")
    analysis = lq.analyze(model, [x], timing=False, progress=False)
    assert analysis.output_sqnr_db == analysis.layers[0].only_sqnr_db == -200
    assert analysis.layers[0].all_but_sqnr_db == 200
