"""Sensitivity against models that are truly prepared with layers left in float, and layers that were broken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.analysis_references import sqnr
from helpers.networks import networks, randomize_batch_norm
from helpers.quantized import noise
from lq.analysis.analyze import noisiest_layers
from lq.numerics.quantizer import QuantizerState


class Shared(nn.Module):
    """One convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.conv(F.relu(self.conv(x))))
        return self.fc(x.mean((2, 3)))


class Written(nn.Module):
    """Convolutions written as functions, in place operators, and an operator in float between them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2), nn.Parameter(torch.randn(8))
        self.second = nn.Parameter(torch.randn(8, 8, 1, 1) * 0.3)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x.sub_(0.1), self.weight, self.bias, stride=2)
        x = torch.sigmoid(x).mul_(2)
        y = F.conv2d(x, self.second)
        y += x
        return self.fc(y.relu_().mean((2, 3)))


class TwoInputs(nn.Module):
    """Two inputs by name, and a dict of outputs, one of them whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3), nn.Linear(8, 10)

    def forward(self, image: Tensor, depth: Tensor, scale: float = 1.0) -> dict[str, Any]:
        features = F.relu(self.a(image) * scale + self.b(depth)).mean((2, 3))
        logits = self.fc(features)
        return {"logits": logits, "aux": [features], "classes": logits.argmax(1)}


MODELS = {**networks(), "shared": Shared(), "written": Written()}


#: On ONNX Runtime residual sums, gates and products are operators of their own; otherwise it is like x86.
OPERATORS_OF_THEIR_OWN = ("residual", "gate", "silu", "shared_residual", "written")
CASES = [(name, "x86") for name in MODELS]
CASES += [
    (name, "onnxruntime")
    if name in OPERATORS_OF_THEIR_OWN
    else pytest.param(name, "onnxruntime", marks=pytest.mark.thorough)
    for name in MODELS
]


def prepared(model: nn.Module, target: str, overrides: Any = None) -> nn.Module:
    model = lq.prepare(copy.deepcopy(model).eval(), noise(2), target=target, observer="minmax", overrides=overrides)
    return lq.calibrate(model, [noise(4)])


def outputs(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(noise(4)).double().numpy()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("name", "target"), CASES)
def test_as_a_model_that_is_prepared_with_overrides(name: str, target: str) -> None:
    torch.manual_seed(0)
    float_model = randomize_batch_norm(copy.deepcopy(MODELS[name])).eval()
    expected = outputs(float_model)
    model = prepared(float_model, target)
    analysis = lq.analyze(model, [noise(4)], timing=False, progress=False)
    report = lq.report(model)
    rows = [(row.name, row.kind, row.precision, row.reason) for row in report.layers]
    assert [(row.name, row.kind, row.precision, row.reason) for row in analysis.layers] == rows
    assert analysis.output_sqnr_db == pytest.approx(sqnr(expected, outputs(model)), abs=1e-3)
    names = list(dict.fromkeys(row.name for row in report.int8_layers))
    for row in analysis.layers:
        if row.precision == "float":
            assert row.only_sqnr_db is row.all_but_sqnr_db is row.input_sqnr_db is row.weight_sqnr_db is None
            continue
        if len(names) > 1:
            all_but = prepared(float_model, target, {row.name: None})
            assert row.all_but_sqnr_db == pytest.approx(sqnr(expected, outputs(all_but)), abs=1e-3)
        if row.weight_sqnr_db is not None:  # an operator is in INT8 between convolutions that are: it is never alone
            only = prepared(float_model, target, {other: None for other in names if other != row.name})
            assert row.only_sqnr_db == pytest.approx(sqnr(expected, outputs(only)), abs=1e-3)


def test_a_sum_that_is_a_kernel_of_its_own() -> None:
    torch.manual_seed(0)
    model = prepared(networks()["residual"], "onnxruntime")
    analysis = lq.analyze(model, [noise(4)], timing=False, progress=False)
    (total,) = (row for row in analysis.layers if row.kind == "add + relu")
    assert (total.precision, total.parameters, total.weight_sqnr_db) == ("int8", 0, None)
    tensors: dict[str, Tensor] = {}
    float_model = lq.unprepare(copy.deepcopy(model))
    for path in ("bn2", "down.1"):
        # Copies, for the sum is written over one of them.
        float_model.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: tensors.update({path: out.double().clone()})
        )
    with torch.no_grad():
        float_model(noise(4))
    found = lq.quantizers(model)
    worst = []
    for path, x in tensors.items():
        scale, zero_point = found[path].scale.double(), found[path].zero_point.double()
        rounded = (torch.clamp(torch.round(x / scale) + zero_point, 0, 255) - zero_point) * scale
        worst.append(sqnr(x.numpy(), rounded.numpy()))
    assert total.input_sqnr_db == pytest.approx(min(worst), abs=0.01)
    assert total.only_sqnr_db is not None and analysis.output_sqnr_db < total.only_sqnr_db < 60


def test_several_inputs_and_a_dict_of_outputs() -> None:
    def batch(samples: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(samples, 3, 12, 12, generator=generator)
        depth = torch.rand(samples, 1, 12, 12, generator=generator)
        return {"image": image, "depth": depth, "label": torch.zeros(samples)}

    torch.manual_seed(0)
    float_model = TwoInputs().eval()
    example = {name: value for name, value in batch(2, 0).items() if name != "label"}
    batches = [batch(5, seed) for seed in range(3)]

    def ready(overrides: Any = None) -> nn.Module:
        model = lq.prepare(copy.deepcopy(float_model), example, observer="minmax", overrides=overrides)
        return lq.calibrate(model, batches)

    model = ready()
    analysis = lq.analyze(model, batches, num_samples=12, timing=False, progress=False)
    assert analysis.samples == 12
    joined = {name: torch.cat([b[name] for b in batches])[:12] for name in example}

    def leaves(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found = model(**joined)
        return torch.cat([found["logits"], *found["aux"]], 1).double().numpy()

    expected = leaves(float_model)
    assert analysis.output_sqnr_db == pytest.approx(sqnr(expected, leaves(model)), abs=1e-3)
    for row in analysis.layers:
        if row.precision == "int8":
            all_but = sqnr(expected, leaves(ready({row.name: None})))
            assert row.all_but_sqnr_db == pytest.approx(all_but, abs=1e-3)

    # The same by way of a function of the user's own, from batches of any form.
    tuples = [("ignored", b["depth"], b["image"]) for b in batches]
    again = lq.analyze(
        model, tuples, num_samples=12, timing=False, progress=False, forward=lambda b: model(b[2], depth=b[1])["aux"]
    )
    assert again == analysis


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norm(torchvision.models.resnet18(num_classes=10)).eval()


def ready_resnet18(target: str = "x86") -> nn.Module:
    x = noise(4, 32)
    return lq.calibrate(lq.prepare(resnet18(), x[:2], target=target, observer="minmax"), [x])


def analyzed(model: nn.Module, **kwargs: Any) -> lq.Analysis:
    return lq.analyze(model, [noise(2, 32)], progress=False, **{"timing": False, **kwargs})


def test_the_noisiest_layers_alone() -> None:
    model = ready_resnet18()
    by_harm = [row.name for row in analyzed(model).by_harm() if row.in_int8]
    assert noisiest_layers(model, [noise(2, 32)], num_samples=2) == by_harm
    hurried = noisiest_layers(model, [noise(2, 32)], num_samples=2, seconds=1e-9)
    assert sorted(hurried) == sorted(by_harm)


@pytest.mark.parametrize("layer", ["layer1.0.conv2", "layer4.1.conv2"])
@pytest.mark.parametrize("broken", ["input", "weight"])
def test_a_broken_layer_is_found(layer: str, broken: str) -> None:
    model = ready_resnet18()
    found = lq.quantizers(model)
    quantizer = found[f"{layer}.weight"] if broken == "weight" else found[layer.replace("conv2", "relu")]
    if broken == "weight":
        model(noise(2, 32))
        quantizer.state = QuantizerState.FAKE_QUANTIZE  # or it would take its range from the weight again
    low, high = quantizer.quantized_range()
    quantizer.set_range(low / 10, high / 10)
    analysis = analyzed(model)
    worst = analysis.by_harm()[0]
    assert worst.name == layer
    advice = analysis.advice()
    assert advice[0].layer == layer
    assert advice[0].gain_db > 3
    assert all(a.gain_db >= 1 for a in advice)
    weight: Any = model.get_submodule(layer).weight
    assert advice[0].extra_bytes == 3 * weight.numel()
    assert advice[0].extra_ms is None
    if broken == "input":
        assert worst.clipped is not None and worst.clipped > 0.1
        assert worst.range is not None and worst.observed is not None
        assert worst.range[1] < worst.observed[1] / 5
        assert worst.input_sqnr_db is not None and worst.input_sqnr_db < 10
    else:
        assert worst.weight_sqnr_db is not None and worst.weight_sqnr_db < 10
    # As the advice says: prepared anew without the layer, the outputs gain as much.
    assert worst.all_but_sqnr_db == pytest.approx(analysis.output_sqnr_db + advice[0].gain_db)
    assert len(analysis.advice(limit=1)) == 1
    assert f"{layer}: +{advice[0].gain_db:.1f} dB" in " ".join(str(analysis).split())


def row(name: str, **figures: Any) -> lq.LayerAnalysis:
    return lq.LayerAnalysis(name, "conv", "int8", **{"weights": 100, **figures})


def test_advice_of_layers_that_are_called_twice_and_of_slow_ones() -> None:
    rows = (
        row("a", all_but_sqnr_db=30.0, float_ms=2.0, int8_ms=0.5),
        row("b", all_but_sqnr_db=25.0, float_ms=1.0, int8_ms=3.0),
        row("a", all_but_sqnr_db=30.0, float_ms=1.0, int8_ms=0.5),
        row("c", all_but_sqnr_db=20.9, float_ms=1.0, int8_ms=0.5),
        row("d", all_but_sqnr_db=None),
        lq.LayerAnalysis("e", "SiLU", "float"),
    )
    advice = lq.Analysis("Network", "x86", 8, 20.0, rows).advice()
    assert advice == (lq.Advice("a", 10.0, 300, 2.0), lq.Advice("b", 5.0, 300, 0.0))
    assert lq.Analysis("Network", "x86", 8, 20.0, rows).advice(limit=0) == ()
    with pytest.raises(ValueError, match="limit=-1 must be at least 0"):
        lq.Analysis("Network", "x86", 8, 20.0, rows).advice(limit=-1)


def test_overrides_that_are_there_already() -> None:
    x = noise(2, 32)
    overrides: Any = {"layer4": None, "layer1": {"weight_bits": 4, "activation_bits": 6}, "layer1.0.conv2": {}}

    def ready(more: Any = None) -> nn.Module:
        found = {**overrides, **(more or {})}
        return lq.calibrate(lq.prepare(resnet18(), x[:2], observer="minmax", overrides=found), [x])

    model = ready()
    analysis = analyzed(model)
    with torch.no_grad():
        expected = resnet18()(x[:2]).double().numpy()
        for layer in analysis.layers:
            if layer.name in ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.downsample.0"):
                all_but = ready({layer.name: None})(x[:2]).double().numpy()
                assert layer.all_but_sqnr_db == pytest.approx(sqnr(expected, all_but), abs=1e-3)
            if layer.name.startswith("layer4.0.conv"):
                assert (layer.precision, layer.reason) == ("float", "overrides keep it in float")
                assert layer.all_but_sqnr_db is None
                assert layer.output_sqnr_db is not None
                assert layer.parameters > 1e6
    assert analysis.by_harm()[0].name.startswith("layer1")  # four bits
