"""The table of ranges, against the weights and the data themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lq
from helpers.calibration import BATCHES, activations, calibrated, network
from helpers.networks import StandardizedConv, sequential
from lq.workflow.ranges import QuantizerRange

DATA = torch.stack(BATCHES).numpy()


def rows_of(model: nn.Module) -> dict[str, QuantizerRange]:
    return {row.name: row for row in lq.ranges(model).rows}


@pytest.mark.parametrize(("target", "weight_bits"), [("x86", 8), ("x86_avx2", 7)])
def test_rows_name_every_quantizer_its_bits_and_its_scheme(target: str, weight_bits: int) -> None:
    model = calibrated("minmax", target=target)
    rows = rows_of(model)
    assert list(rows) == list(lq.quantizers(model))
    for name, row in rows.items():
        assert row.bits == (weight_bits if name.endswith(".weight") else 8)
        assert row.scheme == str(lq.quantizers(model)[name].spec)
    lines = {line.split()[1]: line for line in str(lq.ranges(model)).splitlines() if line.startswith("│")}
    lines.pop("│")  # where a cell goes on in the next line
    assert list(lines) == list(rows)
    for name, row in rows.items():
        cells = [cell.strip() for cell in lines[name].strip("│").split("│")]
        if row.rounds:
            assert cells == [name, str(row.bits), row.scheme, row.range, row.calibrator, f"{row.clipped:.4%}"]
        else:
            assert "watched for" in lines[name]
    assert {name for name, row in rows.items() if not row.rounds} == {"layer1.bn2", "layer2.bn2", "fc"}


def test_ranges_of_activations_are_those_of_the_data() -> None:
    row = rows_of(calibrated("minmax"))["input"]
    # The grid has zero on it, so it lies up to half a step beside the data's own range.
    step = (row.high[0] - row.low[0]) / 255
    assert step == pytest.approx((DATA.max() - DATA.min()) / 255, rel=1e-5)
    np.testing.assert_allclose([row.low[0], row.high[0]], [DATA.min(), DATA.max()], atol=0.51 * step)
    assert row.range == f"[{row.low[0]:.4g}, {row.high[0]:.4g}]"
    assert row.clipped == 0.0
    relu = rows_of(calibrated("minmax"))["layer1.relu"]
    assert relu.low == (0.0,)


@pytest.mark.parametrize("target", ["x86", "x86_avx2"])
def test_ranges_of_weights_are_those_of_their_channels(target: str) -> None:
    model = calibrated("minmax", target=target)  # has not run in INT8 yet
    weight = model.fc.weight.detach()  # type: ignore[union-attr]
    row = rows_of(model)["fc.weight"]
    reach = weight.abs().amax(1).numpy()
    np.testing.assert_allclose(row.high, reach, rtol=1e-5)
    np.testing.assert_allclose(row.low, -reach, rtol=1e-5)
    assert row.range == f"±{reach.min():.4g} to ±{reach.max():.4g} (10 channels)"
    assert (row.calibrator, row.clipped) == ("minmax", 0.0)


def test_ranges_of_weights_follow_the_weights() -> None:
    model = calibrated("minmax")
    model(BATCHES[0])
    with torch.no_grad():
        model.fc.weight[3] *= 100  # type: ignore[union-attr]
    weight = model.fc.weight.detach()  # type: ignore[union-attr]
    np.testing.assert_allclose(rows_of(model)["fc.weight"].high, weight.abs().amax(1).numpy(), rtol=1e-5)


def test_a_weight_that_the_forward_computes_has_a_range_once_the_model_ran() -> None:
    model = lq.prepare(sequential(StandardizedConv(3, 8, 3), nn.ReLU()).eval(), BATCHES[0])
    lq.calibrate(model, BATCHES)
    assert rows_of(model)["0.conv2d.weight"].range == "no range yet"
    model(BATCHES[0])
    assert "(8 channels)" in rows_of(model)["0.conv2d.weight"].range


@pytest.mark.parametrize("calibrator", ["percentile:99", "percentile:90", "percentile:51", "mse", "entropy"])
def test_clipped_share_is_counted(calibrator: str) -> None:
    model = calibrated(calibrator)
    row = rows_of(model)["input"]
    assert row.calibrator == str(activations(model)["input"].calibrator)
    width = 2.0 ** int(activations(model)["input"].observer.exponent)
    half_a_step = (row.high[0] - row.low[0]) / 255 / 2
    low, high = row.low[0] - half_a_step, row.high[0] + half_a_step
    # A bin at either end is counted as a whole.
    most, least = (((low + w > DATA) | (high - w < DATA)).mean() for w in (width, -width))
    assert row.clipped is not None
    assert least <= row.clipped <= most
    assert most - least < 0.01
    if calibrator == "percentile:90":
        assert row.clipped == pytest.approx(0.2, abs=0.02)


def test_clipped_share_that_is_not_known() -> None:
    model = calibrated("minmax", observer="minmax")
    assert rows_of(model)["input"].clipped == 0.0
    quantizer = lq.quantizers(model)["input"]
    quantizer.set_range(torch.tensor(-0.1), torch.tensor(0.1))
    assert rows_of(model)["input"].clipped is None
    assert "±" not in rows_of(model)["input"].range


def test_before_calibration() -> None:
    model = lq.prepare(network(), BATCHES[0])
    for name, row in rows_of(model).items():
        if not name.endswith(".weight"):
            assert (row.range, row.low, row.high, row.clipped) == ("no range yet", (), (), None)
    assert "no range yet" in str(lq.ranges(model))
    with pytest.raises(ValueError, match="not prepared; call lq.prepare"):
        lq.ranges(network())


def test_looking_at_the_table_changes_nothing() -> None:
    model, twin = calibrated("minmax"), calibrated("minmax")
    lq.ranges(model)
    assert torch.equal(model(BATCHES[0]), twin(BATCHES[0]))
    unready = lq.prepare(network(), BATCHES[0])
    lq.ranges(unready)
    assert torch.equal(unready(BATCHES[0]), network()(BATCHES[0]))
    with torch.no_grad():
        unready.fc.weight.mul_(3)  # type: ignore[union-attr]
    lq.calibrate(unready, BATCHES)
    fresh = network()
    with torch.no_grad():
        fresh.fc.weight.mul_(3)  # type: ignore[union-attr]
    assert torch.equal(unready(BATCHES[0]), lq.calibrate(lq.prepare(fresh, BATCHES[0]), BATCHES)(BATCHES[0]))
