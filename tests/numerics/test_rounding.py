"""Roundings of the user's own, and ranges of weights that clamp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lq
from helpers.classifiers import Wrapped
from helpers.fits import fit, quantization
from helpers.modes import both_modes
from lq.numerics import rounding
from lq.numerics.functional import choose_qparams, fake_quantize, quantize
from lq.numerics.observers import SmallestErrorObserver
from lq.numerics.quantizer import weight_quantizer

INT8 = lq.QuantSpec(torch.int8, -127, 127, symmetric=True, ch_axis=0)
INT4 = lq.QuantSpec(torch.int8, -7, 7, symmetric=True, ch_axis=0)
POWERS = {0, *(sign * 2**power for sign in (1, -1) for power in range(7))}


def powers_of_two(steps: Tensor) -> Tensor:
    size = 2.0 ** steps.abs().clamp(min=1.0).log2().round()
    return torch.where(steps.abs() < 0.5, 0.0, steps.sign() * size)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_ROUNDINGS", dict(rounding._ROUNDINGS))
    lq.register_rounding("powers_of_two", powers_of_two)


def own_rounding(names: list[str]) -> dict[str, Any]:
    return {name: {"weight_rounding": "powers_of_two"} for name in names}


@both_modes
def test_a_rounding_of_ones_own_through_a_fit(mode: Any, tmp_path: Path) -> None:
    model = Wrapped()
    callback = quantization(tmp_path, mode=mode, overrides=own_rounding(["3"]), export=["onnx"])
    trainer = fit(model, tmp_path, callback, epochs=2)
    result = callback.result
    assert result is not None
    rows = {layer.name: layer for layer in result.report.layers}
    assert rows["3"].precision == "int8" and ", powers_of_two" in rows["3"].weight
    assert "powers_of_two" not in rows["0"].weight
    weights = model.model.state_dict()
    whole = {name: set(weights[f"{name}.weight"].unique().tolist()) for name in ("0", "3")}
    assert whole["3"] <= POWERS and not whole["0"] <= POWERS
    # Kernels and simulation, and the file that was written.
    x = torch.randn(4, 3, 8, 8)
    int8 = lq.load(tmp_path / "int8" / "int8.pt2")
    assert torch.allclose(int8(x), model(x), atol=1e-5)
    assert result.int8_side.metrics["val_acc"] == pytest.approx(
        trainer.validate(model, verbose=False, dataloaders=trainer.val_dataloaders)[0]["val_acc"]
    )


def test_a_checkpoint_needs_the_function() -> None:
    model = lq.prepare(Wrapped().model, torch.randn(2, 3, 8, 8), overrides=own_rounding(["3"]))
    assert lq.quantizers(model)["3.weight"].spec.rounding == "powers_of_two"
    rounding._ROUNDINGS.pop("powers_of_two")
    with pytest.raises(ValueError, match=r"weight_rounding='powers_of_two' is unknown.*lq.register_rounding"):
        lq.LayerSpec(weight_rounding="powers_of_two")


def test_gradients_go_straight_through() -> None:
    spec = lq.QuantSpec(torch.int8, -127, 127, symmetric=True, rounding="powers_of_two")
    w = torch.tensor([-127.0, -3.0, 0.4, 5.0, 127.0], requires_grad=True)
    out = fake_quantize(w, torch.tensor(1.0), torch.tensor(0), spec)
    assert out.tolist() == [-127.0, -4.0, 0.0, 4.0, 127.0]  # 128 is outside, and clamped
    out.sum().backward()
    assert w.grad is not None and w.grad.tolist() == [0, 1, 1, 1, 0]
    assert quantize(w.detach(), torch.tensor(1.0), torch.tensor(0), spec).tolist() == [-127, -4, 0, 4, 127]


def test_what_a_rounding_gives_is_checked() -> None:
    lq.register_rounding("half", lambda steps: torch.round(steps * 2) / 2)
    lq.register_rounding("one", lambda steps: steps.round().sum())
    for name in ("half", "one"):
        spec = lq.QuantSpec(torch.int8, -127, 127, symmetric=True, rounding=name)
        with pytest.raises(ValueError, match=f"weight_rounding='{name}': its function must give whole numbers"):
            fake_quantize(torch.tensor([1.5, 2.6]), torch.tensor(1.0), torch.tensor(0), spec)
    for name in ("", "nearest"):
        with pytest.raises(ValueError, match="must be a name of your own"):
            lq.register_rounding(name, torch.round)
    with pytest.raises(TypeError, match="must be a function"):
        lq.register_rounding("three", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_range='max' is unknown; choose 'minmax' or 'mse'"):
        lq.LayerSpec(weight_range="max")  # type: ignore[arg-type]


@given(seed=st.integers(0, 2**31), outlier=st.sampled_from([1.0, 3.0, 30.0]), bits=st.sampled_from([INT4, INT8]))
def test_the_range_with_the_smallest_error(seed: int, outlier: float, bits: lq.QuantSpec) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    weight[0, 0] *= outlier
    errors = {}
    for range in ("minmax", "mse"):
        quantizer = weight_quantizer(bits, weight, range)  # type: ignore[arg-type]
        quantizer.refresh(weight)
        rounded = fake_quantize(weight, quantizer.scale, quantizer.zero_point, bits)
        errors[range] = (rounded - weight).square().flatten(1).sum(1)
        # Rounded weights keep their range: a checkpoint of them is converted to the same integers.
        again = weight_quantizer(bits, rounded, range)  # type: ignore[arg-type]
        again.refresh(rounded)
        assert torch.allclose(fake_quantize(rounded, again.scale, again.zero_point, bits), rounded, atol=1e-6)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-6)).all()


def test_four_bits_clamp_a_gaussian_where_the_source_says() -> None:
    """At 2.55 standard deviations of a Gaussian with 15 levels: found by a fine search with numpy's own rounding."""
    weight = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    observer = SmallestErrorObserver(INT4, 1)
    observer(weight)
    bounds = torch.linspace(1.5, 4.0, 251)
    errors = []
    for bound in bounds:
        scale, zero_point = choose_qparams(-bound[None], bound[None], INT4)
        errors.append(float((fake_quantize(weight, scale, zero_point, INT4) - weight).square().sum()))
    best = float(bounds[errors.index(min(errors))])
    assert observer.range()[1].item() == pytest.approx(best, rel=0.05)


def test_ranges_that_clamp_through_conversion() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    for layer in (model[0], model[3]):
        nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    x = torch.randn(16, 3, 8, 8)
    expected = model(x).detach()
    noise = {}
    for range in ("minmax", "mse"):
        overrides: Any = {
            "0": {"weight_bits": 3, "weight_range": range},
            "3": {"weight_bits": 3, "weight_range": range},
        }
        prepared = lq.prepare(nn.Sequential(*model), x[:2], overrides=overrides)
        int8 = lq.convert(lq.calibrate(prepared, [x]))
        noise[range] = float((int8(x) - expected).square().mean())
        lq.unprepare(prepared)
    assert noise["mse"] < 0.8 * noise["minmax"]
