"""The forms of files that CIFAR10 reads, and what it says where it cannot."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from helpers.image_files import CLASSES, encode, pixels, tree, write_batches, write_folder, write_zip
from lq.data import CIFAR10, DatasetNotFoundError
from lq.data.splits import ImageData


def assert_is_the_tree(data: ImageData, tolerance: int = 0, train: int = 4, test: int = 2) -> None:
    assert data.class_names == CLASSES
    for split, name, count in ((data.train, "train", train), (data.test, "test", test)):
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        expected = np.stack([pixels(name, label, i) for label in range(3) for i in range(count)]).transpose(0, 3, 1, 2)
        assert np.abs(split.images.numpy().astype(int) - expected).max() <= tolerance
        assert split.labels.tolist() == [label for label in range(3) for _ in range(count)]


@pytest.mark.parametrize(("suffix", "tolerance"), [(".png", 0), (".jpg", 8), (".jpeg", 8), (".JPG", 8)])
@pytest.mark.parametrize("top", ["", "cifar10-images/"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_image_trees(tmp_path: Path, kind: str, top: str, suffix: str, tolerance: int) -> None:
    files = tree(suffix=suffix)
    if kind == "zip":
        source = write_zip(tmp_path / "images.zip", files, top)
    else:
        source = tmp_path / "images"
        write_folder(source / top, files)
    data = CIFAR10(str(source))
    # Known before anything is decoded, since a model is built from it.
    assert (data.class_names, data.num_classes, data.name) == (CLASSES, 3, "CIFAR-10 (images)")
    assert_is_the_tree(data.load(), tolerance)


def test_what_archivers_add_is_not_read(tmp_path: Path) -> None:
    extra = {
        "__MACOSX/train/cat/0000.png": b"",
        "train/cat/._0000.png": b"",
        "train/cat/notes.txt": b"",
        "train/README.md": b"",
        ".hidden/train/cat/0.png": b"",
        "a/b/train/cat/0.png": b"",
    }
    assert_is_the_tree(CIFAR10(str(write_zip(tmp_path / "images.zip", {**tree(), **extra}))).load())
    assert_is_the_tree(CIFAR10(str(write_folder(tmp_path / "images", {**tree(), **extra}))).load())


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    files = tree()
    files["train/cat/0000.png"] = encode(np.full((32, 32), 77, dtype=np.uint8))
    data = CIFAR10(str(write_zip(tmp_path / "images.zip", files))).load()
    assert (data.train.images[0] == 77).all()


def test_torchvision_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_batches(tmp_path, monkeypatch)
    module = CIFAR10(str(tmp_path), download=True)
    assert (module.name, module.num_classes, module.class_names[1]) == ("CIFAR-10", 10, "automobile")
    module.prepare_data()
    data = module.load()
    for split, name in ((data.train, "train"), (data.test, "test")):
        assert np.array_equal(split.images.numpy(), written[name])
        assert split.labels.tolist() == [i % 10 for i in range(20)] * (len(split) // 20)


def test_torchvision_files_that_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_batches(tmp_path, monkeypatch)
    with (tmp_path / "cifar-10-batches-py" / "test_batch").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DatasetNotFoundError, match=r"damaged cifar-10-batches-py .*corrupted"):
        CIFAR10(str(tmp_path)).setup()


def test_nothing_there(tmp_path: Path) -> None:
    path = tmp_path / "missing"
    with pytest.raises(
        DatasetNotFoundError, match=r"missing' does not exist.*\(a\).*\(b\).*\(c\).*download=True"
    ) as caught:
        CIFAR10(str(path)).setup("fit")
    assert isinstance(caught.value, FileNotFoundError)
    # A model can be built before a download has run.
    assert CIFAR10(str(path), download=True).num_classes == 10


@pytest.mark.parametrize("content", [{}, {"train/cat/0.png": b"", "test.txt": b""}])
def test_a_folder_without_both_splits(tmp_path: Path, content: dict[str, bytes]) -> None:
    with pytest.raises(DatasetNotFoundError, match="holds no data set"):
        CIFAR10(str(write_folder(tmp_path, content))).setup()


def test_a_file_that_is_no_zip(tmp_path: Path) -> None:
    (tmp_path / "images.rar").write_bytes(b"Rar!")
    with pytest.raises(DatasetNotFoundError, match=r"images\.rar' holds no data set"):
        CIFAR10(str(tmp_path / "images.rar")).setup()


def test_a_failed_download_tells_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", refuse)
    with pytest.raises(DatasetNotFoundError, match=r"downloading it failed .*no route to host"):
        CIFAR10(str(tmp_path), download=True).prepare_data()


def test_a_download_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(self: torchvision.datasets.CIFAR10) -> None:
        write_batches(Path(self.root), monkeypatch)

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fetch)
    module = CIFAR10(str(tmp_path / "new"), download=True)
    module.prepare_data()
    assert module.name == "CIFAR-10" and sum(len(y) for _, y in module.test_dataloader()) == 20


def test_images_that_are_there_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torchvision.datasets.CIFAR10, "download")
    module = CIFAR10(str(write_zip(tmp_path / "images.zip", tree())), download=True)
    module.prepare_data()
    assert module.name == "CIFAR-10 (images)"


def test_classes_must_agree(tmp_path: Path) -> None:
    files = {name: content for name, content in tree().items() if not name.startswith("test/emu")}
    files["test/fox/0.png"] = b""
    with pytest.raises(ValueError, match=r"differ in .*only in train: \['emu'\], only in test: \['fox'\]"):
        CIFAR10(str(write_folder(tmp_path, files))).setup()


def test_two_trees_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", tree())
    write_folder(tmp_path / "two", tree())
    with pytest.raises(ValueError, match="several image trees, in 'one', 'two'"):
        CIFAR10(str(tmp_path)).setup()


@pytest.mark.parametrize("content", [b"", b"not an image", encode(pixels("train", 0, 0))[:60]])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_damaged_image_is_named(tmp_path: Path, kind: str, content: bytes) -> None:
    files = {**tree(), "train/dog/0001.png": content}
    write = write_zip if kind == "zip" else write_folder
    with pytest.raises(ValueError, match=r"cannot read the image train/dog/0001.png of .*images"):
        CIFAR10(str(write(tmp_path / "images", files))).setup()


def test_a_damaged_archive_names_the_image(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images.zip", tree())
    content = bytearray(path.read_bytes())
    # Inside the pixels of the first file, where only the checksum can tell.
    content[100] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the image train/cat/0000.png .*CRC"):
        CIFAR10(str(path)).setup()


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    files = {**tree(), "test/dog/0001.png": encode(np.zeros((8, 64, 3), dtype=np.uint8))}
    with pytest.raises(ValueError, match=r"test/dog/0001.png .*it is 64x8 pixels and not 32x32"):
        CIFAR10(str(write_folder(tmp_path, files))).setup()
