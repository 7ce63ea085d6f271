"""Prepare: the same model, with quantizers on it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import lq
from helpers.networks import (
    DataDependent,
    Residual,
    TrainingDependent,
    WithDataDependent,
    eager_style_resnet18,
    networks,
    randomize_batch_norm,
    sequential,
)
from helpers.quantized import noise
from lq import QuantizerState
from lq.numerics.quantizer import WeightQuantizer

# torch's remark on even kernels with padding="same", which one of the networks has.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

X = noise(4, seed=1)


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("training", [False, True])
def test_quantizers_that_are_off_change_nothing(name: str, training: bool) -> None:
    model = randomize_batch_norm(networks()[name]).train(training)
    prepared = lq.prepare(copy.deepcopy(model), X)
    assert type(prepared) is type(model)
    assert prepared.training == training
    assert [n for n, _ in prepared.named_parameters()] == [n for n, _ in model.named_parameters()]
    torch.manual_seed(0)
    expected = model(X)
    torch.manual_seed(0)
    assert torch.equal(prepared(X), expected)
    # ... batch norm statistics included; the state dict is the float one and more.
    state = prepared.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(key.startswith("lq_quantizers.") for key in state.keys() - model.state_dict().keys())


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_torchvision_networks_train_as_before(name: str) -> None:
    # In-place ReLUs that are reused and `out += identity`; auxiliary heads and dropout.
    settings = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=10, **settings)
    reference = copy.deepcopy(model)
    x = torch.randn(2, 3, 64, 64)
    lq.prepare(model, x)
    for training in (True, False):
        outputs = []
        for m in (model.train(training), reference.train(training)):
            torch.manual_seed(0)
            outputs.append(m(x))
        assert type(outputs[0]) is type(outputs[1])
        for actual, expected in zip(outputs[0], outputs[1], strict=True):
            assert torch.equal(actual, expected)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in reference.state_dict().items())


@pytest.mark.parametrize("add_relu", [False, True])
def test_resnet18_unmodified_and_in_eager_style(add_relu: bool) -> None:
    ours = torchvision.models.resnet18(num_classes=10).eval()
    eager = eager_style_resnet18(add_relu).eval()
    eager.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 32, 32)
    converted = []
    for model in (ours, eager):
        lq.calibrate(lq.prepare(model, x, target="x86_avx2"), [x])
        converted.append(lq.convert(model))
    report = converted[0].report
    assert len(report.int8_layers) == 21
    assert [layer.name for layer in report.float_layers] == ["avgpool"]
    assert [layer.name for layer in converted[1].report.int8_layers] == [layer.name for layer in report.int8_layers]
    for model in (ours, eager):
        found = lq.quantizers(model).values()
        assert sum(quantizer.rounds for quantizer in found) == 22 + 21
        assert len(found) == 22 + 21 + 8 + 1  # the convolutions in front of the eight sums are watched, and the result
    assert torch.equal(converted[0](x), converted[1](x))


def test_names_and_places_of_quantizers() -> None:
    quantizers = lq.quantizers(lq.prepare(Residual(), X))
    weights = {f"{layer}.weight" for layer in ("stem", "conv1", "conv2", "down.0", "fc")}
    # Not: what the max-pool and flatten pass on, the sum's own convolution, the classifier's output.
    activations = {"x", "relu", "relu_1", "bn2", "relu_2", "avgpool"}
    assert {name for name, quantizer in quantizers.items() if quantizer.rounds} == weights | activations
    # The sum's own convolution and the classifier's output, which other targets quantize, are watched.
    assert quantizers.keys() - weights - activations == {"down.1", "fc"}
    # They do quantize them, and everything else as well.
    everywhere = lq.quantizers(lq.prepare(Residual(), X, target="xnnpack"))
    assert everywhere.keys() == quantizers.keys()
    assert all(quantizer.rounds for quantizer in everywhere.values())


def test_copies_are_independent() -> None:
    model = lq.calibrate(lq.prepare(Residual().eval(), X), [X])
    twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = model(X)
    assert torch.equal(twin(X), expected)
    assert torch.equal(pickled(X), expected)
    with torch.no_grad():
        model.stem.weight.zero_()
        model.lq_quantizers["x"].scale.mul_(2)
    assert torch.equal(twin(X), expected)
    assert torch.equal(pickled(X), expected)


def test_state_dicts_float_into_prepared_and_prepared_into_prepared() -> None:
    source = randomize_batch_norm(Residual()).eval()
    model = lq.prepare(Residual().eval(), X)
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert unexpected == []
    assert all(key.startswith("lq_quantizers.") for key in missing)
    assert torch.equal(model(X), source(X))
    lq.calibrate(model, [X])
    other = lq.prepare(Residual().eval(), X)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


def test_unprepare_gives_the_float_model_back() -> None:
    model = Residual().eval()
    expected = model(X)
    attributes = set(model.__dict__), set(model.stem.__dict__), model.state_dict().keys()
    lq.unprepare(lq.calibrate(lq.prepare(model, X), [X]))
    assert torch.equal(model(X), expected)
    assert (set(model.__dict__), set(model.stem.__dict__), model.state_dict().keys()) == attributes
    lq.prepare(model, X)  # and again


def test_code_that_asks_for_training_mode() -> None:
    model = TrainingDependent()
    lq.prepare(model, X)
    assert isinstance(model.eval()(X), Tensor)
    logits, aux = model.train()(X)
    assert logits.shape == aux.shape
    dropped = torch.stack([model(X)[0] for _ in range(3)])
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(model.eval()(X), model(X))
    reasons = {layer.name: layer.reason for layer in lq.report(model).float_layers}
    assert reasons["aux"] == "the forward does not reach it"


def test_a_part_in_evaluation_mode_stays_in_it() -> None:
    model = nn.Sequential(TrainingDependentPart(), nn.Conv2d(8, 8, 1))
    reference = copy.deepcopy(model)
    lq.prepare(model, X)
    for m in (model, reference):
        m.train()
        m[0].eval()
    assert torch.equal(model(X), reference(X))


class TrainingDependentPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.conv(x), 0.5, training=self.training)


def test_stochastic_depth_of_torchvision() -> None:
    model = torchvision.models.efficientnet_b0(num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    lq.prepare(model, x)
    assert torch.equal(model(x), expected)
    model.train()
    torch.manual_seed(0)
    one = model(x)
    torch.manual_seed(1)
    assert not torch.equal(one, model(x))


def test_what_cannot_be_traced_stays_float_and_is_named() -> None:
    model = WithDataDependent().eval()
    expected = model(X), model(-X)
    lq.prepare(model, X)
    assert torch.equal(model(X), expected[0])
    assert torch.equal(model(-X), expected[1])
    (leaf,) = [layer for layer in lq.report(model).float_layers if layer.name == "odd"]
    assert "control flow" in leaf.reason
    int8 = lq.convert(lq.calibrate(model, [X]))
    assert {layer.name for layer in int8.report.int8_layers} == {"conv", "fc"}
    torch.testing.assert_close(int8(X), model(X), atol=0.05, rtol=0.05)
    with pytest.raises(lq.CaptureError, match="DataDependent cannot be captured.*submodule of its own"):
        lq.prepare(DataDependent(), X)


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(5, 2)

    def forward(self, batch: dict[str, Tensor], extra: Tensor | None = None, *, double: bool = False) -> dict[str, Any]:
        x = self.conv(batch["image"]).mean((2, 3))
        if extra is not None:
            x = x + extra
        if double:
            x = x * 2
        return {"logits": self.fc(torch.cat([x, batch["index"].float()[:, None]], 1)), "features": x}


def test_dicts_keywords_integers_and_settings() -> None:
    model = Inputs().eval()
    batch = {"image": X, "index": torch.arange(4)}
    expected = [model(batch), model(batch, double=True), model(batch, extra=torch.ones(4, 4))]
    lq.prepare(model, (batch,))
    got = [model(batch), model(batch, double=True), model(batch=batch, extra=torch.ones(4, 4))]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a["logits"], b["logits"])
        assert torch.equal(a["features"], b["features"])
    lq.calibrate(model, [(batch,)])
    int8 = lq.convert(model)
    torch.testing.assert_close(int8(batch)["logits"], model(batch)["logits"], atol=0.02, rtol=0.02)
    assert int8(batch, double=False).keys() == {"logits", "features"}
    with pytest.raises(TypeError, match=r"converted for the inputs batch with .*double=False.*double=True"):
        int8(batch, double=True)


def test_shared_layer_with_two_batch_norms_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.conv(torch.relu(self.a(self.conv(x)))))

    model = randomize_batch_norm(Shared()).eval()
    lq.calibrate(lq.prepare(model, X, target="x86_avx2"), [X])
    int8 = lq.convert(model)
    assert {layer.name for layer in int8.report.float_layers} >= {"a", "b"}
    torch.testing.assert_close(int8(X), model(X), atol=1e-3, rtol=1e-3)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"target='arm' is unknown; choose one of 'auto', 'x86', 'x86_avx2'"):
        lq.prepare(Residual(), X, target="arm")
    with pytest.raises(ValueError, match="mode='int8' is unknown; choose 'ptq' or 'qat'"):
        lq.prepare(Residual(), X, mode="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="observer='median' is unknown; choose one of 'minmax', 'moving_average'"):
        lq.prepare(Residual(), X, observer="median")
    with pytest.raises(lq.NothingToQuantizeError, match="nothing to quantize in ReLU"):
        lq.prepare(nn.ReLU(), X)
    with pytest.raises(ValueError, match="prepared already; call lq.unprepare"):
        lq.prepare(lq.prepare(Residual(), X), X)
    with pytest.raises(ValueError, match="not prepared; call lq.prepare"):
        lq.calibrate(Residual(), [X])


def test_qat_trains_and_keeps_ranges_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    model = lq.prepare(sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()), X, mode="qat").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(X).float(), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for quantizer in lq.quantizers(model).values():
        assert quantizer.calibrated or not quantizer.rounds
        assert quantizer.scale.dtype == torch.float32
        assert quantizer.state == QuantizerState.OBSERVE | QuantizerState.FAKE_QUANTIZE
    lq.freeze(model)
    frozen = {n: q.scale.clone() for n, q in lq.quantizers(model).items() if not isinstance(q, WeightQuantizer)}
    model(X * 10)
    assert all(torch.equal(lq.quantizers(model)[n].scale, scale) for n, scale in frozen.items())
