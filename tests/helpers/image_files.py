"""Small data sets on disk for the tests: image trees, zip files of them, and CIFAR-10's own pickles."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image

CLASSES = ("cat", "dog", "emu")


def pixels(split: str, label: int, number: int) -> np.ndarray:
    """An image ``(32, 32, 3)`` that tells where it belongs, in flat areas so that JPEG keeps it nearly as it is."""
    image = np.full((32, 32, 3), 60 + 40 * label + 10 * number, dtype=np.uint8)
    image[16:] = (120, 110, 100) if split == "train" else (100, 110, 120)
    return image


def encode(image: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format)
    return buffer.getvalue()


def tree(train: int = 4, test: int = 2, suffix: str = ".png", classes: tuple[str, ...] = CLASSES) -> dict[str, bytes]:
    """``{file name: content}`` with so many images of every class."""
    format = "PNG" if suffix == ".png" else "JPEG"
    return {
        f"{split}/{name}/{number:04}{suffix}": encode(pixels(split, label, number), format)
        for split, count in (("train", train), ("test", test))
        for label, name in enumerate(classes)
        for number in range(count)
    }


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes], top: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(top + name, content)
    return path


class _OldDtype:
    """Pickles as the dtype of numpy 1.x under Python 2 did, about which numpy 2.4 warns."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("u1", 0, 1)


class _OldArray:
    """Pickles as an array with such a dtype."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments, _ = self.array.__reduce__()
        return rebuild, arguments, (1, self.array.shape, _OldDtype(), False, self.array.tobytes())


def write_batches(root: Path, monkeypatch: Any, per_batch: int = 20) -> dict[str, np.ndarray]:
    """A small ``cifar-10-batches-py``; torchvision is told its MD5 sums. Returns images ``(N, 3, 32, 32)`` by split."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums: dict[str, str] = {}
    written: dict[str, list[np.ndarray]] = {"train": [], "test": []}

    def dump(name: str, content: dict[str, Any]) -> None:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for name in names:
        data = rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        dump(name, {"data": _OldArray(data), "labels": [i % 10 for i in range(per_batch)]})
        written["test" if name == "test_batch" else "train"].append(data.reshape(-1, 3, 32, 32))
    meta = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    dump("batches.meta", {"label_names": meta})
    source = torchvision.datasets.CIFAR10
    monkeypatch.setattr(source, "train_list", [[name, sums[name]] for name in names[:-1]])
    monkeypatch.setattr(source, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": sums["batches.meta"]})
    return {split: np.concatenate(parts) for split, parts in written.items()}
