"""``lq.quantize``: an INT8 network that loses no more than it may, with no more layers in float than that takes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lq
from helpers.broken_layers import BATCHES, TEST, break_layers, explained, network
from lq.tuning import judged
from lq.tuning.fewest import fewest

BROKEN = ("layer2.conv2", "layer5.conv2", "layer6.conv2")


def broken_network() -> nn.Sequential:
    return break_layers(network(), ["layer2", "layer5", "layer6"])


def test_exactly_the_broken_layers_stay_in_float_with_fewer_evaluations_than_layers() -> None:
    model = broken_network()
    state = copy.deepcopy(model.state_dict())
    metric = explained(model)
    calls: list[nn.Module] = []

    def evaluate(network: nn.Module) -> float:
        assert not network.training and not torch.is_grad_enabled()
        calls.append(network)
        return metric(network)

    quantized = lq.quantize(model, BATCHES, evaluate, max_drop=8)
    tuning = quantized.tuning
    assert sorted(tuning.float_layers) == sorted(BROKEN)
    assert tuning.met and tuning.shortfall == 0
    assert len(calls) == tuning.evaluations < len(lq.report(quantized.model).layers)
    assert calls[0] is model and tuning.float_metric == pytest.approx(100)
    # What is returned is what was measured, and the float model is as it was.
    assert metric(quantized.int8) == tuning.step.metric == 100 - tuning.step.drop
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
    reasons = {layer.name: layer.reason for layer in quantized.int8.report.layers if layer.precision == "float"}
    assert {name: reasons[name] for name in BROKEN} == dict.fromkeys(BROKEN, "overrides keep it in float")


def test_the_model_beside_it_is_what_the_network_was_made_of() -> None:
    quantized = lq.quantize(broken_network(), BATCHES, explained(broken_network()), max_drop=8)
    assert quantized.tuning.float_layers
    again = lq.convert(quantized.model)
    for int8 in (again, quantized.int8):
        int8.execution = "simulation"
    assert torch.equal(again(TEST), quantized.int8(TEST))
    with torch.no_grad():
        assert torch.allclose(quantized.model(TEST), again(TEST), atol=0.02 * float(again(TEST).abs().max()))
    # As if it had been prepared so in the first place.
    overrides = dict.fromkeys(quantized.tuning.float_layers)
    anew = lq.prepare(broken_network(), BATCHES[0][:2], overrides=overrides)
    lq.calibrate(anew, [BATCHES[0], *BATCHES[2:]], calibrator=quantized.tuning.step.calibrator)  # one is held out
    assert torch.equal(anew(TEST), quantized.model(TEST))


def test_nothing_more_is_tried_once_it_is_met() -> None:
    model = network()
    quantized = lq.quantize(model, BATCHES, explained(model), max_drop=20)
    assert quantized.tuning.evaluations == 2
    assert quantized.tuning.float_layers == ()
    assert quantized.tuning.ended == "it is met"


def test_the_best_is_taken_where_none_meets_it_and_says_by_how_much_it_falls_short() -> None:
    model = broken_network()
    methods = {"bias_correction": False, "equalization": False}
    quantized = lq.quantize(model, BATCHES, explained(model), max_drop=0, max_evaluations=5, **methods)
    tuning = quantized.tuning
    assert tuning.evaluations == 5 and tuning.ended == "max_evaluations=5 is reached"
    assert not tuning.met and tuning.step.metric == max(step.metric for step in tuning.steps)
    assert tuning.shortfall == tuning.step.drop > 0
    assert f"falls short by {tuning.shortfall:.4g} of the allowed drop of 0 " in tuning.verdict
    assert str(tuning.float_layers[0]) in " ".join(str(quantized).split())


def test_seconds_end_it_after_the_first_int8_network() -> None:
    model = broken_network()
    quantized = lq.quantize(model, BATCHES, explained(model), max_drop=8, seconds=1e-6)
    assert quantized.tuning.evaluations == 2
    assert quantized.tuning.ended == "seconds=1e-06 leave no time for another evaluation"


def test_points_of_a_share_are_hundredths_of_it() -> None:
    model = network()
    share: Callable[[nn.Module], float] = lambda net: explained(model)(net) / 100  # noqa: E731
    percent = lq.quantize(model, BATCHES, explained(model), max_drop=0.5, max_evaluations=4, calibrator="minmax")
    shares = lq.quantize(model, BATCHES, share, max_drop=0.5, max_evaluations=4, calibrator="minmax")
    assert percent.tuning.allowed_drop == 0.5
    assert shares.tuning.allowed_drop == pytest.approx(0.005)
    assert [step.change for step in shares.tuning.steps] == [step.change for step in percent.tuning.steps]
    assert {step.calibrator for step in percent.tuning.steps} == {"minmax"}


def test_batches_of_any_form() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(1)

        def forward(self, image: Tensor) -> Tensor:
            return self.net(image)  # type: ignore[no-any-return]

    model = Named().eval()
    labels = torch.zeros(8)
    first = lq.quantize(model, [(x, labels) for x in BATCHES], explained(model), max_drop=20)
    for batches, forward in (
        ([{"image": x, "label": labels} for x in BATCHES], None),
        ([(labels, x) for x in BATCHES], lambda net, batch: net(batch[1])),
    ):
        example: Any = None if forward is None else BATCHES[0][:2]
        other = lq.quantize(model, batches, explained(model), max_drop=20, forward=forward, example_inputs=example)
        assert torch.equal(other.int8(TEST), first.int8(TEST))


def test_overrides_of_the_users_own_stay() -> None:
    model = broken_network()
    overrides = {"layer2.conv2": {"weight_bits": 6}, "layer0": None}
    quantized = lq.quantize(model, BATCHES, explained(model), max_drop=8, overrides=overrides)
    assert sorted(quantized.tuning.float_layers) == sorted(BROKEN)
    in_float = {layer.name for layer in quantized.int8.report.layers if layer.precision == "float"}
    assert in_float >= {*BROKEN, "layer0.conv1", "layer0.conv2"}


def test_the_tuning_as_json() -> None:
    tuning = lq.quantize(network(2), BATCHES, explained(network(2)), max_drop=0, max_evaluations=5).tuning
    assert lq.Tuning.from_dict(json.loads(json.dumps(tuning.to_dict()))) == tuning


def scaled_network() -> nn.Sequential:
    """Every third channel between the two convolutions of some blocks is a thousand times as large as it was."""
    model = network()
    with torch.no_grad():
        for name in ("layer1", "layer4"):
            block = model.get_submodule(name)
            block.bn1.weight[::3] *= 1000.0  # type: ignore[index, operator, union-attr]
            block.bn1.bias[::3] *= 1000.0  # type: ignore[index, operator, union-attr]
            block.conv2.weight[:, ::3] /= 1000.0  # type: ignore[index, operator, union-attr]
    return model


def test_equalisation_takes_the_place_of_layers_in_float() -> None:
    model = scaled_network()
    metric = explained(model)
    equalized = lq.quantize(model, BATCHES, metric, max_drop=8, target="x86_avx2")
    assert equalized.tuning.met and not equalized.tuning.float_layers
    assert equalized.tuning.step.methods[-1] == "equalization"
    assert metric(lq.convert(equalized.model)) == pytest.approx(equalized.tuning.step.metric, abs=1e-3)
    without = lq.quantize(
        model, BATCHES, metric, max_drop=8, target="x86_avx2", equalization=False, bias_correction=False
    )
    assert sorted(without.tuning.float_layers) == ["layer1.conv2", "layer4.conv2"]
    assert without.tuning.evaluations < len(lq.report(without.model).layers)


def test_methods_that_are_always_on_are_in_every_step_and_in_the_model() -> None:
    model = network(2)
    # Rounding is learned for some seconds, in which one machine learns more than another: the rest is float anyway.
    few_bits = {"layer0": {"weight_bits": 3}, "layer1": {"weight_bits": 3}, "stem": None, "fc": None}
    metric = explained(model)
    quantized = lq.quantize(
        model,
        BATCHES,
        metric,
        max_drop=0,
        bias_correction=True,
        equalization=True,
        learned_rounding=True,
        rounding_seconds=2.0,
        overrides=few_bits,
        max_evaluations=8,
    )
    tuning = quantized.tuning
    assert {step.methods for step in tuning.steps} == {("bias_correction", "equalization", "learned_rounding")}
    assert tuning.float_layers
    assert metric(quantized.int8) == pytest.approx(tuning.step.metric)
    assert metric(lq.convert(quantized.model)) == pytest.approx(tuning.step.metric, abs=1e-3)
    # A layer that stays in float has weights that were not rounded.
    name = next(name for name in tuning.float_layers if name.startswith("layer"))
    assert f"{name}.weight" not in lq.quantizers(quantized.model)
    rows = quantized.model.get_submodule(name).weight.detach().flatten(1)  # type: ignore[operator, union-attr]
    assert max(len(row.unique()) for row in rows) > 7  # 3 bits have 7 values


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.thorough)])
def test_the_engine_that_will_run_judges(runtime: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", runtime):
        pytest.importorskip(package)
    model = break_layers(network(2), ["layer1"])  # each evaluation writes a file, in seconds
    metric = explained(model)
    networks: list[nn.Module] = []

    def evaluate(network: nn.Module) -> float:
        networks.append(network)
        assert not network.training
        return metric(network)

    quantized = lq.quantize(model, BATCHES, evaluate, max_drop=8, runtime=runtime)
    tuning = quantized.tuning
    assert tuning.met and tuning.runtime == runtime and "layer1.conv2" in tuning.float_layers
    assert not any(isinstance(network, lq.Int8Module) for network in networks)
    # The file that the user exports computes what was judged.
    format: Any = "onnxruntime" if runtime == "onnxruntime" else "onnx"
    lq.export(quantized.model, tmp_path / "int8.onnx", format=format)
    engine: Any = lq.load(tmp_path / "int8.onnx", runtime)
    assert metric(engine) == pytest.approx(tuning.step.metric, abs=1e-3)
    assert all(step.latency_ms is not None and step.latency_ms > 0 for step in tuning.steps)
    assert f"as {runtime!r} runs it" in tuning.verdict
    assert f"takes {tuning.step.latency_ms:.3g} ms for one sample, without them" in tuning.verdict


def test_the_fastest_engine_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(0)
    quantized = lq.quantize(model, BATCHES, explained(model), max_drop=20, runtime="auto")
    assert quantized.tuning.runtime in ("torch", "onnxruntime", "openvino")

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such file")

    monkeypatch.setattr(judged, "export", failing)
    assert lq.quantize(model, BATCHES, explained(model), max_drop=20, runtime="auto").tuning.runtime == "torch"


class Scaled(nn.Module):
    """A forward with a setting that has a default, and a batch whose size is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)) * scale)


@pytest.mark.parametrize("runtime", ["torch", "auto"])
def test_a_forward_with_settings_is_judged(runtime: str) -> None:
    torch.manual_seed(0)
    model = Scaled().eval()
    example = {"x": BATCHES[0][:2], "scale": 2.0}
    reference = model(TEST, scale=2.0)

    def evaluate(network: nn.Module) -> float:
        return -float((network(TEST, scale=2.0) - reference).square().mean())

    quantized = lq.quantize(
        model,
        BATCHES,
        evaluate,
        max_drop=1,
        example_inputs=example,
        runtime=runtime,
        forward=lambda model, x: model(x, scale=2.0),
    )
    assert quantized.tuning.met and quantized.tuning.step.latency_ms is not None


def test_mistakes() -> None:
    model = network(1)
    metric = explained(model)
    with pytest.raises(ValueError, match="max_drop=-1 must be a number of points, at least 0"):
        lq.quantize(model, BATCHES, metric, max_drop=-1)
    with pytest.raises(ValueError, match="max_evaluations=1 must be at least 2"):
        lq.quantize(model, BATCHES, metric, max_drop=1, max_evaluations=1)
    with pytest.raises(ValueError, match="runtime='tensorrt' is unknown; choose one of 'auto', 'torch'"):
        lq.quantize(model, BATCHES, metric, max_drop=1, runtime="tensorrt")
    with pytest.raises(ValueError, match="seconds=0 must be above 0"):
        lq.quantize(model, BATCHES, metric, max_drop=1, seconds=0)
    with pytest.raises(lq.CalibrationError, match="batches is empty"):
        lq.quantize(model, [], metric, max_drop=1)
    with pytest.raises(ValueError, match="metric of the float model is nan: it must be finite"):
        lq.quantize(model, BATCHES, lambda network: float("nan"), max_drop=1)
    with pytest.raises(ValueError, match="calibrator='max' is unknown"):
        lq.quantize(model, BATCHES, metric, max_drop=1, calibrator="max")


@pytest.mark.parametrize("needed", [{0}, {3}, {0, 1, 2}, {2, 9}, {0, 5, 6, 40}, set(range(0, 60, 7)), set(range(170))])
def test_the_fewest_of_many(needed: set[int]) -> None:
    ranking = [f"layer{index}" for index in range(170)]
    wanted = {f"layer{index}" for index in needed}
    calls: list[tuple[str, ...]] = []

    def meets(layers: tuple[str, ...]) -> bool:
        calls.append(layers)
        return wanted <= set(layers)

    found = fewest(ranking, meets)
    assert found is not None and wanted <= set(found)
    assert found == tuple(name for name in ranking if name in found) and found[-1] == f"layer{max(needed)}"
    assert len(calls) <= 4 * (max(needed) + 1).bit_length() + 2
    if len(needed) <= 3:
        assert set(found) == wanted
    assert fewest(ranking, lambda layers: False) is None
