"""Steps that call backbone and head apart: the files compute all that lies between them, too."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.classifiers import _Steps, dict_loader, images, loader, network
from helpers.fits import fit, quantization
from helpers.modes import both_modes

BATCH = images(16, seed=5)


class Apart(_Steps):
    """Calls its parts one by one, in the steps alone, with a norm, a parameter and functions between them."""

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.backbone, self.head = net[:-2], net[-1]
        self.norm = nn.BatchNorm1d(16)
        self.scale = nn.Parameter(torch.ones(16))

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        features = self.backbone((x - 0.1) / 1.5)
        features = F.dropout(self.norm(features.view(x.size(0), -1)), 0.2, self.training) * self.scale
        return self.head(F.normalize(features, dim=1) * 4), y


class Heads(_Steps):
    """Several heads, and a dict of features."""

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()[:-2]

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            features = self.layers(x)
            return {"pooled": features.flatten(1), "map": features}

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.first, self.second = self.Backbone(), nn.Linear(16, 4), nn.Conv2d(16, 4, 1)

    def both(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        return {"first": self.first(features["pooled"]), "second": self.second(features["map"].sigmoid())}

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        results = self.both(batch[0])
        return results["first"] + results["second"].flatten(1), batch[1]


class Fused(_Steps):
    """Two networks for two inputs in a dict, whose features a third one joins."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.scalar, self.head = network(8), nn.Linear(2, 8), nn.Linear(16, 4)

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.image(batch["image"]), self.scalar(batch["scalar"]).relu()], 1)
        return self.head(joined), batch["label"]


@pytest.mark.support("Modules", "Backbone and head called apart in the steps: the files compute what lies between, too")
@both_modes
def test_the_files_compute_what_the_step_does(mode: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    seed_everything(0, verbose=False)
    model = Apart()
    callback = quantization(tmp_path, mode=mode, export=["onnx", "onnxruntime"], rehearse=True, evaluate=True)
    with caplog.at_level(logging.INFO):
        trainer = fit(model, tmp_path, callback)
    assert "files compute what validation_step of Apart does with 'input'" in caplog.text
    with torch.no_grad():
        expected = model.eval().logits(BATCH)[0]
    for file in ("int8.pt2", "int8.onnx", "int8.onnxruntime.onnx"):
        path = tmp_path / "int8" / file
        if not path.exists():
            (path,) = [p for p in path.parent.glob("*.onnx") if p.name != "int8.onnx"]
        int8 = lq.load(path)
        assert [spec.name for spec in int8.metadata.tensors] == ["input"]
        assert torch.allclose(int8(BATCH[0]), expected, atol=1e-5 if file == "int8.pt2" else 0.3)
        assert int8(BATCH[0][:3]).shape == (3, 4)
    assert callback.result is not None
    rows = {engine.runtime: engine for engine in callback.result.engines}
    assert rows["onnxruntime"].latency is not None
    # The parts in the module and its checkpoints are as before.
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    plain = Apart.load_from_checkpoint(tmp_path / "after.ckpt").eval()
    with torch.no_grad():
        assert torch.allclose(plain.logits(BATCH)[0], expected, atol=0.5)


def test_several_results(tmp_path: Path) -> None:
    model = Heads()
    fit(model, tmp_path, quantization(tmp_path, export=[]))
    int8 = lq.load(tmp_path / "int8" / "int8.pt2")
    with torch.no_grad():
        expected = model.eval().both(BATCH[0])
    found = int8(BATCH[0])
    assert found.keys() == {"first", "second"}
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    with pytest.raises(ValueError, match=r"size\('input', 2\) == 8"):
        int8(torch.zeros(2, 3, 12, 12))


def test_several_inputs_by_their_names(tmp_path: Path) -> None:
    model = Fused()
    fit(model, tmp_path, quantization(tmp_path, export=[]), data=dict_loader(), validation=[dict_loader()])
    int8 = lq.load(tmp_path / "int8" / "int8.pt2")
    batch = next(iter(dict_loader()))
    with torch.no_grad():
        expected = model.eval().logits(batch)[0]
    assert torch.allclose(int8(image=batch["image"], scalar=batch["scalar"]), expected, atol=1e-5)


class Undecided(Apart):
    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        features = self.backbone(batch[0]).flatten(1)
        return self.head(features if float(features.detach().sum()) > -1e9 else -features), batch[1]


class Views(Apart):
    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        features = self.backbone(batch[0]) + self.backbone(batch[0].flip(-1))
        return self.head(features.flatten(1)), batch[1]


@pytest.mark.parametrize(("cls", "reason"), [(Undecided, "depends on data"), (Views, "not call each part once")])
def test_what_is_no_graph_is_said(cls: Any, reason: str, tmp_path: Path) -> None:
    model = cls()
    with pytest.warns(UserWarning, match=rf"files take the inputs of 'backbone', 'head' one by one.*{reason}"):
        fit(model, tmp_path, quantization(tmp_path, export=[]), data=loader())
    tensors = lq.load(tmp_path / "int8" / "int8.pt2").metadata.tensors
    assert len(tensors) == 2
