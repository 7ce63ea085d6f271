"""Reads IDX, the format of MNIST's files: a header that gives type and shape, and the bytes of one array."""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import torch
from torch import Tensor

# The third byte of a file; MNIST and its successors have no other type (http://yann.lecun.com/exdb/mnist).
_UNSIGNED_BYTE = 0x08

#: More than any data set in MNIST's format has: EMNIST, with 814,255 images, has 638 million bytes.
MAX_BYTES = 1 << 30

#: Bytes read beyond what the header says, to see that there are none.
_SURPLUS = 64


def find_idx(folder: Path, name: str) -> Path | None:
    """``folder/name`` or ``folder/name.gz``, whichever is there; the first where both are."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an IDX file of bytes.

    Args:
        path: the file; one that ends in ``.gz`` is unpacked.
        dimensions: how many dimensions the array must have.

    Returns:
        The array, uint8.

    Raises:
        ValueError: where the file cannot be unpacked, is not an IDX file of bytes with so many dimensions, or is longer
            or shorter than its header says; names the file.
    """
    header = 4 * (1 + dimensions)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(header)
            shape = struct.unpack(f">{dimensions}I", content[4:]) if len(content) == header else ()
            # No more is unpacked than the header announces, however small the file is.
            content += file.read(min(prod(shape), MAX_BYTES) + _SURPLUS)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, f"it cannot be unpacked ({error})") from error
    magic = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if content[:4] != magic:
        start = content[:4].hex(" ") or "nothing"
        raise _damaged(path, f"it starts with {start} and not with {magic.hex(' ')}")
    if not shape:
        raise _damaged(path, "it ends within its header")
    if prod(shape) > MAX_BYTES:
        raise _damaged(path, f"its header gives the shape {shape}, and {MAX_BYTES} bytes are the most that are read")
    if len(content) != header + prod(shape) or 0 in shape:
        more = "or more " if len(content) == header + prod(shape) + _SURPLUS else ""
        raise _damaged(path, f"its header gives the shape {shape}, which {len(content) - header} {more}bytes follow")
    # A copy that may be written to: frombuffer of bytes shares memory that may not.
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).view(shape)


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(f"cannot read {path}: {problem}; fetch the file anew")
