"""Files: what is saved is what runs elsewhere."""

from __future__ import annotations

import copy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.networks import Residual, WithDataDependent, randomize_batch_norm
from helpers.quantized import TARGET, noise, quantized
from lq.deployment import export, verify
from lq.deployment.verify import OUTPUT_TOLERANCE, allowed_difference, simulated
from lq.int8.onednn import lower

X = noise(8, seed=1)


def residual() -> lq.Int8Module:
    return quantized(randomize_batch_norm(Residual()), X)


def test_float_checkpoint_to_int8_in_a_new_process_is_bit_identical(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(randomize_batch_norm(Residual()).state_dict(), tmp_path / "float.pt")
    model = lq.prepare(Residual(), X, mode="qat", target="x86_avx2")
    model.load_state_dict(torch.load(tmp_path / "float.pt", weights_only=True), strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(X), torch.arange(8)).backward()
        optimizer.step()
    int8 = lq.convert(model.eval())
    lq.export(int8, tmp_path / "int8.pt2")
    torch.save(int8.state_dict(), tmp_path / "int8.pt")
    torch.save({"x": X, "y": int8(X), "one": int8(X[:1])}, tmp_path / "io.pt")
    check = """
import sys, torch, lq
io = torch.load(sys.argv[1] + "/io.pt", weights_only=True)
int8 = lq.load(sys.argv[1] + "/int8.pt2")
assert torch.equal(int8(io["x"]), io["y"])
assert torch.equal(int8(io["x"][:1]), io["one"])
assert len(int8.report.int8_layers) == 5
state = torch.load(sys.argv[1] + "/int8.pt", weights_only=True)
assert state["conv1.weight"].dtype == torch.int8
print("identical")
"""
    done = subprocess.run([sys.executable, "-c", check, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "identical", done.stderr
    # The same through state dicts: into a network that was made from other weights.
    other = lq.calibrate(lq.prepare(Residual().eval(), X, target="x86_avx2"), [X])
    again = lq.convert(other)
    again.load_state_dict(torch.load(tmp_path / "int8.pt", weights_only=True))
    assert torch.equal(again(X), int8(X))


def test_batch_and_image_size_may_differ_from_the_example(tmp_path: Path) -> None:
    int8 = residual()
    lq.export(int8, tmp_path / "int8.pt2")
    loaded = lq.load(tmp_path / "int8.pt2")
    for shape in ((1, 3, 16, 16), (5, 3, 24, 20)):
        x = torch.randn(shape)
        assert torch.equal(loaded(x), int8(x))
    loaded.execution = int8.execution = "simulation"
    torch.testing.assert_close(loaded(X), int8(X))


class Structured(nn.Module):
    """Takes a dict and a tensor, gives a dict with a list in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, batch: dict[str, Tensor], extra: Tensor, *, double: bool = False) -> dict[str, Any]:
        x = F.relu(self.conv(batch["image"])).mean((2, 3)) + batch["index"][:, None]
        return {"logits": self.fc(x + extra), "features": [x * 2 if double else x]}


def test_structured_inputs_and_outputs(tmp_path: Path) -> None:
    batch, extra = {"image": X, "index": torch.arange(8)}, torch.ones(8, 8)
    arguments = {"batch": batch, "extra": extra, "double": True}
    model = Structured().eval()
    lq.calibrate(lq.prepare(model, arguments, target="x86_avx2"), [arguments])
    int8 = lq.convert(model)
    lq.export(int8, tmp_path / "int8.pt2")
    loaded = lq.load(tmp_path / "int8.pt2")
    for size in (8, 1, 3):
        part = {"image": X[:size], "index": torch.arange(size)}
        expected = int8(part, extra[:size], double=True)
        for actual in (loaded(part, extra[:size]), loaded(extra=extra[:size], batch=part)):
            assert torch.equal(actual["logits"], expected["logits"])
            assert len(actual["features"]) == 1
            assert torch.equal(actual["features"][0], expected["features"][0])
    assert not loaded.example_inputs["batch"]["image"].any()  # nor are training images in the file
    with pytest.raises(TypeError, match="takes the inputs batch, extra; got 1 positional"):
        loaded(batch)


class TakesAny(nn.Module):
    """As ``nn.DataParallel`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.b(sum(self.a(x).relu() for x in xs))


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_forward_takes_as_any_number(count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = tuple(torch.randn(4, 8) for _ in range(count))
    model = lq.prepare(TakesAny().eval(), example, target=TARGET)
    lq.calibrate(model, [example], forward=lambda batch: model(*batch))
    int8 = lq.convert(model)
    lq.export(int8, tmp_path / "int8.pt2")
    loaded = lq.load(tmp_path / "int8.pt2")
    given = tuple(torch.randn(3, 8) for _ in range(count))
    assert torch.allclose(loaded(*given), int8(*given), atol=1e-5)
    assert torch.equal(loaded(given), loaded(*given)) and torch.equal(loaded(xs=given), loaded(*given))
    with pytest.raises(TypeError, match=f"takes the inputs xs; got {3 * count} positional arguments"):
        loaded(*given, *given, *given)


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    int8, path = residual(), tmp_path / "int8.pt2"
    lq.export(int8, path)
    before = path.read_bytes()

    def full_disk(file: Path, data: Any) -> None:
        file.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        lq.export(int8, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_training_images_are_not_in_the_file(tmp_path: Path) -> None:
    int8 = residual()
    lq.export(int8, tmp_path / "int8.pt2")
    assert not any(value.any() for value in lq.load(tmp_path / "int8.pt2").example_inputs.values())


def test_bad_paths_and_files(tmp_path: Path) -> None:
    int8 = residual()
    with pytest.raises(ValueError, match=r"path='.*model\.pt' must end in \.pt2 or \.onnx"):
        lq.export(int8, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model is a Residual, neither converted nor prepared"):
        lq.export(Residual(), tmp_path / "model.pt2")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="path='.*file' cannot be written to"):
        lq.export(int8, tmp_path / "file" / "model.pt2")
    with pytest.raises(FileNotFoundError, match=r"path='.*nowhere\.pt2': no such file"):
        lq.load(tmp_path / "nowhere.pt2")
    lq.export(int8, tmp_path / "model.pt2")
    whole = (tmp_path / "model.pt2").read_bytes()
    (tmp_path / "half.pt2").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt2").write_text("hello")
    with zipfile.ZipFile(tmp_path / "foreign.pt2", "w") as archive:
        archive.writestr("hello.txt", "hello")
    for name in ("half", "text", "foreign"):
        with pytest.raises(ValueError, match="is not an INT8 network written by lq, or is damaged"):
            lq.load(tmp_path / f"{name}.pt2")


def test_a_network_that_cannot_be_exported_leaves_no_file(tmp_path: Path) -> None:
    model = WithDataDependent().eval()
    lq.calibrate(lq.prepare(model, X), [X])
    with pytest.raises(ValueError, match="the network cannot be exported"):
        lq.export(lq.convert(model), tmp_path / "int8.pt2")
    assert list(tmp_path.iterdir()) == []


def tamper(int8: lq.Int8Module, name: str) -> lq.Int8Module:
    """A network of which one number, or all numbers of one kind, are not those of ``int8``."""
    other = copy.deepcopy(int8)
    with torch.no_grad():
        if name == "scale":
            other.get_buffer("conv2.weight_scale").mul_(1.1)
        elif name == "one channel's scale":
            other.get_buffer("conv2.weight_scale")[3] *= 2
        elif name == "weight":
            other.get_buffer("conv2.weight").copy_(other.get_buffer("conv2.weight").roll(1, 0))
        elif name == "bias":
            other.get_parameter("conv2.bias").data.add_(0.5)
        elif name == "last layer":
            other.get_parameter("fc.bias").data.add_(0.5)
    return other


TAMPERED = ("scale", "one channel's scale", "weight", "bias", "last layer")


@pytest.mark.parametrize("wrong", TAMPERED)
def test_a_program_that_differs_is_refused(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = residual()
    right, other = export.export_program, tamper(int8, wrong)
    monkeypatch.setattr(export, "export_program", lambda model, **kwargs: right(other, **kwargs))
    where = "in its last layer" if wrong == "last layer" else "in the layer that ends in 'bn2'"
    with pytest.raises(lq.ExportMismatchError, match=rf"the \.pt2 file differs from the INT8 network {where}"):
        lq.export(int8, tmp_path / "int8.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", TAMPERED)
def test_kernels_that_differ_are_refused(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = residual()
    other = tamper(int8, wrong)
    # The kernels' weights are those of another module.
    monkeypatch.setattr(verify, "lower", lambda graph, root, *args: lower(graph, other, *args))
    where = "in its last layer" if wrong == "last layer" else "in the layer that ends in 'bn2'"
    with pytest.raises(lq.ExportMismatchError, match=rf"INT8 kernels make of it differs from the INT8 network {where}"):
        lq.export(int8, tmp_path / "int8.pt2")


class Chaotic(nn.Module):
    """A layer that makes more of each difference than there was, in all of its depth."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.conv.weight.data.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3 * self.conv(x))


def test_what_roundings_make_is_allowed_and_no_more(tmp_path: Path) -> None:
    int8 = residual()
    # This one makes next to nothing of them.
    assert allowed_difference(int8, {"x": X}, simulated(int8, {"x": X})[0]) == OUTPUT_TOLERANCE
    torch.manual_seed(0)
    layers = [Chaotic() for _ in range(20)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    deep = lq.calibrate(lq.prepare(model.eval(), X, target="x86_avx2"), [X])
    for name in ("int8.pt2", "int8.onnx"):
        result = lq.export(deep, tmp_path / name)
        # Layers that are all right give outputs this far apart.
        assert max(found.relative_difference for found in result.verifications) > OUTPUT_TOLERANCE
        assert all(found.relative_difference < 0.7 for found in result.verifications)
    other = lq.convert(deep)
    expected = simulated(other, {"input": X})[0]
    assert 2 * OUTPUT_TOLERANCE < allowed_difference(other, {"input": X}, expected) < 1


def test_a_float_layer_in_channels_last(tmp_path: Path) -> None:
    network = Residual().to(memory_format=torch.channels_last).eval()
    first = next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    int8 = lq.convert(lq.calibrate(lq.prepare(network, X, overrides={first: None}, target="x86_avx2"), [X]))
    lq.export(int8, tmp_path / "int8.pt2")  # warnings are errors here
    assert torch.equal(lq.load(tmp_path / "int8.pt2")(X), int8(X))
