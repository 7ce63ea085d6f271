"""LightningModules whose own forward does more than to call a network, and networks that training calls in part."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import lq
from helpers.classifiers import Wrapped, images, network
from helpers.fits import fit, quantization
from helpers.modes import both_modes


class Around(Wrapped):
    """A forward that normalises images and makes probabilities, by which the steps call the network."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, -0.2, 0.3]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) * 3).softmax(1)


@pytest.mark.support("Modules", "A `forward` that normalises, or makes probabilities: the files compute all of it")
@both_modes
def test_a_forward_that_does_more_than_its_network_is_exported_as_a_whole(mode: Any, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = Around()
    callback = quantization(tmp_path, mode=mode, export=["onnx"], rehearse=True)
    trainer = fit(model, tmp_path, callback)
    x = images(8, seed=5)[0]
    expected = model(x)
    assert torch.allclose(expected.sum(1), torch.ones(8))
    for file, tolerance in (("int8.pt2", 1e-6), ("int8.onnx", 0.02)):
        assert torch.allclose(torch.as_tensor(lq.load(tmp_path / "int8" / file)(x)), expected, atol=tolerance)
    # Checkpoints are still those of the plain module.
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    plain = Around.load_from_checkpoint(tmp_path / "after.ckpt")
    if mode == "ptq":  # two epochs are short for moving averages
        with torch.no_grad():
            assert torch.allclose(plain.eval()(x), expected, atol=0.05)


class WithLoss(Wrapped):
    """A forward that also gives a loss where it gets labels."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.model(x)
        return {"logits": logits, "loss": None if y is None else F.cross_entropy(logits, y)}

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self(*batch)["logits"], batch[1]


@pytest.mark.support("Modules", "A `forward` that also takes labels and gives a loss: the network in it is exported")
def test_a_loss_is_no_part_of_the_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = WithLoss()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(model, tmp_path, quantization(tmp_path, export=[]))
    assert "computes more" not in caplog.text
    x = images(8, seed=5)[0]
    assert torch.allclose(lq.load(tmp_path / "int8" / "int8.pt2")(x), model(x)["logits"], atol=1e-6)


class Undecided(Wrapped):
    """A forward whose surroundings depend on data."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits * 2 if float(logits.detach().sum()) > 1e9 else logits / 2


class Scores(WithLoss):
    """A forward that gives something else than its network does, and more of it."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.model(x) * 2
        return {"logits": logits, "score": logits.max()}


class AtTimes(Wrapped):
    """Trains the network itself, and judges what its forward makes of it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x) + self.model(x.flip(-1))) / 2 if self.training else self.model(x) / 2


@pytest.mark.support("Modules", "A `forward` that no file can compute: the network in it is quantized, with a warning")
@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Undecided, "depends on data"), (Scores, "other tensors than 'model'"), (AtTimes, "also call 'model' without it")],
)
def test_a_forward_that_no_file_can_compute(cls: Any, reason: str, tmp_path: Path) -> None:
    model = cls()
    with pytest.warns(UserWarning, match=f"computes more than 'model', which alone is quantized.*{reason}"):
        fit(model, tmp_path, quantization(tmp_path, export=[]))
    assert isinstance(model.model, lq.Int8Module)


class Tempered(Wrapped):
    """Does nothing around its network before training, and something after it."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) / self.temperature

    def on_train_end(self) -> None:
        self.temperature.data.fill_(3.0)


def test_what_does_nothing_yet_is_a_part_of_the_network(tmp_path: Path) -> None:
    model = Tempered()
    fit(model, tmp_path, quantization(tmp_path, export=[], rehearse=True))
    x = images(8, seed=5)[0]
    assert torch.allclose(lq.load(tmp_path / "int8" / "int8.pt2")(x), model(x), atol=1e-6)
    assert model.temperature == 3.0


def test_the_network_alone_where_it_is_named(tmp_path: Path) -> None:
    model = Around()
    fit(model, tmp_path, quantization(tmp_path, export=[], module="model"))
    x = images(8, seed=5)[0]
    assert torch.allclose(lq.load(tmp_path / "int8" / "int8.pt2")(x), model.model(x), atol=1e-6)


class _Dropped(nn.Module):
    """A residual block that training leaves out at random."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()).item() < 0.5:
            return x
        return F.relu(x + self.bn(self.conv(x)))


class Stochastic(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        blocks = [_Dropped(8) for _ in range(4)]
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.support("Modules", "Layers left out at random in training (stochastic depth): one network")
@both_modes
def test_stochastic_depth(mode: Any, tmp_path: Path) -> None:
    for seed in range(3):
        seed_everything(seed, verbose=False)
        model = Stochastic()
        callback = quantization(tmp_path, mode=mode, rehearse=True, export=[])
        fit(model, tmp_path, callback, epochs=4)
        assert callback.result is not None
        assert len([layer for layer in callback.result.report.layers if layer.precision == "int8"]) == 6
        x = images(8, seed=5)[0]
        assert torch.allclose(lq.load(tmp_path / "int8" / "int8.pt2")(x), model(x), atol=1e-5)


class Twice(Around):
    """Calls its network for the image and for its mirror image."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x) + self.model(x.flip(-1))).softmax(1)


class Taught(Around):
    """Has a teacher, which only training asks."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = network().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), self.teacher(batch[0]).softmax(1))


class Begun(Around):
    """Scales images by what a hook sets before the first step."""

    def on_train_epoch_start(self) -> None:
        self.gain = 1.5

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0] * self.gain), batch[1])


@pytest.mark.support("Modules", "A `forward` with mirrored images, a teacher, or what hooks set: all of it is exported")
@both_modes
@pytest.mark.parametrize("cls", [Twice, Taught, Begun])
def test_forwards_as_a_whole(cls: Any, mode: Any, tmp_path: Path) -> None:
    model = cls()
    fit(model, tmp_path, quantization(tmp_path, mode=mode, export=[], rehearse=True))
    x = images(8, seed=5)[0]
    expected = model(x)
    assert torch.allclose(lq.load(tmp_path / "int8" / "int8.pt2")(x), expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(cls.forward(model.eval(), x), expected, atol=0.1)


class Laid(Wrapped):
    """Moves and lays out images, which computes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.device).contiguous(memory_format=torch.channels_last)).clone()


def test_layouts_and_devices_are_no_part_of_the_network(tmp_path: Path) -> None:
    model = Laid()
    fit(model, tmp_path, quantization(tmp_path, export=[]))
    assert isinstance(model.model, lq.Int8Module)


@both_modes
@pytest.mark.parametrize("name", ["3", "model.3"])
def test_layers_have_the_names_that_they_have_in_the_network_too(name: str, mode: Any, tmp_path: Path) -> None:
    callback = quantization(tmp_path, mode=mode, export=[], rehearse=True, overrides={name: None})
    model = Around()
    fit(model, tmp_path, callback)
    assert callback.result is not None
    float_layers = callback.result.report.float_layers
    assert [layer.name for layer in float_layers if "overrides" in layer.reason] == ["model.3"]
    fit(model, tmp_path, callback)  # it trains on, prepared as it is
    with pytest.raises(ValueError, match="overrides: '33' matches nothing in the model; similar are"):
        fit(Around(), tmp_path, quantization(tmp_path, mode=mode, module="model", overrides={"33": None}))


class Named(Wrapped):
    """Its network takes the whole batch, with the names of the files, and so does what it calls."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, batch: Any) -> dict[str, Any]:
            return {"logits": self.layers(batch["image"]), "name": batch["name"]}

    def __init__(self) -> None:
        super().__init__()
        self.model = self.Network()

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.model(batch)["logits"], batch["label"]


@pytest.mark.support("Modules", "A network that takes the whole batch, names of files and all: the one in it")
@both_modes
def test_a_network_that_takes_names_as_well(mode: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x, y = images(64)
    samples = [{"image": x[i], "label": y[i], "name": f"{i}.png"} for i in range(64)]
    data = DataLoader(samples, 16)  # type: ignore[arg-type]
    model = Named()
    callback = quantization(tmp_path, mode=mode, export=[], rehearse=True, evaluate=True)
    with caplog.at_level(logging.INFO):
        fit(model, tmp_path, callback, data=data, validation=[data])
    assert "takes text beside tensors, which no file does: 'model.layers' in it is what is quantized" in caplog.text
    assert isinstance(model.model.layers, lq.Int8Module)
    assert torch.equal(lq.load(tmp_path / "int8" / "int8.pt2")(x), model.model.layers(x))


class NamedHeads(Wrapped):
    """Its forward takes the whole batch, with the names of the files, and has several heads."""

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.model = net[:-1]
        self.heads = torch.nn.ModuleDict({"main": net[-1], "other": torch.nn.Linear(16, 1)})

    def forward(self, batch: Any) -> dict[str, Any]:  # type: ignore[override]
        features = self.model(batch["image"])
        return {name: head(features) for name, head in self.heads.items()}

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self(batch)["main"], batch["label"]


@pytest.mark.support("Modules", "A `forward` of the whole batch, names of files and all, with several heads: its parts")
@both_modes
def test_heads_of_a_forward_that_takes_names_as_well(mode: Any, tmp_path: Path) -> None:
    x, y = images(64)
    samples = [{"image": x[i], "label": y[i], "name": f"{i}.png"} for i in range(64)]
    data = DataLoader(samples, 16)  # type: ignore[arg-type]
    model = NamedHeads()
    callback = quantization(tmp_path, mode=mode, rehearse=True, evaluate=True)
    fit(model, tmp_path, callback, data=data, validation=[data])
    assert callback.result is not None and len(callback.result.report.int8_layers) == 4
    loaded: Any = lq.load(tmp_path / "int8" / "int8.pt2")
    expected = model.eval()({"image": x})
    found = loaded(x, y) if len(loaded.metadata.tensors) == 2 else loaded(x)
    leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.shape == (64, 4)]
    assert any(torch.allclose(leaf, expected["main"], atol=1e-5) for leaf in leaves)
