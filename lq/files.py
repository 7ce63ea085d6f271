"""Writing files so that a half-written one never stands under its final name."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def ensure_writable_dir(path: Path, argument: str) -> None:
    """Make the folder ``path`` and check that files can be written into it.

    Raises:
        OSError: where that fails; the message names the argument and the path.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(
            f"{argument}={str(path)!r} cannot be written to ({error.strerror or error}); choose another folder"
        ) from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a file of the same name in a folder beside ``path``, and move the result to ``path``.

    Whatever goes wrong (a full disk, an interrupt), nothing half-written stands under the final name.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        beside = Path(folder) / path.name  # a .pt2 archive carries its own file name inside
        write(beside)
        os.replace(beside, path)


def write_archive(path: Path, write: Callable[[io.BytesIO], None]) -> None:
    """Write one of torch's zip archives, such as ``torch.save`` makes, by way of memory.

    Given a path, torch's writer does not raise on a full disk: it ends the process, and what was trained in it.

    Raises:
        OSError: where the file cannot be written.
    """
    buffer = io.BytesIO()
    write(buffer)
    path.write_bytes(buffer.getbuffer())
