"""Keeps decoded images on disk, because decoding 60,000 small files takes much longer than reading one array."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import torch

from lq.data.image_tree import ImageTree, read_image_tree
from lq.data.splits import ImageData, LabeledImages
from lq.util.archives import checked_members
from lq.util.files import write_atomically

log = logging.getLogger(__name__)

# Incremented when what is stored, or how images are decoded, changes.
_VERSION = 1

# A damaged file can fail in the zip container (BadZipFile), in an array's header (ValueError, EOFError) or for lack of
# an array (KeyError).
_READ_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

# numpy parses an array's header with Python's ast, which in CPython 3.11 fails at random in several threads at once
# (python/cpython#106905).
_READING = threading.Lock()


def default_cache_dir() -> Path | None:
    """``$XDG_CACHE_HOME/lq`` or ``~/.cache/lq``; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "lq"
    except RuntimeError:
        return None


def read_cached(tree: ImageTree, cache_dir: Path | None) -> ImageData:
    """Decode a tree of images, or read what an earlier call decoded.

    A cache that cannot be written, or read, or that belongs to an earlier state of the source, costs only
    time. There is one file for each source, as large as the decoded images (184 MB for CIFAR-10).

    Args:
        tree: the listing of the source.
        cache_dir: folder for the file; None for no cache.

    Returns:
        The decoded images.
    """
    if cache_dir is None:
        return read_image_tree(tree)
    source = hashlib.sha256(str(tree.path.resolve()).encode()).hexdigest()[:16]
    path = cache_dir / f"{tree.path.stem}-{source}.npz"
    cached = _read(path, tree)
    if cached is not None:
        return cached
    log.info("decoding the images of %s", tree.path)
    data = read_image_tree(tree)
    _write(path, tree, data)
    return data


def _key(tree: ImageTree) -> str:
    return f"v{_VERSION} {tree.fingerprint}"


def _read(path: Path, tree: ImageTree) -> ImageData | None:
    try:
        # Zip members carry a CRC, which numpy's reader checks: a damaged array raises.
        with _READING, path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            checked_members(arrays.zip)  # stored uncompressed, so that none unpacks to more than the file
            if str(arrays["key"]) != _key(tree):
                return None
            train, test = (
                LabeledImages(torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]))
                for split in ("train", "test")
            )
            return ImageData(train, test, tree.class_names)
    except FileNotFoundError:
        return None
    except _READ_ERRORS as error:
        log.info("ignoring the unreadable cache %s: %s", path, error)
        return None


def _write(path: Path, tree: ImageTree, data: ImageData) -> None:
    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez(
                file,
                key=np.array(_key(tree)),
                train_images=data.train.images.numpy(),
                train_labels=data.train.labels.numpy(),
                test_images=data.test.images.numpy(),
                test_labels=data.test.labels.numpy(),
            )

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A reader sees the old file or the whole new one, however many processes write.
        write_atomically(path, write)
    except OSError as error:
        log.info("not caching decoded images in %s: %s", path.parent, error)
