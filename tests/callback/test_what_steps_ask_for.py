"""Steps ask a network for more than a forward: INT8 in its place answers, too."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.classifiers import Wrapped, loader, network
from helpers.fits import fit, quantization
from helpers.modes import both_modes
from helpers.notes import Notes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = network()
        self.fc = nn.Linear(4, 4)
        self.loss = nn.CrossEntropyLoss()
        self.num_classes = 4
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x))

    def predict(self, x: Tensor) -> Tensor:
        return self(x).softmax(1)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @staticmethod
    def accuracy(scores: Tensor, y: Tensor) -> Tensor:
        return (scores.argmax(1) == y).float().mean()


class Asking(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()  # type: ignore[assignment]
        self.asked = Notes()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        model: Any = self.model
        scores = model(x.to(model.device, next(model.parameters()).dtype))
        assert scores.shape[1] == model.num_classes == model.fc.out_features
        assert torch.equal(model.predict(x), scores.softmax(1))
        assert model.layers[0].kernel_size == (3, 3) and len(model.layers) == 9
        assert [type(layer) for layer in model.layers][:2] == [nn.Conv2d, nn.BatchNorm2d]
        self.log("val_loss", model.loss(scores, y))
        self.log("val_acc", model.accuracy(scores, y))
        assert not hasattr(model, "no_such_thing")
        self.asked.add(type(model))


@pytest.mark.support("Modules", "Steps that use the network's attributes, methods, parts and parameters")
@both_modes
def test_int8_answers(mode: Any, tmp_path: Path) -> None:
    model = Asking()
    callback = quantization(tmp_path, mode=mode, rehearse=True)
    trainer = fit(model, tmp_path, callback)
    assert callback.result is not None and lq.Int8Module in model.asked.all
    # Its own predictions, not the float model's.
    x = next(iter(loader(seed=1)))[0]
    int8: Any = model.model
    assert torch.equal(int8.predict(x), int8(x).softmax(1))
    assert not torch.equal(int8.predict(x), Net.predict(int8.__dict__["_original"](), x))
    trainer.validate(model, loader(seed=1), verbose=False)


class PerPart(Wrapped):
    """The parts are called one by one, and asked."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        model: Any = self.model
        scores: Tensor = model.fc(model.layers(x.to(next(model.fc.parameters()).device)))
        assert len(model.layers) == 9 and model.layers[0].kernel_size == (3, 3)
        return F.pad(scores, (0, model.fc.out_features - scores.shape[1]))


def test_parts_answer(tmp_path: Path) -> None:
    callback = quantization(tmp_path)
    fit(PerPart(), tmp_path, callback)
    assert callback.result is not None


def test_a_copy_stands_in_for_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = lq.calibrate(lq.prepare(Net().eval(), x), [x])
    int8: Any = lq.convert(model)
    assert int8.num_classes == 4 and int8.fc.in_features == 4 and bool(int8.fc)
    assert next(int8.parameters()).dtype is torch.float32
    assert not any(parameter.requires_grad for parameter in int8.parameters())
    for other in (copy.deepcopy(int8), pickle.loads(pickle.dumps(int8))):
        assert torch.equal(other(x), int8(x))
        with pytest.raises(AttributeError, match="num_classes"):
            _ = other.num_classes
        with pytest.raises(TypeError, match="is no container"):
            _ = other.layers[0]
    del model
    gc.collect()
    with pytest.raises(AttributeError, match="num_classes"):  # INT8 does not keep the float weights in memory
        _ = int8.num_classes


def test_the_evaluation_of_a_search_may_ask() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    model = Net().eval()
    reference = model(x).argmax(1)

    def evaluate(network: Any) -> float:
        device = next(network.parameters()).device
        assert network.num_classes == 4 and network.fc.out_features == 4
        return float(network.accuracy(network.predict(x.to(device)), reference))

    for runtime in ("torch", "auto"):
        quantized = lq.quantize(model, [x], evaluate, max_drop=50, runtime=runtime)
        assert quantized.tuning.met
