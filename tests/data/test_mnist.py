"""MNIST and Fashion-MNIST from small IDX files of the tests' own, and what is said where they cannot be read."""

from __future__ import annotations

import gzip
import struct
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from lightning.pytorch import LightningModule

from helpers.small_trainer import small_trainer
from lq.data import MNIST, DatasetNotFoundError, FashionMNIST
from lq.models import Classifier, build_vgg

TRAIN, TEST = 40, 20


def idx(array: np.ndarray) -> bytes:
    """The format's description as code: two zeros, the type, the number of dimensions, their sizes, the bytes."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for prefix, count in (("train", TRAIN), ("t10k", TEST)):
        found[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        found[f"{prefix}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8)[::-1] % 10
    return found


def write(folder: Path, zipped: bool = False, **changed: bytes) -> Path:
    """All four files; a keyword such as ``train_images`` replaces the bytes of one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays().items():
        content = changed.get("_".join(name.split("-")[:2]), idx(array))
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def assert_read(data: MNIST) -> None:
    loaded, written = data.load(), arrays()
    for split, prefix, count in ((loaded.train, "train", TRAIN), (loaded.test, "t10k", TEST)):
        assert split.images.dtype == torch.uint8 and split.images.shape == (count, 1, 28, 28)
        assert np.array_equal(split.images[:, 0].numpy(), written[f"{prefix}-images-idx3-ubyte"])
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == written[f"{prefix}-labels-idx1-ubyte"].tolist()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inside", ["", "raw"])
@pytest.mark.parametrize("source", [MNIST, FashionMNIST])
def test_every_place_and_form(tmp_path: Path, source: type[MNIST], inside: str, zipped: bool) -> None:
    write(tmp_path / source.__name__ / "raw" if inside else tmp_path, zipped)
    assert_read(source(str(tmp_path)))


def test_the_same_as_torchvision_reads(tmp_path: Path) -> None:
    write(tmp_path / "MNIST" / "raw")
    loaded = MNIST(str(tmp_path)).load()
    for split, train in ((loaded.train, True), (loaded.test, False)):
        theirs = torchvision.datasets.MNIST(tmp_path, train=train)
        assert torch.equal(split.images[:, 0], theirs.data) and torch.equal(split.labels, theirs.targets)


def test_forms_may_mix_and_the_plain_file_comes_first(tmp_path: Path) -> None:
    write(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.with_name(f"{labels.name}.gz").write_bytes(b"of a download that was cut off")
    images = tmp_path / "t10k-images-idx3-ubyte"
    images.with_name(f"{images.name}.gz").write_bytes(gzip.compress(images.read_bytes()))
    images.unlink()
    assert_read(MNIST(str(tmp_path)))


def test_the_folder_of_torchvision_comes_first(tmp_path: Path) -> None:
    write(tmp_path, train_images=b"")
    write(tmp_path / "MNIST" / "raw")
    assert_read(MNIST(str(tmp_path)))
    with pytest.raises(ValueError, match="cannot read"):
        FashionMNIST(str(tmp_path)).load()


@pytest.mark.parametrize(
    ("source", "name", "first", "flip"),
    [(MNIST, "MNIST", "0", False), (FashionMNIST, "Fashion-MNIST", "T-shirt/top", True)],
)
def test_what_is_known_before_anything_is_read(source: type[MNIST], name: str, first: str, flip: bool) -> None:
    data = source("nowhere")
    assert (data.name, data.num_classes, data.input_shape) == (name, 10, (1, 28, 28))
    assert data.class_names[0] == first and data.classes == data.class_names
    assert len(data.mean) == len(data.std) == 1
    assert data.flip == flip


def test_batches_are_normalised(tmp_path: Path) -> None:
    data = MNIST(str(write(tmp_path)), batch_size=TEST)
    ((images, labels),) = data.test_dataloader()
    written = arrays()["t10k-images-idx3-ubyte"]
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images[:, 0].numpy(), (written / 255 - 0.1307) / 0.3081, atol=1e-5)
    assert labels.tolist() == arrays()["t10k-labels-idx1-ubyte"].tolist()


@pytest.mark.parametrize("source", [MNIST, FashionMNIST])
def test_clothes_are_flipped_and_digits_are_not(tmp_path: Path, source: type[MNIST]) -> None:
    # White on the left, and still there wherever a crop moves it, unless it is mirrored.
    image = np.zeros((TRAIN, 28, 28), dtype=np.uint8)
    image[:, :, 6:12] = 255
    ((images, _),) = source(str(write(tmp_path, train_images=idx(image))), batch_size=TRAIN).train_dataloader()
    left, right = images[..., :14].sum((1, 2, 3)), images[..., 14:].sum((1, 2, 3))
    mirrored = int((right > left).sum())
    assert 8 < mirrored < 32 if source is FashionMNIST else mirrored == 0


def test_splits_and_limits(tmp_path: Path) -> None:
    data = MNIST(str(write(tmp_path)), val_fraction=0.25, max_train=20, max_test=10, batch_size=10)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [sum(len(labels) for _, labels in loader) for loader in loaders] == [20, 10, 10]
    assert torch.cat([y for _, y in data.test_dataloader()]).bincount().tolist() == [1] * 10


def test_a_fit(tmp_path: Path) -> None:
    data = FashionMNIST(str(write(tmp_path / "data")), batch_size=8)
    network = build_vgg([4, "M", 8, "M"], data.num_classes, classifier="cifar", in_channels=1, hidden=8)
    trainer = small_trainer(tmp_path)
    model: LightningModule = Classifier(network, num_classes=data.num_classes)
    trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    assert metrics["test_loss"] > 0 and trainer.global_step == TRAIN // 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", r"it starts with nothing and not with 00 00 08 03"),
        (lambda content: b"<html>", r"it starts with 3c 68 74 6d and not with 00 00 08 03"),
        (lambda content: content[:9], r"it ends within its header"),
        (lambda content: content[:-1], r"its header gives the shape \(40, 28, 28\), which 31359 bytes follow"),
        (lambda content: content + b"x", r"shape \(40, 28, 28\), which 31361 bytes follow"),
        (lambda content: idx(np.zeros((0, 28, 28), np.uint8)), r"shape \(0, 28, 28\), which 0 bytes follow"),
        (lambda content: idx(np.zeros(40, np.uint8)), r"it starts with 00 00 08 01 and not with 00 00 08 03"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_damaged_file_is_named(tmp_path: Path, change: Callable[[bytes], bytes], message: str, zipped: bool) -> None:
    content = change(idx(arrays()["train-images-idx3-ubyte"]))
    with pytest.raises(ValueError, match=r"cannot read .*train-images-idx3-ubyte.*: .*" + message):
        MNIST(str(write(tmp_path, zipped, train_images=content))).setup()


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_a_damaged_archive_is_named(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path, zipped=True) / "t10k-images-idx3-ubyte.gz"
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:middle], "flipped": flipped, "text": b"<html>"}[damage])
    with pytest.raises(ValueError, match=r"cannot read .*t10k-images-idx3-ubyte.gz: it cannot be unpacked \(.*anew"):
        MNIST(str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_labels": np.zeros(39)}, r"train-images\S+ has 40 images and \S+train-labels\S+ 39 labels"),
        ({"t10k_labels": np.full(20, 26)}, r"t10k-labels\S+ has the label 26; MNIST has 0 to 9"),
        ({"t10k_images": np.zeros((20, 28, 32))}, r"t10k-images\S+ has images of 32x28 pixels and not 28x28"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, changed: dict[str, np.ndarray], message: str) -> None:
    content = {name: idx(array.astype(np.uint8)) for name, array in changed.items()}
    with pytest.raises(ValueError, match=message):
        MNIST(str(write(tmp_path, **content))).setup()


def test_nothing_there(tmp_path: Path) -> None:
    path = tmp_path / "missing"
    with pytest.raises(DatasetNotFoundError, match=r"missing' does not exist\. It must hold .* MNIST/raw .*download=T"):
        MNIST(str(path)).setup()
    path.mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"missing' holds no data set\. .*FashionMNIST\('.*', download"):
        FashionMNIST(str(path)).setup()
    (write(path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"missing' lacks t10k-labels-idx1-ubyte\."):
        MNIST(str(path)).setup()


@pytest.mark.parametrize("source", [MNIST, FashionMNIST])
def test_a_download_is_read_and_done_once(tmp_path: Path, source: type[MNIST], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(self: torchvision.datasets.MNIST) -> None:
        calls.append(self.root)
        write(Path(self.raw_folder))

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    for _ in range(2):
        data = source(str(tmp_path / "new"), download=True)
        data.prepare_data()
        assert_read(data)
    assert len(calls) == 1 and (tmp_path / "new" / source.__name__ / "raw").is_dir()


def test_a_failed_download_tells_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", refuse)
    with pytest.raises(DatasetNotFoundError, match=r"downloading it failed .*no route to host"):
        MNIST(str(tmp_path), download=True).prepare_data()


@pytest.mark.parametrize(("argument", "value"), [("batch_size", 0), ("max_train", 0), ("val_fraction", 1.0)])
def test_arguments_are_checked(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{argument}={value} must be"):
        MNIST("data", **{argument: value})
