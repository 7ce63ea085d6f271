"""Reads ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg`` from a folder or a zip file into two tensors."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lq.data.splits import ImageData, LabeledImages

SPLITS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".png")
SIZE = 32

#: Formats that PIL may try: of its others, one is a program, and some start one.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

#: Bytes of a file that holds one image: 3 kB of pixels, and whatever a camera or a program writes beside them.
MAX_BYTES = 1 << 20

# What PIL and zipfile raise on damaged input, besides OSError: bad PNG chunks, bad CRCs, bad streams, encryption.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ImageTree:
    """The listing of a folder or zip file of images; no image has been read yet.

    Args:
        path: the folder or the zip file.
        class_names: names of the class folders, sorted.
        members: for each split, ``(file inside path, label)``, sorted.
        fingerprint: changes when a file of the tree does, as far as sizes and modification times show it.
    """

    path: Path
    class_names: tuple[str, ...]
    members: dict[str, tuple[tuple[str, int], ...]]
    fingerprint: str


def open_image_tree(path: Path) -> ImageTree | None:
    """List the images below ``path``.

    Args:
        path: a folder or a zip file that holds ``train`` and ``test``, itself or in one folder inside it.

    Returns:
        The listing, or None where ``path`` is neither a zip file nor a folder with both splits.

    Raises:
        ValueError: where several folders inside ``path`` hold splits, the splits differ in their classes, or a file is
            too large for an image of 32 by 32.
    """
    if path.is_dir():
        stamps = dict(_folder_stamps(path))
    elif zipfile.is_zipfile(path):
        stamps = dict(_zip_stamps(path))
    else:
        return None
    by_top: dict[str, list[tuple[str, str, str]]] = {}
    for name in sorted(stamps):
        *top, split, class_name, _ = name.split("/")
        by_top.setdefault("/".join(top), []).append((name, split, class_name))
    complete = {top: files for top, files in by_top.items() if {split for _, split, _ in files} == set(SPLITS)}
    if not complete:
        return None
    if len(complete) > 1:
        tops = ", ".join(repr(top or ".") for top in complete)
        raise ValueError(f"{path} holds several image trees, in {tops}: leave only one of them in it")
    (files,) = complete.values()
    class_names = _class_names(path, files)
    index = {name: label for label, name in enumerate(class_names)}
    members = {wanted: tuple((n, index[c]) for n, split, c in files if split == wanted) for wanted in SPLITS}
    fingerprint = hashlib.sha256(repr(sorted(stamps.items())).encode()).hexdigest()
    return ImageTree(path, class_names, members, fingerprint)


def read_image_tree(tree: ImageTree) -> ImageData:
    """Decode every image of a listing, as RGB.

    Raises:
        ValueError: where an image cannot be decoded or is not 32 by 32, naming its file.
    """
    if tree.path.is_dir():
        train, test = (_decode_split(tree, split, archive=None) for split in SPLITS)
    else:
        with zipfile.ZipFile(tree.path) as archive:
            train, test = (_decode_split(tree, split, archive) for split in SPLITS)
    return ImageData(train, test, tree.class_names)


def _folder_stamps(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    # Never a full walk: a mistyped folder may be the root of a disk.
    for top in (path, *sorted(p for p in path.iterdir() if p.is_dir() and not is_hidden(p.name))):
        for split in SPLITS:
            for file in (top / split).glob("*/*"):
                name = file.relative_to(path).as_posix()
                if _is_image(name):
                    stat = file.stat()
                    _check_size(path, name, stat.st_size)
                    yield name, (stat.st_size, stat.st_mtime_ns)


def _zip_stamps(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    stat = path.stat()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if _is_image(info.filename):
                _check_size(path, info.filename, info.file_size)
                yield info.filename, (info.file_size, info.CRC, stat.st_size, stat.st_mtime_ns)


def _check_size(path: Path, name: str, size: int) -> None:
    """Refuse a file before it is read: a few thousand bytes in a zip file could unpack to gigabytes."""
    if size > MAX_BYTES:
        raise ValueError(
            f"{name} of {path} has {size} bytes, and an image of {SIZE}x{SIZE} pixels at most {MAX_BYTES}; remove it"
        )


def _is_image(name: str) -> bool:
    """Whether this is ``[TOP/]{train,test}/CLASS/FILE`` with an image's suffix and not something that archivers add."""
    parts = name.split("/")
    if not 3 <= len(parts) <= 4 or parts[-3] not in SPLITS or any(is_hidden(part) for part in parts):
        return False
    return parts[-1].lower().endswith(SUFFIXES)


def is_hidden(part: str) -> bool:
    """Whether a folder or file is one that systems and archivers add."""
    return part.startswith(".") or part == "__MACOSX"


def _class_names(path: Path, files: list[tuple[str, str, str]]) -> tuple[str, ...]:
    train, test = ({name for _, split, name in files if split == wanted} for wanted in SPLITS)
    if train != test:
        raise ValueError(
            f"the classes of train and test differ in {path}: only in train: {sorted(train - test)}, only in test: "
            f"{sorted(test - train)}; every class needs a folder with images in both"
        )
    return tuple(sorted(train))


def _decode_split(tree: ImageTree, split: str, archive: zipfile.ZipFile | None) -> LabeledImages:
    members = tree.members[split]
    images = torch.empty(len(members), 3, SIZE, SIZE, dtype=torch.uint8)
    pixels = images.numpy()
    for position, (name, _) in enumerate(members):
        try:
            content = (tree.path / name).read_bytes() if archive is None else archive.read(name)
            decoded = _decode(content)
        except DECODE_ERRORS as error:
            raise ValueError(f"cannot read the image {name} of {tree.path}: {error}; repair or remove it") from error
        pixels[position] = decoded.transpose(2, 0, 1)
    return LabeledImages(images, torch.tensor([label for _, label in members], dtype=torch.int64))


def _decode(content: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """An encoded image to RGB bytes, ``(32, 32, 3)``."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        # The header tells the size, so that a huge image is refused before it is decoded.
        if image.size != (SIZE, SIZE):
            raise ValueError(f"it is {image.width}x{image.height} pixels and not {SIZE}x{SIZE}")
        return np.asarray(image.convert("RGB"))
