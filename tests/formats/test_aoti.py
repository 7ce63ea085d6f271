"""AOTInductor packages: compiled here, run without Python model code."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch._inductor
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.networks import Residual, randomize_batch_norm
from helpers.quantized import noise, quantized

X = noise(8, seed=1)


@pytest.fixture(scope="module")
def network() -> lq.Int8Module:
    torch.manual_seed(0)
    return quantized(randomize_batch_norm(Residual()), X)


@pytest.fixture(scope="module")
def package(network: lq.Int8Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aoti") / "int8.pt2"
    result = lq.export(network, path, format="aoti", labels=list("abcdefghij"))
    (found,) = result.verifications
    assert found.runtime == "aoti"
    assert found.relative_difference < 0.05
    return path


def test_it_computes_what_the_network_does(network: lq.Int8Module, package: Path) -> None:
    model = lq.load(package, "aoti")
    assert model.runtime == "aoti"
    assert model.metadata is not None
    assert model.metadata.labels == tuple("abcdefghij")
    for size in (1, 3, 8):
        torch.testing.assert_close(model(X[:size].numpy()), network(X[:size]), atol=0.02, rtol=0.02)
    one = lq.load(package, "aoti", threads=1)
    torch.testing.assert_close(one(X), model(X))
    # Channels last, as a Classifier has its batches; a view into a larger batch.
    assert torch.equal(model(X.to(memory_format=torch.channels_last)), model(X))
    torch.testing.assert_close(model(X[::2]), model(X)[::2])


def test_int8_kernels_are_in_it(package: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        code = b"".join(archive.read(name) for name in archive.namelist() if name.endswith((".cpp", ".so")))
    assert code.count(b"qconv") > 0
    assert code.count(b"qlinear") > 0


class RoundedUp(nn.Module):
    """Max pools whose last windows hang over the border, as GoogLeNet and SqueezeNet have them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(F.relu(self.b(x)), (2, 3), ceil_mode=True, padding=(1, 1))
        x = F.max_pool2d(self.c(x), 2, 1, dilation=2, ceil_mode=True)  # nothing hangs over, and not all is positive
        x, _ = F.max_pool2d(self.d(x), 2, ceil_mode=True, return_indices=True)
        return x.flatten(1)


class SumsOfActivations(nn.Module):
    """Residual blocks that end with the sum and not with the activation, as EfficientNetV2's do."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 3), (8, 3), (8, 1), (8, 3))  # channels of the input, kernel
        self.layers = nn.ModuleList(nn.Conv2d(inputs, 8, k, padding=k // 2) for inputs, k in sizes)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x))
        x = x + F.silu(self.layers[1](x))
        x = F.relu(self.layers[2](x)) + x
        x = x + F.hardswish(self.layers[3](x))
        y = self.layers[1](x)
        x = (x + y * F.relu6(y + 3) / 6).mean((2, 3))  # hard-swish again, spelt out
        return self.fc(x) + F.relu(self.fc(x))


@pytest.mark.parametrize("network", [RoundedUp, SumsOfActivations])
def test_what_inductor_or_torchao_get_wrong(network: type[nn.Module], tmp_path: Path) -> None:
    int8 = quantized(network(), X)
    lq.export(int8, tmp_path / "int8.pt2", format="aoti")
    model = lq.load(tmp_path / "int8.pt2", "aoti")
    for size in (1, 8):
        torch.testing.assert_close(model(X[:size]), int8(X[:size]), atol=0.02, rtol=0.02)


def test_wrong_inputs(package: Path) -> None:
    model = lq.load(package, "aoti")
    with pytest.raises(ValueError, match=r"input 'x' must have the shape \(any, 3, 16, 16\), got \(8, 3, 20, 20\)"):
        model(torch.zeros(8, 3, 20, 20))
    with pytest.raises(TypeError, match="input 'x' must be float32, got uint8"):
        model(torch.zeros(8, 3, 16, 16, dtype=torch.uint8))


def test_it_runs_without_lq(network: lq.Int8Module, package: Path, tmp_path: Path) -> None:
    torch.save({"x": X, "y": network(X)}, tmp_path / "io.pt")
    script = """
import sys, torch, torch._inductor.codecache  # torch 2.10 does not import that itself
from torch._inductor import aoti_load_package
io = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(aoti_load_package(sys.argv[1])(io["x"]), io["y"], atol=0.02, rtol=0.02)
assert not any(name == "lq" or name.startswith("lq.") for name in sys.modules)
print("the same")
"""
    command = [sys.executable, "-c", script, str(package), str(tmp_path / "io.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip() == "the same", done.stderr


def test_damaged_packages(package: Path, tmp_path: Path) -> None:
    whole = package.read_bytes()
    (tmp_path / "half.pt2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not an INT8 network written by lq, or is damaged"):
        lq.load(tmp_path / "half.pt2", "aoti")
    content = bytearray(whole)
    content[whole.index(b"ELF") + 5000] ^= 1
    (tmp_path / "flipped.pt2").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: Bad CRC-32"):
        lq.load(tmp_path / "flipped.pt2", "aoti")
    with pytest.raises(ValueError, match="is an AOTInductor package: compiled code, which runs as it is loaded"):
        lq.load(package)
    with pytest.raises(ValueError, match="runtime='torch' does not read .* an AOTInductor package; choose 'aoti'"):
        lq.load(package, "torch")


def test_a_compiler_that_fails(network: lq.Int8Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("g++: command not found")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(lq.CompilerError, match=r"g\+\+: command not found\nIt needs a C\+\+ compiler"):
        lq.export(network, tmp_path / "int8.pt2", format="aoti")
    assert list(tmp_path.iterdir()) == []
