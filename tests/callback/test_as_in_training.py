"""What the user's code sees where lq runs it outside of training: the epoch, the step, metrics, and the call itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric
from torchmetrics.classification import MulticlassAccuracy

import lq
from helpers.classifiers import Wrapped, _Steps, images, network
from helpers.fits import fit, quantization
from helpers.modes import both_modes

EPOCHS = 3


class Scheduled(Wrapped):
    """Has a size for each epoch and a weight for each step, and reads them before it calls the network."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.sizes, self.weights = [8, 12, 16][:EPOCHS], torch.linspace(0.5, 1, steps)
        self.seen: list[tuple[int, int]] = []
        self.validated_in: set[int] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, self.global_step))
        size, weight = self.sizes[self.current_epoch], self.weights[self.global_step]
        return weight * super().training_step([F.interpolate(batch[0], size=size), *batch[1:]], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.validated_in.add(self.current_epoch)
        return super().validation_step(batch, batch_idx)


class ScheduledByHand(Scheduled):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


@both_modes
@pytest.mark.parametrize("manual", [False, True])
def test_schedules_by_epoch_and_step_are_asked_for_what_there_was(mode: Any, manual: bool, tmp_path: Path) -> None:
    steps = EPOCHS * 4
    model = (ScheduledByHand if manual else Scheduled)(steps)
    callback = quantization(tmp_path, mode=mode, evaluate=True, rehearse=True)
    trainer = fit(model, tmp_path, callback, epochs=EPOCHS)
    assert isinstance(model.model, lq.Int8Module)
    assert max(model.seen) == (EPOCHS - 1, steps - 1)
    assert model.validated_in == set(range(EPOCHS))
    # The Trainer's own counts are what they are without lq.
    assert (trainer.current_epoch, trainer.global_step) == (EPOCHS, steps)


class Records(Wrapped):
    """The best accuracy so far, as a metric that Lightning does not reset."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.best = MulticlassAccuracy(4, average="micro"), MaxMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        self.best(self.accuracy.compute())
        self.log("best", self.best.compute())


def test_metrics_do_not_speak_of_the_training(tmp_path: Path) -> None:
    model = Records()
    coarse = {name: lq.LayerSpec(weight_bits=2) for name in ("0", "3")}
    callback = quantization(tmp_path, evaluate=True, calibrator="minmax", overrides=coarse)
    fit(model, tmp_path, callback, epochs=EPOCHS)
    assert callback.result is not None
    for side in (callback.result.float_side, callback.result.int8_side):
        assert side.metrics["best"] == side.metrics["accuracy"]
    assert float(model.best.compute()) >= callback.result.float_side.metrics["accuracy"]  # as training left it


class Featured(_Steps):
    """Training asks for more than validation does."""

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.backbone, self.head = net[:-1], net[-1]

    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        features = self.backbone(x)
        return (self.head(features), features) if return_features else self.head(features)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, features = self(batch[0], return_features=True)
        return F.cross_entropy(logits, batch[1]) + 1e-3 * features.square().mean()


@both_modes
def test_int8_is_of_the_call_that_validation_makes(mode: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Featured()
    with caplog.at_level("INFO"):
        fit(model, tmp_path, quantization(tmp_path, mode=mode, evaluate=True, rehearse=True))
    assert "of the call that validation_step makes, with return_features=False" in caplog.text
    x = images(8, seed=5)[0]
    model.eval()
    with torch.no_grad():
        assert torch.allclose(lq.load(tmp_path / "int8" / "int8.pt2")(x), model(x), atol=1e-5)
        with pytest.raises(TypeError, match=r"got x with return_features=True\. For calls of another kind"):
            model(x, return_features=True)


@pytest.mark.parametrize("strict", [True, False])
def test_other_float_weights_are_the_float_network(strict: bool, tmp_path: Path) -> None:
    model = Wrapped()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, tmp_path, quantization(tmp_path, evaluate=False))
    model.load_state_dict(model.state_dict())
    assert isinstance(nn.Module.get_submodule(model, "model"), lq.Int8Module)
    with pytest.warns(UserWarning, match="'model' was an INT8 network, and is given the weights of another one"):
        model.load_state_dict(state, strict=strict)
    plain = Wrapped()
    plain.load_state_dict(state)
    x = images(8, seed=5)[0]
    assert torch.equal(model.eval()(x), plain.eval()(x)) and list(model.state_dict()) == list(state)


def test_a_part_of_the_same_weights_changes_nothing(tmp_path: Path) -> None:
    model = Wrapped()
    fit(model, tmp_path, quantization(tmp_path, evaluate=False))
    state = model.state_dict()
    head = {name: value for name, value in state.items() if name.startswith("model.8.")}
    missing = model.load_state_dict(head, strict=False).missing_keys
    assert set(missing) == state.keys() - head.keys()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(head)
    with pytest.raises(RuntimeError, match=r"of another network: model\.8\.bias, model\.8\.weight have another shape"):
        model.load_state_dict({**state, "model.8.weight": torch.zeros(3, 16), "model.8.bias": torch.zeros(3)})
    assert isinstance(nn.Module.get_submodule(model, "model"), lq.Int8Module)


class Grown(Wrapped):
    """Trains on small images, as torchvision's reference training does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([F.interpolate(batch[0], size=12), *batch[1:]], batch_idx)


@both_modes
@pytest.mark.parametrize("batch_size", [1, 8])
def test_files_are_for_the_size_of_the_validation(mode: Any, batch_size: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    data = DataLoader(TensorDataset(*images(16, seed=1)), batch_size=batch_size)
    model, callback = Grown(), quantization(tmp_path, mode=mode, export=["onnx"], rehearse=True)
    fit(model, tmp_path, callback, validation=[data])
    x = images(8, seed=5)[0]
    assert x.shape[-1] != 12
    run = lq.load(tmp_path / "int8" / "int8.onnx")
    with torch.no_grad():
        expected = model.eval()(x)
    assert (run(x) - expected).norm() < 0.05 * expected.norm()
    assert run(x[:1]).shape == (1, 4)
    assert callback.result is not None
    assert all("val_acc" in engine.metrics for engine in callback.result.engines if engine.runtime != "folded")
