"""Images of any size in ``train/CLASS`` and ``val/CLASS``: checked, listed, and decoded batch by batch.

JPEG files are decoded by torchvision.io: the pixels are those of PIL, which takes 1.4 times as long, and 1.8 times with
the resizing and cropping for evaluation. (CPU time from the file to uint8 tensors; ratio of the medians of 15 rounds,
taking turns; 64 generated files of 500x375 pixels and 102 kB; one core of an AMD EPYC, torchvision 0.29, Pillow 13.)
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lq.data.image_tree import DECODE_ERRORS, FORMATS, SUFFIXES, is_hidden
from lq.data.in_memory import Batch
from lq.data.transforms import normalize
from lq.errors import DatasetNotFoundError
from lq.util.quiet import quiet

SPLITS = ("train", "val")

_LAYOUT = "It must hold train/CLASS/*.JPEG and val/CLASS/*.JPEG (or .jpg, .png)."
_JPEG = b"\xff\xd8"

#: Bytes of a file that are read into memory: ten times those of the largest photographs.
_MAX_BYTES = 1 << 30
_NAMED = 5  # classes that an error names at most; there may be a thousand


@dataclass(frozen=True, eq=False)
class ImageFolderDataset(Dataset[Batch]):
    """The images of one split; a loader of it needs ``collate_fn=ready_batch``, as for the data sets in memory.

    Images are bytes until they are a batch, which is then normalised as a whole: still in the loader's process, so that
    a batch is ready for the network.

    Args:
        folder: the split's folder.
        files: paths inside it, as bytes in the system's encoding, ``(N,)``.
        labels: int64, ``(N,)``.
        transform: maps uint8 ``(3, H, W)`` to uint8 of one size for all images.
        mean: one value per channel, for images in [0, 1].
        std: one value per channel, for images in [0, 1].
    """

    folder: Path
    files: NDArray[np.bytes_]
    labels: Tensor
    transform: Callable[[Tensor], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        images = [self.transform(decode_rgb(self.folder / os.fsdecode(self.files[index]))) for index in indices]
        return normalize(torch.stack(images), self.mean, self.std), self.labels[torch.as_tensor(indices)]


def check_image_folder(root: Path) -> tuple[str, ...]:
    """The names of the classes, sorted; looks at every class folder, but only as far as its first image.

    Raises:
        DatasetNotFoundError: where ``root`` or one of its two splits is not there.
        ValueError: where a split has no class folders, the splits differ in their classes, or a class has no image.
    """
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise DatasetNotFoundError(f"data_dir={str(root)!r} {problem}. {_LAYOUT}")
    missing = [split for split in SPLITS if not (root / split).is_dir()]
    if missing:
        entries = _some(sorted(entry.name for entry in root.iterdir()))
        raise DatasetNotFoundError(
            f"data_dir={str(root)!r} has no folder {' and no folder '.join(missing)}; it holds {entries}. {_LAYOUT}"
        )
    train, val = (_class_folders(root, split) for split in SPLITS)
    if train != val:
        raise ValueError(
            f"the classes of train and val differ in {root}: only in train: {_some(sorted(train - val))}; only in val: "
            f"{_some(sorted(val - train))}. Every class needs a folder with images in both"
        )
    names = tuple(sorted(train))
    folders = (f"{split}/{name}" for split in SPLITS for name in names)
    empty = [folder for folder in folders if next(_images(root / folder), None) is None]
    if empty:
        raise ValueError(
            f"class folders without an image in {root}: {_some(empty)}. Put {', '.join(SUFFIXES)} files into them, or "
            "remove the class from both splits"
        )
    return names


def list_images(folder: Path, class_names: Sequence[str]) -> tuple[NDArray[np.bytes_], Tensor]:
    """The images of one split, sorted: their paths inside ``folder``, and their labels, int64, both ``(N,)``."""
    files: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        images = sorted(os.fsencode(f"{name}/{image}") for image in _images(folder / name))
        files += images
        labels += [label] * len(images)
    # One array: the reference counts of a million strings would make every loader process copy them all.
    return np.array(files), torch.tensor(labels, dtype=torch.int64)


def decode_rgb(path: Path) -> Tensor:
    """Decode an image file, whatever its suffix.

    Returns:
        uint8, ``(3, H, W)``.

    Raises:
        ValueError: where it cannot be read or decoded, naming the file.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, and {_MAX_BYTES} are the most that are read")
        content = np.fromfile(path, dtype=np.uint8)
        # PIL reads a file's header, and refuses one that announces too many pixels; torchvision takes any.
        # torchvision warns on every call that its decoders are deprecated.
        with Image.open(io.BytesIO(content.data), formats=FORMATS) as image, quiet():
            # PNG files by PIL: torchvision 0.29 ends the process with a segmentation fault where one is damaged.
            if content[:2].tobytes() == _JPEG:
                return _decode_jpeg(content)
            if image.mode[0] in "IF":
                # PIL would clip larger values to 255.
                raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path}: {error}; repair or remove it") from error


def _decode_jpeg(content: NDArray[np.uint8]) -> Tensor:
    image: Tensor = torchvision.io.decode_jpeg(torch.from_numpy(content), mode=torchvision.io.ImageReadMode.RGB)
    return image


def _class_folders(root: Path, split: str) -> set[str]:
    names = {entry.name for entry in os.scandir(root / split) if entry.is_dir() and not is_hidden(entry.name)}
    if names:
        return names
    flat = sum(1 for _ in _images(root / split))
    if not flat:
        raise ValueError(f"{root / split} is empty. {_LAYOUT}")
    hint = (
        f". Where {root} holds ImageNet's archives and no folder val, torchvision.datasets.ImageNet(..., split='val') "
        "creates it with these folders"
    )
    raise ValueError(
        f"{root / split} holds {flat} images and no class folders, so that nothing tells their classes: move each of "
        f"them into {split}/CLASS, the folder of its class{hint if split == 'val' else ''}"
    )


def _images(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(SUFFIXES) and not is_hidden(entry.name):
                yield entry.name


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(names[:_NAMED]) or "nothing") + more
