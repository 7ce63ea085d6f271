"""Decoded images are kept on disk, and a cache that is old, damaged or impossible does no harm."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import lq.data.cache
from helpers.image_files import encode, pixels, tree, write_folder, write_zip
from lq.data import CIFAR10
from lq.data.splits import ImageData


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one for every time that images are decoded."""
    calls: list[str] = []
    original = lq.data.cache.read_image_tree

    def read(source: lq.data.cache.ImageTree) -> ImageData:
        calls.append(str(source.path))
        return original(source)

    monkeypatch.setattr(lq.data.cache, "read_image_tree", read)
    return calls


def assert_equal(one: ImageData, two: ImageData) -> None:
    assert one.class_names == two.class_names
    for a, b in ((one.train, two.train), (one.test, two.test)):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_decoded_once(tmp_path: Path, kind: str, decoded: list[str], private_cache: Path) -> None:
    write = write_zip if kind == "zip" else write_folder
    source = str(write(tmp_path / "images", tree()))
    first, second = CIFAR10(source).load(), CIFAR10(source).load()
    assert len(decoded) == 1
    assert_equal(first, second)
    # One whole file and nothing left over from writing it.
    assert [path.suffix for path in private_cache.iterdir()] == [".npz"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_changed_source_is_decoded_again(tmp_path: Path, kind: str, decoded: list[str], private_cache: Path) -> None:
    write = write_zip if kind == "zip" else write_folder
    source = write(tmp_path / "images", tree())
    CIFAR10(str(source)).load()
    write(source, {**tree(), "train/cat/0000.png": encode(pixels("train", 0, 17))})
    assert CIFAR10(str(source)).load().train.images[0, 1, 0, 0] == 230
    assert len(decoded) == 2 and len(list(private_cache.iterdir())) == 1


def test_a_new_time_is_enough_to_decode_again(tmp_path: Path, decoded: list[str]) -> None:
    source = write_zip(tmp_path / "images.zip", tree())
    CIFAR10(str(source)).load()
    os.utime(source, ns=(1, 1))
    CIFAR10(str(source)).load()
    assert len(decoded) == 2


@pytest.mark.parametrize("damage", ["empty", "text", "half", "flipped", "pickle", "no arrays"])
def test_a_damaged_cache_is_ignored_and_replaced(
    tmp_path: Path, damage: str, decoded: list[str], private_cache: Path
) -> None:
    source = str(write_zip(tmp_path / "images.zip", tree()))
    first = CIFAR10(source).load()
    (cache,) = private_cache.iterdir()
    content = cache.read_bytes()
    if damage == "pickle":
        np.savez(cache, key=np.array([object()], dtype=object))
    elif damage == "no arrays":
        np.savez(cache, key=np.load(cache)["key"])
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        cache.write_bytes({"empty": b"", "text": b"hello", "half": content[:middle], "flipped": flipped}[damage])
    assert_equal(CIFAR10(source).load(), first)
    assert len(decoded) == 2
    CIFAR10(source).load()
    assert len(decoded) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, decoded: list[str]) -> None:
    source = str(write_zip(tmp_path / "images.zip", tree()))
    (tmp_path / "file").write_bytes(b"")
    for _ in range(2):
        CIFAR10(source, cache_dir=str(tmp_path / "file" / "below")).load()
    assert len(decoded) == 2


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Path) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    CIFAR10(str(write_zip(tmp_path / "images.zip", tree()))).load()
    assert list(private_cache.iterdir()) == []


def test_cache_dir_is_where_the_user_says(tmp_path: Path, private_cache: Path) -> None:
    CIFAR10(str(write_zip(tmp_path / "images.zip", tree())), cache_dir=str(tmp_path / "here")).load()
    assert len(list((tmp_path / "here").iterdir())) == 1 and not private_cache.exists()


def test_sources_of_one_name_do_not_share(tmp_path: Path, decoded: list[str]) -> None:
    one = write_zip(write_folder(tmp_path / "a", {"x": b""}) / "images.zip", tree(train=1))
    two = write_zip(write_folder(tmp_path / "b", {"x": b""}) / "images.zip", tree(train=2))
    sizes = [len(CIFAR10(str(path)).load().train) for path in (one, two, one, two)]
    assert sizes == [3, 6, 3, 6] and len(decoded) == 2


def test_a_user_without_a_home_has_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    source = str(write_zip(tmp_path / "images.zip", tree()))
    for _ in range(2):
        CIFAR10(source).load()
    assert len(decoded) == 2


def test_many_writers_at_once(tmp_path: Path, private_cache: Path) -> None:
    source = str(write_zip(tmp_path / "images.zip", tree()))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: CIFAR10(source).load(), range(16)))
    for result in results:
        assert_equal(result, results[0])
    assert len(list(private_cache.iterdir())) == 1
