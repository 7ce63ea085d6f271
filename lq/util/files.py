"""Writing files so that an incomplete one never stands under its final name."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

#: Held by the process that writes into a staging folder; the system releases it however that process ends.
_LOCK = ".lock"

#: Where locks are not available, a staging folder counts as abandoned after so many seconds.
_DEAD_AFTER = 24 * 3600


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

    Whatever goes wrong (a full disk, an interrupt), nothing incomplete stands under the final name. Where ``path`` is
    a symbolic link, the link is replaced, and its target stays as it is.
    """
    with staging(path.parent, path.name) as folder:
        beside = folder / path.name  # a .pt2 archive carries its own file name inside
        write(beside)
        os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file as :func:`write_atomically` does."""

    def write(beside: Path) -> None:
        beside.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_archive(path: Path, write: Callable[[io.BytesIO], None]) -> None:
    """Write one of torch's zip archives, such as ``torch.save`` makes, through memory.

    Given a path, torch's writer does not raise on a full disk: it ends the process, and the training is lost.

    Raises:
        OSError: where the file cannot be written.
    """
    buffer = io.BytesIO()
    write(buffer)
    path.write_bytes(buffer.getbuffer())


@contextmanager
def staging(parent: Path, name: str) -> Iterator[Path]:
    """A temporary folder in ``parent`` to write ``name`` in before it is moved into place.

    Folders that killed processes left there are removed first.

    Raises:
        OSError: where no folder can be created in ``parent``.
    """
    remove_leftovers(parent, name)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=parent))
    lock = _lock(folder)
    try:
        yield folder
    finally:
        if lock is not None:
            lock.close()
        shutil.rmtree(folder, ignore_errors=True)


def leftovers(parent: Path, name: str) -> Iterator[Path]:
    """Staging folders of ``name`` whose processes are dead."""
    prefix = _prefix(name)
    with suppress(OSError):
        for folder in sorted(parent.iterdir()):
            if folder.name.startswith(prefix) and folder.is_dir() and not folder.is_symlink() and _is_dead(folder):
                yield folder


def remove_leftovers(parent: Path, name: str) -> None:
    """Remove the staging folders of ``name`` that killed processes left."""
    for folder in leftovers(parent, name):
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(name: str) -> str:
    return f".{name}.lq-"


def _lock(folder: Path) -> IO[Any] | None:
    """The open, locked file that shows that this process is alive; None where the system has no such locks."""
    if fcntl is None:
        return None
    unlocked = folder / f"{_LOCK}.new"
    file = unlocked.open("wb")
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(folder / _LOCK)  # only now, or another process could see it unlocked
        return file
    file.close()
    return None


def _is_dead(folder: Path) -> bool:
    try:
        if fcntl is None:
            return time.time() - folder.stat().st_mtime > _DEAD_AFTER
        with (folder / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:
        # Killed before it could lock, or about to lock: its age distinguishes the two.
        with suppress(OSError):
            return time.time() - folder.stat().st_mtime > 60
        return False
    except OSError:
        return False
