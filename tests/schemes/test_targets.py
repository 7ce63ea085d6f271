"""Targets: one prepared model, converted for each of them from the same statistics."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lq
from helpers.networks import Residual, SharedResidual, randomize_batch_norm
from helpers.quantized import TARGET, calibrated, noise
from lq.graph.qdq import QUANTIZE_BUFFER

X = noise(8, seed=1)


def exact(target: str) -> lq.Target:
    """The target with 7-bit weights, with which every x86 CPU's kernels compute what the simulation does."""
    return replace(lq.TARGETS[target], weight=lq.TARGETS["x86_avx2"].weight)


@functools.cache
def _calibrated(network: type[nn.Module], target: str) -> nn.Module:
    torch.manual_seed(0)
    return calibrated(randomize_batch_norm(network()), X, X * 1.2, target=target)


def calibrated_network(network: type[nn.Module] = Residual, target: str = TARGET) -> nn.Module:
    return copy.deepcopy(_calibrated(network, target))


def quantizes(int8: lq.Int8Module) -> int:
    return sum(node.target is QUANTIZE_BUFFER for node in int8.graph.nodes)


@pytest.mark.parametrize("network", [Residual, SharedResidual])
@pytest.mark.parametrize("target", list(lq.TARGETS))
@pytest.mark.parametrize("prepared_for", ["x86_avx2", "onnxruntime", "tensorrt"])
def test_any_target_from_any_prepared_model(prepared_for: str, target: str, network: type[nn.Module]) -> None:
    model = calibrated_network(network, prepared_for)
    int8 = lq.convert(model, exact(target))
    assert int8.report is not None
    assert int8.report.target == target
    assert quantizes(int8) == quantizes(lq.convert(calibrated_network(network, target)))
    # The kernels know unsigned integers alone: signed ones are computed with 128 added.
    assert not int8.kernels().float_ops
    actual = int8(X)
    int8.execution = "simulation"
    assert (actual - int8(X)).square().mean() < 0.03**2 * int8(X).square().mean()
    assert (int8(X) - network_output(model)).square().mean() < 0.2**2 * network_output(model).square().mean()


def network_output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return lq.unprepare(copy.deepcopy(model))(X)


def test_scales_are_shared_where_the_grid_is() -> None:
    model = calibrated_network()
    mine, other = lq.convert(model).state_dict(), lq.convert(model, exact("onnxruntime")).state_dict()
    assert mine.keys() < other.keys()
    assert all(torch.equal(value, other[key]) for key, value in mine.items())
    assert {key for key in other.keys() - mine.keys() if key.endswith(".scale")} == {"down.1.scale"}


def test_symmetric_scales_come_from_the_same_statistics() -> None:
    model = lq.recalibrate(calibrated_network(), "minmax")
    state = lq.convert(model, "tensorrt").state_dict()
    for name, quantizer in lq.quantizers(model).items():
        if f"{name}.scale" in state:
            low, high = quantizer.observer.range()
            # The narrower side of [-128, 127] decides: Krishnamoorthi 2018, section 2.3.
            assert state[f"{name}.scale"] == pytest.approx(float(max(-low, high)) / 127)
            assert state[f"{name}.zero_point"] == 0


def test_a_trained_model_goes_to_every_target() -> None:
    model = lq.prepare(Residual(), X, mode="qat", target="x86_avx2").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.arange(8)).backward()
        optimizer.step()
    model.eval()
    for target in lq.TARGETS:
        int8 = lq.convert(model, exact(target))
        int8.execution = "simulation"
        assert (int8(X) - model(X)).square().mean() < 0.2**2 * model(X).square().mean()


def test_watching_changes_nothing() -> None:
    model = calibrated_network()
    watched = [quantizer for quantizer in lq.quantizers(model).values() if not quantizer.rounds]
    assert len(watched) == 2
    expected = model(X)
    for quantizer in watched:
        quantizer.set_range(torch.tensor(0.0), torch.tensor(1e-3))
    assert torch.equal(model(X), expected)
    assert "watched for other targets" in repr(watched[0])


def test_ranges_without_statistics_are_not_made_up() -> None:
    model = calibrated_network()
    for quantizer in lq.quantizers(model).values():
        quantizer.observer.reset()
    lq.convert(model)
    with pytest.raises(ValueError, match="target='tensorrt' needs the range of 'x', whose quantizer holds no statis"):
        lq.convert(model, "tensorrt")
    with pytest.raises(ValueError, match="target='arm' is unknown; choose one of"):
        lq.convert(model, "arm")
