"""What a network takes and returns, beside float32 tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.quantized import noise


class Images(nn.Module):
    """Takes images in any type."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float() / 255)


@pytest.mark.filterwarnings("ignore:lq. openvino cannot run the file")  # it has no 16-bit integers, and no float64
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.float16, torch.float64])
def test_images_of_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    x = torch.randint(0, 127, (4, 3, 16, 16)).to(dtype)
    model = Images().eval()
    lq.calibrate(lq.prepare(model, x[:2], target="x86_avx2"), [x])
    expected = lq.convert(model)(x)
    for file, runtime in (("int8.pt2", "torch"), ("int8.onnx", "onnxruntime")):
        lq.export(model, tmp_path / file)
        loaded: Any = lq.load(tmp_path / file, runtime)
        assert loaded.metadata.tensors[0].dtype == str(dtype).removeprefix("torch.")
        assert torch.allclose(torch.as_tensor(loaded(x)), expected, atol=1e-2)
        if not dtype.is_floating_point:
            with pytest.raises(TypeError, match="input 'x' must be"):
                loaded(x.float())


class Result(NamedTuple):
    logits: Tensor
    features: Any


class Returning(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.conv, self.fc, self.make = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), make

    def forward(self, x: Tensor) -> Any:
        features = self.conv(x).relu().mean((2, 3))
        return self.make(self.fc(features), features)


def returning(make: Any) -> nn.Module:
    model = Returning(make).eval()
    return lq.calibrate(lq.prepare(model, noise(2), target="x86_avx2"), [noise(4)])


@pytest.mark.parametrize("file", ["int8.pt2", "int8.onnx"])
def test_named_tuples(file: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = returning(Result)
    x = noise(4, seed=2)
    int8 = lq.convert(model)(x)
    assert isinstance(int8, Result)
    lq.export(model, tmp_path / file)
    logits, features = lq.load(tmp_path / file)(x)
    assert torch.allclose(torch.as_tensor(logits), int8.logits, atol=1e-2)
    assert torch.allclose(torch.as_tensor(features), int8.features, atol=1e-2)


@pytest.mark.parametrize("value", [3, "cats"])
def test_results_that_are_no_tensors(value: Any, tmp_path: Path) -> None:
    model = returning(lambda logits, features: {"logits": logits, "more": value})
    assert lq.convert(model)(noise(2))["more"] == value
    with pytest.raises(ValueError, match=f"returns {value!r} beside tensors, and a file of the format 'pt2'"):
        lq.export(model, tmp_path / "int8.pt2")
    assert not list(tmp_path.iterdir())


@dataclass
class Unknown:
    logits: Tensor


def test_objects_that_are_not_looked_into() -> None:
    with pytest.raises(lq.CaptureError, match=r"torch.export does not look into.*register_dataclass\(cls\)"):
        returning(lambda logits, features: Unknown(logits))


def test_inputs_that_are_no_tensors(tmp_path: Path) -> None:
    class Named(Images):
        def forward(self, batch: dict[str, Any]) -> Tensor:
            return super().forward(batch["image"])

    batch = {"image": noise(2), "name": ["a", "b"]}
    model = Named().eval()
    lq.calibrate(lq.prepare(model, (batch,), target="x86_avx2"), [(batch,)])
    with pytest.raises(ValueError, match="takes 'a' in its input 'batch', and a file takes tensors alone"):
        lq.export(model, tmp_path / "int8.pt2")


def test_the_tracer_that_loggers_draw_graphs_with() -> None:
    model = Images().eval()
    lq.calibrate(lq.prepare(model, noise(2), target="x86_avx2"), [noise(4)])
    int8, x = lq.convert(model), noise(2, seed=4)
    expected = int8(x)
    with pytest.warns((FutureWarning, DeprecationWarning, torch.jit.TracerWarning)):
        traced = torch.jit.trace(int8, (x,), check_trace=False)
    assert torch.allclose(traced(x), expected, atol=1e-2)
    assert torch.equal(int8(x), expected)


class Positions(nn.Module):
    """Adds a slice of a parameter, whose end follows from the image, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 4)
        self.embedding = nn.Parameter(torch.randn(1, 80, 16))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens[:, :1], tokens], 1)
        tokens += self.embedding[:, : tokens.shape[1]]
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("target", ["x86_avx2", "onnxruntime", "xnnpack"])
def test_a_sliced_parameter(target: str) -> None:
    model = Positions().eval()
    x = noise(4, size=32)
    with torch.no_grad():
        expected = model(x)
    lq.calibrate(lq.prepare(model, x[:2], target=target), [x])
    assert torch.allclose(lq.convert(model)(x), expected, atol=0.1 * float(expected.abs().max()))


class BySizes(nn.Module):
    """Computes with sizes, by what ``function`` makes of a feature map."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layers, self.function = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers(x))


@pytest.mark.parametrize(
    ("function", "notes"),
    [
        (lambda h: h.mean((2, 3)) / h.size(0) ** 0.5, 0),
        (lambda h: h.mean((2, 3)) * h.shape[2] ** -0.5, 0),
        (lambda h: F.interpolate(h, (round(h.shape[2] * 0.5), round(h.shape[3] * 0.5))).mean((2, 3)), 1),
    ],
    ids=["root of the batch", "root of the height", "rounded"],
)
def test_arithmetic_with_sizes_in_a_program(function: Any, notes: int, tmp_path: Path) -> None:
    model, x = BySizes(function).eval(), noise(4, size=16)
    lq.calibrate(lq.prepare(model, x[:2], target="x86_avx2"), [x])
    int8 = lq.convert(model)
    lq.export(int8, tmp_path / "int8.pt2")
    loaded = lq.load(tmp_path / "int8.pt2")
    assert torch.equal(loaded(x[:3]), int8(x[:3])) and len(loaded.metadata.notes) == notes
