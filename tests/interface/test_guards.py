"""A file is for the sizes that it was exported for, and says so for any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.quantized import calibrated, noise
from lq.errors import GuardError
from lq.interface.guards import check_guards, compile_guard

X = noise(4, seed=1)
RUNTIMES = {"torch": "int8.pt2", "onnxruntime": "int8.onnx", "openvino": "int8.onnx"}


class Branch(nn.Module):
    """Computes something else for wide images, and for large batches."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 20:
            return x * 2
        return x if x.shape[0] < 5 else x + 1


class Branching(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.conv, self.branch, self.fc = nn.Conv2d(3, 8, 3), branch, nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.branch(F.relu(self.conv(x))).mean((2, 3)))


class Flat(nn.Module):
    """Fits images of one size: its linear layer wants 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, m, 3, stride=2, padding=1) for n, m in ((3, 8), (8, 8), (8, 64)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.fc(F.avg_pool2d(x, 4).view(x.size(0), -1))


class HardCodedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)) + torch.arange(4.0)[:, None])


def test_other_sizes_are_refused_in_a_program(tmp_path: Path) -> None:
    int8 = lq.convert(calibrated(Branching(Branch()), X))
    lq.export(int8, tmp_path / "int8.pt2")
    loaded = lq.load(tmp_path / "int8.pt2")
    assert isinstance(loaded, lq.Int8Module)
    for shape in ((4, 3, 16, 16), (1, 3, 16, 16), (2, 3, 40, 22), (3, 3, 3, 3)):
        x = torch.randn(shape)
        assert torch.equal(loaded(x), int8(x))
    for shape in ((5, 3, 16, 16), (1, 3, 16, 23)):
        for execution in ("kernels", "simulation"):
            loaded.execution = execution  # type: ignore[assignment]
            with pytest.raises(ValueError, match=rf"not for the input 'x' of the shape \({shape[0]}, 3, 16"):
                loaded(torch.randn(shape))
    # What is made of the file is for no other sizes either.
    lq.export(loaded, tmp_path / "again.pt2")
    with pytest.raises(ValueError, match=r"made for inputs with size\('x', 0\) <"):
        lq.load(tmp_path / "again.pt2")(torch.randn(5, 3, 16, 16))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_other_batches_are_refused_in_an_onnx_file(runtime: str, tmp_path: Path) -> None:
    int8 = lq.convert(calibrated(Branching(Branch()), X))
    lq.export(int8, tmp_path / "int8.onnx")
    loaded = lq.load(tmp_path / "int8.onnx", runtime)
    for size in (1, 4):
        torch.testing.assert_close(loaded(X[:size]), int8(X[:size]), atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match=r"not for the input 'x' of the shape \(5, 3, 16, 16\)"):
        loaded(torch.randn(5, 3, 16, 16))


class SingleImage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3 if x.shape[0] == 1 else x


def test_a_batch_of_one_that_is_told_apart(tmp_path: Path) -> None:
    int8 = lq.convert(calibrated(Branching(SingleImage()), X))
    lq.export(int8, tmp_path / "int8.pt2")
    loaded = lq.load(tmp_path / "int8.pt2")
    assert torch.equal(loaded(X), int8(X))
    with pytest.raises(ValueError, match=r"made for inputs with size\('x', 0\) != 1"):
        loaded(X[:1])


def test_a_network_for_one_image_size(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 32, 32)
    model = calibrated(Flat(), x)
    int8 = lq.convert(model)
    for runtime, name in RUNTIMES.items():
        lq.export(model, tmp_path / name)
        loaded = lq.load(tmp_path / name, runtime)
        torch.testing.assert_close(loaded(x[:1]), int8(x[:1]), atol=0.02, rtol=0.02)
        with pytest.raises(ValueError, match="not for the input|must have the shape"):
            loaded(torch.randn(1, 3, 64, 64))


def test_sizes_are_fixed_where_they_cannot_be_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.export.export

    def fails_for_free_images(*args: Any, dynamic_shapes: Any, **kwargs: Any) -> Any:
        if any(3 in axes for axes in dynamic_shapes):
            raise RuntimeError("\nThe inequality, Eq(64*(((x/8)//4)) - 64, 0), cannot be solved")
        return right(*args, dynamic_shapes=dynamic_shapes, **kwargs)

    monkeypatch.setattr(torch.export, "export", fails_for_free_images)
    int8 = lq.convert(calibrated(Branching(nn.Identity()), X))
    lq.export(int8, tmp_path / "int8.pt2")
    loaded = lq.load(tmp_path / "int8.pt2")
    assert loaded.metadata is not None
    assert loaded.metadata.tensors[0].shape == (None, 3, 16, 16)
    (note,) = loaded.metadata.notes
    start = "the image size is fixed, because the network cannot be exported with free ones: The inequality"
    assert note.startswith(start)
    assert torch.equal(loaded(X[:1]), int8(X[:1]))
    with pytest.raises(ValueError, match=r"input 'x' must have the shape \(any, 3, 16, 16\), got \(1, 3, 20, 16\)"):
        loaded(torch.randn(1, 3, 20, 16))


def test_a_hard_coded_batch(tmp_path: Path) -> None:
    int8 = lq.convert(calibrated(HardCodedBatch(), X))
    lq.export(int8, tmp_path / "int8.pt2")
    loaded = lq.load(tmp_path / "int8.pt2")
    assert torch.equal(loaded(X), int8(X))
    assert loaded.metadata is not None
    (note,) = loaded.metadata.notes
    expected = "the batch size of the input 'x' is fixed at 4, because the network cannot be computed with any other"
    assert note == expected
    with pytest.raises(ValueError, match=r"input 'x' must have the shape \(4, 3, any, any\), got \(2, 3, 16, 16\)"):
        loaded(X[:2])


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.fc(F.relu(self.conv(batch["image"])).mean((2, 3)) + batch["extra"])


def test_inputs_that_belong_together(tmp_path: Path) -> None:
    def arguments(images: int, others: int) -> dict[str, Any]:
        return {"batch": {"image": X[:images], "extra": torch.ones(others, 8)}}

    model = TwoInputs().eval()
    lq.calibrate(lq.prepare(model, arguments(4, 4), target="x86_avx2"), [arguments(4, 4)])
    lq.export(lq.convert(model), tmp_path / "int8.pt2")
    loaded = lq.load(tmp_path / "int8.pt2")
    assert loaded(**arguments(3, 3)).shape == (3, 10)
    assert loaded(**arguments(1, 1)).shape == (1, 10)
    with pytest.raises(ValueError, match="not for the input 'batch_image' of the shape"):
        loaded(**arguments(3, 2))


class Sized(nn.Module):
    """Computes with a size of the features, which is an expression of the image's."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 4), head

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(self.conv(x).relu()))


HEADS: dict[str, Any] = {
    "kernel": lambda x: F.avg_pool2d(x, x.size(3)).mean((2, 3)),
    "unbind": lambda x: sum(row.mean(2) for row in x.unbind(2)),
    "split": lambda x: sum(rows.mean((2, 3)) for rows in x.split(4, 2)),
    "linspace": lambda x: x.mean((2, 3)) * torch.linspace(0, 1, x.shape[2]).square().sum(),
    "window": lambda x: x.mean((2, 3)) * torch.hann_window(x.shape[2]).sum(),
    "coordinates": lambda x: (x * torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1)).mean((2, 3)),
}


@pytest.mark.parametrize("head", list(HEADS))
def test_a_size_that_a_function_of_torch_takes_as_a_number(head: str, tmp_path: Path) -> None:
    model = Sized(HEADS[head]).eval()
    lq.calibrate(lq.prepare(model, noise(2, size=32), target="x86_avx2"), [noise(4, size=32)])
    lq.export(model, tmp_path / "int8.pt2")
    for run in (lq.convert(model), lq.load(tmp_path / "int8.pt2")):
        x = noise(4, size=32, seed=5)
        with torch.no_grad():
            assert torch.allclose(torch.as_tensor(run(x)), model(x), atol=1e-2)
        for size in (24, 40):
            with pytest.raises(ValueError, match=r"size\('x', [23]\)|must have the shape"):
                run(noise(4, size=size))


@pytest.mark.parametrize(
    "pool", [lambda x: F.avg_pool2d(x, (x.size(-2), x.size(-1))), lambda x: F.avg_pool2d(x, x.shape[2:])]
)
def test_a_pooling_of_everything_takes_any_size(pool: Any, tmp_path: Path) -> None:
    model = Sized(lambda x: pool(x.clamp(min=1e-6).pow(3)).pow(1 / 3).flatten(1)).eval()
    lq.calibrate(lq.prepare(model, noise(2, size=32), target="x86_avx2"), [noise(4, size=32)])
    lq.export(model, tmp_path / "int8.pt2")
    for run in (lq.convert(model), lq.load(tmp_path / "int8.pt2")):
        for size in (32, 24, 40):
            x = noise(4, size=size, seed=5)
            with torch.no_grad():
                assert torch.allclose(torch.as_tensor(run(x)), model(x), atol=2e-2)


class Views(nn.Module):
    """Several views of each of two objects, in batches of one, along the axis that channels lie on elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        number = a[0].shape[0]
        features = self.conv(torch.cat([a[0], b[0]])).relu().mean((2, 3))
        return self.head(torch.cat([features[:number].mean(0), features[number:].mean(0)]))


class Bag(nn.Module):
    """A bag of images as a batch of one, which it takes out of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attention, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, bag: Tensor) -> Tensor:
        features = self.conv(bag.squeeze(0)).relu().mean((2, 3))
        return self.head(self.attention(features).T.softmax(1) @ features)


class Frames(nn.Module):
    """Mixes the frames of a grey film, which lie where channels do elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        number = x.shape[1]
        features = self.conv(x.reshape(-1, 1, *x.shape[2:])).relu().mean((2, 3))
        return self.head(features.view(-1, number, 8).mean(1))


def views(number: int) -> Tensor:
    return noise(number, seed=number)[None]


@pytest.mark.parametrize(
    ("model", "example", "others"),
    [
        (Views(), (views(2), views(3)), [(views(4), views(3)), (views(2), views(5)), (views(1), views(1))]),
        (Bag(), (views(4),), [(views(2),), (views(7),)]),
    ],
)
def test_numbers_of_views(model: nn.Module, example: Any, others: list[Any]) -> None:
    model.eval()
    lq.calibrate(lq.prepare(model, example, target="x86_avx2"), [example])
    int8 = lq.convert(model)
    for arguments in (example, *others):
        with torch.no_grad():
            assert torch.allclose(int8(*arguments), model(*arguments), atol=1e-2)


def test_the_second_axis_where_no_convolution_reads_it() -> None:
    model = Frames().eval()
    films = noise(4, seed=3)
    lq.calibrate(lq.prepare(model, films, target="x86_avx2"), [films])
    int8 = lq.convert(model)
    with torch.no_grad():
        assert torch.allclose(int8(films), model(films), atol=1e-2)
    with pytest.raises(ValueError, match=r"it was made for inputs with size\('x', 1\) == 3"):
        int8(films[:, :2])


def test_guards_run_nothing_but_arithmetic() -> None:
    sizes = {"x": (4, 3, 16, 20)}
    for text in (
        "size('x', 0) == 4",
        "1 < 3*size('x', 2) // 8 <= 6 and not size('x', 1) % 3 != 0",
        "max(1, -2) == abs(-1)",
    ):
        assert compile_guard(text)(sizes)
        check_guards([text], sizes)
    with pytest.raises(ValueError, match=r"with size\('x', 3\) < 20, and computes something else"):
        check_guards(["size('x', 3) < 20"], sizes)
    for text in (
        "__import__('os').getcwd()",
        "size",
        "size(x, 0)",
        "(lambda: 1)()",
        "x.y",
        "1 +",
        "2 ** 9 == 1",
        "[1]",
    ):
        with pytest.raises(GuardError):
            compile_guard(text)


class Sequences(nn.Module):
    """Features of each step of a sequence, read by linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x))).mean(1)


class Signals(Sequences):
    """The same, by convolutions over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x.transpose(1, 2))).mean(2))


@pytest.mark.parametrize("cls", [Sequences, Signals])
def test_sequences_of_any_length(cls: type[nn.Module], tmp_path: Path) -> None:
    model = cls().eval()
    x, longer = torch.randn(4, 10, 8), torch.randn(3, 17, 8)
    with torch.no_grad():
        expected = model(longer)
    lq.calibrate(lq.prepare(model, x, target="x86_avx2"), [x])
    int8 = lq.convert(model)
    lq.export(int8, tmp_path / "int8.pt2")
    for computed in (int8(longer), lq.load(tmp_path / "int8.pt2")(longer)):
        assert torch.allclose(computed, expected, atol=0.1 * float(expected.abs().max()))
