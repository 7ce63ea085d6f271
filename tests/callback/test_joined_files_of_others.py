"""Steps that call backbone and head apart as other people's do: what a file cannot compute is said, not guessed."""

from __future__ import annotations

import collections
import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import lq
from helpers.classifiers import _Steps, images, loader, network
from helpers.fits import fit, quantization

BATCH = images(16, seed=5)
ONE_BY_ONE = "files take the inputs of 'backbone', 'head' one by one"


class Apart(_Steps):
    """Backbone and head, with nothing between."""

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.backbone, self.head = net[:-1], net[-1]

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.head(self.between(self.backbone(batch[0]), batch)), batch[1]

    def between(self, features: Tensor, batch: Any) -> Tensor:
        return features


def batches(values: list[Any]) -> DataLoader[Any]:
    """Gives these batches."""
    return DataLoader(values, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


def relative_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def check_file(model: Any, folder: Path) -> None:
    """What the file computes is what the module does with INT8 in place, for batches of several sizes."""
    int8 = lq.load(folder / "int8" / "int8.pt2")
    for count in (1, 3, 16):
        some = [value[:count] for value in BATCH]
        with torch.no_grad():
            assert torch.allclose(int8(some[0]), model.eval().logits(some)[0], atol=1e-5)


class CompiledParts(Apart):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = (torch.compile(part, backend="eager") for part in (self.backbone, self.head))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler, of itself
def test_compiled_parts_give_way_to_int8(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model = CompiledParts()
    callback = quantization(tmp_path, export=[], evaluate=True)
    trainer = fit(model, tmp_path, callback)
    check_file(model, tmp_path)
    # The float weights are as training left them, under their own keys.
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    state = torch.load(tmp_path / "after.ckpt", weights_only=False)["state_dict"]
    assert state.keys() == CompiledParts().state_dict().keys()
    norms = [value for key, value in state.items() if key.endswith("num_batches_tracked")]
    assert norms and all(int(value) == trainer.global_step for value in norms)


class Reshapes(Apart):
    """Reads the batch size as a number, and compares it with the labels'."""

    def between(self, features: Tensor, batch: Any) -> Tensor:
        assert len(batch[0]) == len(batch[1])
        return features.reshape(len(batch[0]), -1) * 2


@pytest.mark.parametrize("size", [1, 8])
def test_files_take_batches_of_any_size(size: int, tmp_path: Path) -> None:
    model = Reshapes()
    validation = DataLoader(loader().dataset, batch_size=size)
    fit(model, tmp_path, quantization(tmp_path, export=[]), data=loader(), validation=[validation])
    check_file(model, tmp_path)


class Measures(Apart):
    """A metric between the heads, whose hash depends on its state."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(16, 4)
        self.accuracy = MulticlassAccuracy(4, validate_args=False)

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        features = self.backbone(batch[0])
        logits = self.head(features)
        self.accuracy.update(logits, batch[1])
        return self.second(features), batch[1]


def test_a_metric_between_the_heads(tmp_path: Path) -> None:
    model = Measures()
    fit(model, tmp_path, quantization(tmp_path, export=[]))
    results = lq.load(tmp_path / "int8" / "int8.pt2")(BATCH[0])
    with torch.no_grad():
        assert torch.allclose(results["second"], model.eval().logits(BATCH)[0], atol=1e-5)


class Coarse(_Steps):
    """Of what the backbone returns the head reads one item, the step another."""

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.classes = network()[:-1], nn.Linear(16, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            features = self.layers(x)
            return {"features": features, "coarse": self.classes(features)}

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.Backbone(), nn.Linear(16, 4)

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        found = self.backbone(batch[0])
        return self.head(found["features"]) + found["coarse"], batch[1]


def test_items_that_the_step_alone_reads_are_results(tmp_path: Path) -> None:
    model = Coarse()
    fit(model, tmp_path, quantization(tmp_path, export=[]))
    results = lq.load(tmp_path / "int8" / "int8.pt2")(BATCH[0])
    assert results["backbone"].keys() == {"coarse"}
    with torch.no_grad():
        assert torch.allclose(results["head"] + results["backbone"]["coarse"], model.eval().logits(BATCH)[0], atol=1e-5)


class Keyword(Apart):
    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.head(self.backbone(batch["class"])), batch["label"]


def test_a_key_that_is_a_keyword(tmp_path: Path) -> None:
    data = batches([{"class": x, "label": y} for x, y in loader()])
    fit(Keyword(), tmp_path, quantization(tmp_path, export=[]), data=data, validation=[data])
    assert [spec.name for spec in lq.load(tmp_path / "int8" / "int8.pt2").metadata.tensors] == ["input"]


class Noisy(Apart):
    def between(self, features: Tensor, batch: Any) -> Tensor:
        return features + torch.randn_like(features)


class Mixed(Apart):
    def between(self, features: Tensor, batch: Any) -> Tensor:
        share = np.random.beta(1.0, 1.0)
        return share * features + (1 - share) * features.flip(0)


@dataclasses.dataclass
class Pair:
    image: Tensor
    label: Tensor


class OfObjects(Apart):
    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        pair = batch[0]
        return self.head(self.backbone(pair.image)), pair.label


class OfUserDicts(Apart):
    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.head(self.backbone(batch["image"])), batch["label"]


def objects() -> DataLoader[Any]:
    return batches([(Pair(x, y), torch.arange(len(x))) for x, y in loader()])


def user_dicts() -> DataLoader[Any]:
    return batches([collections.UserDict({"image": x, "label": y}) for x, y in loader()])


class ByNames(Apart):
    """What is done with the images is said by a text in the batch."""

    def between(self, features: Tensor, batch: Any) -> Tensor:
        return features if batch[2] == "plain" else -features


def named() -> DataLoader[Any]:
    return batches([(x, y, "plain" if index % 2 else "negative") for index, (x, y) in enumerate(loader())])


class AskForSizes(Apart):
    """The backbone computes something else with larger images, and validation has such."""

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()[:-1]

        def forward(self, x: Tensor) -> Tensor:
            features = self.layers(x)
            return -features if x.shape[-1] > 8 else features

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.Backbone()


def larger() -> DataLoader[Any]:
    return batches([(F.interpolate(x, scale_factor=2), y) for x, y in loader()])


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection")
@pytest.mark.parametrize(
    ("cls", "data", "validation", "reason"),
    [
        (Noisy, loader, loader, "draws random numbers"),
        (Mixed, loader, loader, "draws random numbers"),
        (OfObjects, objects, objects, "for another batch it computes something else"),
        (OfUserDicts, user_dicts, user_dicts, "is given no tensors"),
        (ByNames, named, named, "for another batch it computes something else"),
        (AskForSizes, loader, larger, r"made for inputs with .*<= 8"),
    ],
)
def test_what_no_file_computes_is_said(cls: Any, data: Any, validation: Any, reason: str, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model = cls()
    callback = quantization(tmp_path, export=[], rehearse=True, evaluate=False)
    with pytest.warns(UserWarning, match=rf"{ONE_BY_ONE}.*{reason}"):
        fit(model, tmp_path, callback, data=data(), validation=[validation()])
    assert len(lq.load(tmp_path / "int8" / "int8.pt2").metadata.tensors) == 2


class Divides(Apart):
    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.head(self.backbone(batch[0] / batch[2])), batch[1]


def test_numbers_in_the_batch_are_told_of(tmp_path: Path) -> None:
    data = batches([(x, y, 2.0) for x, y in loader()])
    model = Divides()
    with pytest.warns(UserWarning, match=r"does with \[2\] = 2.0 of the first batch, whatever others have there"):
        fit(model, tmp_path, quantization(tmp_path, export=[]), data=data, validation=[data])
    with torch.no_grad():
        expected = model.eval().logits((*BATCH, 2.0))[0]
    assert torch.allclose(lq.load(tmp_path / "int8" / "int8.pt2")(BATCH[0]), expected, atol=1e-5)


class Writes(_Steps):
    """Two heads, of which the first writes into the features that the second one reads."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.backbone = network()[:-2]
        self.first = nn.Sequential(activation(inplace=True), nn.Flatten(), nn.Linear(16, 4))  # type: ignore[call-arg]
        self.second = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        features = self.backbone(batch[0])
        return self.first(features) + self.second(features), batch[1]


def test_a_part_that_writes_into_what_another_reads(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="'second' is given a tensor that another part of the network has written into"
    ):
        fit(Writes(nn.SiLU), tmp_path / "silu", quantization(tmp_path / "silu", export=[], rehearse=True))
    # What the second one computes is the same with a ReLU before it.
    model = Writes(nn.ReLU)
    fit(model, tmp_path / "relu", quantization(tmp_path / "relu", export=[], rehearse=True))
    results = lq.load(tmp_path / "relu" / "int8" / "int8.pt2")(BATCH[0])
    with torch.no_grad():
        assert relative_difference(sum(results.values()), model.eval().logits(BATCH)[0]) < 1e-4


class Autocast(Apart):
    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.head(self.backbone(batch[0]))
        return logits.float(), batch[1]


def test_autocast_around_the_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seed_everything(0, verbose=False)
    model = Autocast()
    with caplog.at_level(logging.INFO):
        fit(model, tmp_path, quantization(tmp_path, export=[], rehearse=True))
    assert "files compute what validation_step of Autocast does with 'input'" in caplog.text
    with torch.no_grad():
        expected = model.eval().logits(BATCH)[0]
    assert relative_difference(lq.load(tmp_path / "int8" / "int8.pt2")(BATCH[0]), expected) < 0.05


class TwoViews(Apart):
    """A chunk along a batch of any size, which torch's exporter cannot write to ONNX."""

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        one, other = self.backbone(torch.cat([batch[0], batch[0].flip(3)])).chunk(2)
        return self.head((one + other) / 2), batch[1]


def test_a_format_that_cannot_express_it_has_a_file_of_the_parts(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    seed_everything(0, verbose=False)
    model, callback = TwoViews(), quantization(tmp_path, export=["onnx"], rehearse=True)
    with pytest.warns(UserWarning, match=r"int8\.onnx takes the inputs of each part .* cannot be written to an ONNX"):
        fit(model, tmp_path, callback)
    check_file(model, tmp_path)
    assert callback.result is not None
    onnx: Any = lq.load(tmp_path / "int8" / "int8.onnx")
    assert onnx.metadata.inputs == ("parts",)
    assert all(engine.latency is not None for engine in callback.result.engines)  # each with inputs of its own
