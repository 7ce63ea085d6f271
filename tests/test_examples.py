"""The examples of the pages run, as they stand there, with small stand-ins for what is the reader's."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torchvision
from lightning import pytorch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.nn import functional as F

import lq
from helpers.classifiers import Wrapped, loader
from helpers.fits import fit, quantization
from helpers.networks import SmallResNet
from helpers.quantized import calibrated, noise
from lq import QuantizationCallback
from lq.graph.capture import registry
from lq.numerics import rounding

ROOT = Path(__file__).parents[1]
IMAGES = noise(4, 224)

pytestmark = [
    pytest.mark.usefixtures("no_rehearsal"),
    # 8-bit weights on a CPU without VNNI: said where the tests run on one.
    pytest.mark.filterwarnings(r"ignore:[\s\S]*(The file is right|has no VNNI)"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class WithTestStep(Wrapped):
    test_step = Wrapped.validation_step


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(seed=1)

    def test_dataloader(self) -> Any:
        return loader(seed=2)


Names = dict[str, Any]


def nothing() -> Names:
    return {}


def a_fit() -> Names:
    return {"model": WithTestStep(), "data": Data()}


def batches() -> Names:
    return {"loader": IMAGES.split(2)}


def a_checkpoint() -> Names:
    fit(Wrapped(), Path(), quantization(Path(), mode="qat", convert=False), epochs=1).save_checkpoint("last.ckpt")
    return {"lq": lq, "MyModule": Wrapped, "MyDataModule": Data}


def a_calibrated_model() -> Names:
    def evaluate(model: nn.Module) -> float:
        return float(model(IMAGES).argmax(1).float().mean())

    names: Names = {"loader": IMAGES.split(2), "evaluate": evaluate, "images": IMAGES, "classes": list("abcdefghij")}
    return names | {"model": calibrated(SmallResNet(), *IMAGES.split(2), target="auto")}


def a_float_model_and_its_metric() -> Names:
    return a_calibrated_model() | {"model": SmallResNet().eval()}


def a_checkpoint_and_a_calibrated_model() -> Names:
    fit(Wrapped(), Path(), quantization(Path(), convert=False), epochs=1).save_checkpoint("best.ckpt")
    names = {"MyModule": Wrapped, "MyDataModule": Data, "mean": [0.5] * 3, "std": [0.25] * 3}
    return a_calibrated_model() | {"lq": lq, **names}


def a_float_model() -> Names:
    names: Names = {"model": SmallResNet().eval(), "inputs": IMAGES[:2]}
    return names | {"Trainer": pytorch.Trainer, "QuantizationCallback": QuantizationCallback}


def a_layer() -> Names:
    return {"nn": nn, "F": F}


#: What the reader has before each example of a page.
PAGES: dict[str, list[Callable[[], Names]]] = {
    "README.md": [a_fit, batches, nothing],
    "docs/index.md": [nothing],
    "docs/callback.md": [a_checkpoint, a_calibrated_model],
    "docs/library.md": [
        batches,
        a_float_model,
        nothing,
        a_layer,
        a_calibrated_model,
        a_float_model_and_its_metric,
        a_calibrated_model,
    ],
    "docs/phone.md": [a_fit, a_checkpoint_and_a_calibrated_model, nothing, nothing],
}


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


def test_every_page_with_examples_is_here() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert {str(page.relative_to(ROOT)) for page in pages if examples(page)} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime", *(("executorch",) if page == "docs/phone.md" else ())):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    small = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    monkeypatch.setattr(pytorch, "Trainer", functools.partial(Trainer, enable_checkpointing=False, **small))
    monkeypatch.setattr(torchvision.models, "resnet18", SmallResNet)
    names: Names = {}
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    monkeypatch.setattr(rounding, "_ROUNDINGS", dict(rounding._ROUNDINGS))
    for given, example in zip(PAGES[page], examples(ROOT / page), strict=True):
        names |= given()
        # Compiling takes as long as all of the others; tests/formats does it.
        left_out = ('format="aoti"', *(() if page == "docs/phone.md" else ('"int8.pte"',)))
        code = "".join(line for line in example.splitlines(keepends=True) if not any(each in line for each in left_out))
        exec(compile(code, f"{page}: {code.splitlines()[0]}", "exec"), names)
