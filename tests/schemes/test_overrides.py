"""Layers that differ from the rest of the model, or stay in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lq
from helpers.quantized import calibrated, noise
from lq import LayerSpec
from lq.schemes.overrides import Overrides, Scheme
from lq.schemes.targets import TARGETS
from lq.workflow.prepare import prepared_forward
from lq.workflow.saved_preparation import describe_preparation, prepare_like


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10).eval()


def prepared(overrides: Any, target: str = "x86_avx2", **kwargs: Any) -> nn.Module:
    x = noise(4, 32)
    return calibrated(resnet(), x, example=x[:2], target=target, overrides=overrides, **kwargs)


def float_layers(model: nn.Module) -> set[str]:
    return {layer.name for layer in lq.report(model).float_layers}


def test_none_keeps_a_module_in_float() -> None:
    model = prepared({"layer4": None, "fc": None})
    reasons = {layer.name: layer.reason for layer in lq.report(model).float_layers}
    assert {"layer4.0.conv1", "layer4.1.conv2", "layer4.0.downsample.0", "fc"} <= reasons.keys()
    assert reasons["fc"] == "overrides keep it in float"
    assert not any(name.startswith(("layer4", "fc")) for name in lq.quantizers(model) if name.endswith("weight"))
    int8 = lq.convert(model)
    assert isinstance(int8.get_submodule("layer4.0.conv1"), nn.Module)
    with torch.no_grad():
        expected = model(noise(4, 32))
    assert (int8(noise(4, 32)).argmax(1) == expected.argmax(1)).all()


def test_a_name_inside_a_module_in_float_can_come_back() -> None:
    model = prepared({"layer4": None, "layer4.0.conv1": LayerSpec()})
    assert {"layer4.0.conv2", "layer4.1.conv1"} <= float_layers(model)
    assert "layer4.0.conv1" not in float_layers(model)


@pytest.mark.parametrize("residual", ["x86_avx2", "onnxruntime"])
def test_bits_and_calibrators_of_a_module(residual: str) -> None:
    overrides = {
        "layer1": {"weight_bits": 4, "activation_bits": 6},
        "layer1.0.conv2": LayerSpec(weight_bits=5),
        "layer2.*.conv1": LayerSpec(weight_bits=3),
        "conv1": LayerSpec(calibrator="percentile:99"),
    }
    model = prepared(overrides, target=residual)
    lq.recalibrate(model, "minmax")
    found = lq.quantizers(model)
    most = {
        name: found[f"{name}.weight"].spec.quant_max for name in ("layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1")
    }
    assert most == {"layer1.0.conv1": 7, "layer1.0.conv2": 15, "layer1.1.conv1": 7}
    assert found["layer2.1.conv1.weight"].spec.quant_max == 3
    assert found["layer2.1.conv2.weight"].spec.quant_max > 60
    assert found["layer1.0.relu"].spec.quant_max == 63
    assert found["layer2.0.relu"].spec.quant_max == 255
    # `conv1` makes, with batch norm and ReLU behind it, what max-pooling reads.
    assert str(found["relu"].calibrator) == "percentile:99"
    assert str(found["layer2.0.relu"].calibrator) == "minmax"
    state = lq.convert(model).state_dict()
    assert state["layer1.0.conv1.weight"].abs().max() == 7
    assert state["layer2.1.conv1.weight"].abs().max() == 3


def test_auto_leaves_calibrators_of_their_own() -> None:
    model = lq.prepare(resnet(), noise(2, 32), overrides={"layer3": {"calibrator": "percentile:99"}})
    lq.calibrate(model, [noise(4, 32), noise(4, 32), noise(4, 32)], calibrator="auto")
    calibrators = {name: str(q.calibrator) for name, q in lq.quantizers(model).items() if not name.endswith("weight")}
    assert {c for name, c in calibrators.items() if name.startswith("layer3")} == {"percentile:99"}
    assert {c for name, c in calibrators.items() if not name.startswith("layer3")} != {"percentile:99"}
    lq.recalibrate(model, "mse", layers=["layer3"])  # asked for by name
    assert str(lq.quantizers(model)["layer3.0.relu"].calibrator) == "mse"


@pytest.mark.parametrize("target", TARGETS)
def test_fewer_bits_than_the_target_has_and_never_more(target: str) -> None:
    scheme = Scheme(TARGETS[target], Overrides.of({"a": LayerSpec(8, 8), "b": LayerSpec(2, 2)}))
    own = TARGETS[target]
    assert (scheme.weight("a"), scheme.activation("a")) == (own.weight, own.activation)
    assert (scheme.weight("c"), scheme.activation("c")) == (own.weight, own.activation)
    assert scheme.weight("b").quant_max == 1
    activation = scheme.activation("b")
    assert activation.quant_max - activation.quant_min == 3
    assert (activation.dtype, activation.symmetric) == (own.activation.dtype, own.activation.symmetric)


@pytest.mark.parametrize(
    ("patterns", "name", "winner"),
    [
        (["layer4", "layer4.0.conv1"], "layer4.0.conv1", "layer4.0.conv1"),
        (["layer4", "layer4.0.conv1"], "layer4.0.conv2", "layer4"),
        (["*", "layer4"], "layer4.0.conv2", "layer4"),
        (["layer*", "layer4"], "layer4.0", "layer4"),
        (["layer*", "*"], "layer4.0", "layer*"),
        (["*.*.conv1", "layer4"], "layer4.1.conv1", "*.*.conv1"),
        (["*.1.conv1", "layer4.*.*"], "layer4.1.conv1", "*.1.conv1"),
        (["layer"], "layer4", None),
        (["layer4.0"], "layer4.01", None),
        (["fc.weight"], "fc", None),
    ],
)
@pytest.mark.parametrize("turn", [1, -1])
def test_the_most_specific_name_decides(patterns: list[str], name: str, winner: str | None, turn: int) -> None:
    specs = {pattern: LayerSpec(weight_bits=2 + index) for index, pattern in enumerate(patterns)}
    overrides = Overrides.of(dict(list(specs.items())[::turn]))
    assert overrides.find(name) == (LayerSpec() if winner is None else specs[winner])


NAMES = st.lists(st.sampled_from(["a", "b", "c*", "*", "?", "ab"]), min_size=1, max_size=4).map(".".join)
PATHS = st.lists(st.sampled_from(["a", "b", "c", "cd", "ab"]), min_size=1, max_size=4).map(".".join)


@given(st.lists(NAMES, min_size=1, max_size=5, unique=True), PATHS, st.randoms())
def test_order_does_not_matter_and_modules_pass_on(patterns: list[str], path: str, random: Any) -> None:
    specs = {pattern: LayerSpec(weight_bits=2 + index) for index, pattern in enumerate(patterns)}
    shuffled = list(specs.items())
    random.shuffle(shuffled)
    overrides = Overrides.of(specs)
    assert Overrides.of(dict(shuffled)).find(path) == overrides.find(path)
    if overrides.find(path) != LayerSpec():
        assert overrides.find(f"{path}.x") != LayerSpec()


def test_what_matches_nothing_is_an_error_with_near_names() -> None:
    with pytest.raises(ValueError, match=r"'layer4.0.conv3' matches nothing in the model; similar are .*conv1'"):
        lq.prepare(resnet(), noise(2, 32), overrides={"layer4.0.conv3": None})
    with pytest.raises(ValueError, match=r"overrides: 'block\*' matches nothing"):
        lq.prepare(resnet(), noise(2, 32), overrides={"block*": None})


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            {"fc": {"bits": 4}},
            ValueError,
            r"'fc' has an unknown key 'bits'; choose from 'weight_bits'",
        ),
        ({"fc": 4}, TypeError, r"'fc' has 4; give a LayerSpec, a mapping of its arguments, or None for float"),
        ({"fc": {"weight_bits": 9}}, ValueError, r"weight_bits=9 must be a whole number from 2 to 8"),
        ({"fc": {"calibrator": "minmx"}}, ValueError, r"did you mean 'minmax'"),
    ],
)
def test_bad_specs(overrides: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lq.prepare(resnet(), noise(2, 32), overrides=overrides)
    with pytest.raises(error, match=message):
        lq.QuantizationCallback(overrides=overrides)


def test_a_calibrator_that_the_statistics_do_not_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="histogram"):
        lq.prepare(resnet(), noise(2, 32), observer="minmax", overrides={"fc": {}, "layer1": {"calibrator": "mse"}})


def test_everything_in_float_is_nothing_to_quantize() -> None:
    with pytest.raises(lq.NothingToQuantizeError, match="overrides keep it in float"):
        lq.prepare(resnet(), noise(2, 32), overrides={"*": None})


def test_export_and_other_targets_keep_them(tmp_path: Path) -> None:
    model = prepared({"layer4": None, "layer1": {"weight_bits": 4}})
    for target in ("onnxruntime", "tensorrt"):
        state = lq.convert(model, target).state_dict()
        assert state["layer1.0.conv1.weight"].abs().max() == 7
        assert state["layer4.0.conv1.weight"].dtype == torch.float32
    lq.export(model, tmp_path / "int8.pt2")
    assert torch.equal(lq.load(tmp_path / "int8.pt2")(noise(4, 32)), lq.convert(model)(noise(4, 32)))


def test_a_preparation_tells_of_them() -> None:
    model = prepared({"layer4": None, "layer1": {"weight_bits": 4}, "fc": LayerSpec(calibrator="mse")})
    like = prepare_like(resnet(), describe_preparation(prepared_forward(model)))
    assert prepared_forward(like).overrides == prepared_forward(model).overrides
    assert lq.quantizers(like).keys() == lq.quantizers(model).keys()
    assert like.load_state_dict(model.state_dict())


def test_training_with_overrides() -> None:
    model = lq.prepare(
        resnet(), noise(2, 32), mode="qat", overrides={"layer4": None, "layer1": {"weight_bits": 3}}
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        loss = model(noise(4, 32)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert lq.convert(model).state_dict()["layer1.1.conv2.weight"].unique().numel() <= 7
