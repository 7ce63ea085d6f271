"""Files that belong together: at every instant all of a folder's set are old, or all are new."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lq.util.files import leftovers, staging

#: The place of the new set in a staging folder, and of the old one once they are swapped.
_NEW = "new"

#: The place of the old set in it while two renames swap them.
_OLD = "old"

# Linux, linux/fs.h and fcntl.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replaced_as_a_whole(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """A folder to write a set of files in, which replaces the set in ``folder`` when the body ends.

    Files of the set that the body does not write are gone afterwards; whatever else is in ``folder`` stays. If the body
    raises, everything stays. A process that is killed leaves the old set or the new one, and what it had staged is
    removed by the next. Where ``folder`` cannot be replaced (it is a mount point, or the folder that it is in cannot be
    written to), or holds folders, the files are replaced one by one instead: then the last of ``names`` exists only
    while all others belong to it.

    Args:
        folder: created if it does not exist.
        names: of the files in the set; the last vouches for the others.

    Raises:
        OSError: where the files cannot be written or put in place.
    """
    folder = folder.resolve()  # a link to a folder stays a link
    recover(folder, names)
    folder.mkdir(parents=True, exist_ok=True)
    beside = _is_replaceable(folder, names)
    with staging(folder.parent if beside else folder, folder.name) as stage:
        new = stage / _NEW
        new.mkdir()
        yield new
        for file in new.iterdir():
            _sync(file)
        if not (beside and _link_others(folder, new, names) and _change_places(folder, new, stage / _OLD)):
            _replace_one_by_one(folder, new, names)
            return
        _return_others(new if new.exists() else stage / _OLD, folder, names)


def recover(folder: Path, names: Collection[str]) -> None:
    """Restore a folder that a killed process had moved away, and remove what it had staged."""
    folder = folder.resolve()
    for stage in leftovers(folder.parent, folder.name):
        old = stage / _OLD
        if old.is_dir():
            if not folder.is_dir() or not any(folder.iterdir()):
                os.replace(old, folder)
            else:
                _return_others(old, folder, names)
        elif (stage / _NEW).is_dir() and folder.is_dir():
            _return_others(stage / _NEW, folder, names)
        shutil.rmtree(stage, ignore_errors=True)
    for stage in leftovers(folder, folder.name):
        shutil.rmtree(stage, ignore_errors=True)


def _is_replaceable(folder: Path, names: Collection[str]) -> bool:
    """Whether the folder can be swapped with another: files outside the set have to be linked into the other one."""
    if os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK):
        return False
    others = [entry for entry in folder.iterdir() if entry.name not in names]
    return not any(entry.is_dir() and not entry.is_symlink() for entry in others)


def _link_others(folder: Path, new: Path, names: Collection[str]) -> bool:
    """Link what is outside the set into the new folder as well; whether that succeeded."""
    try:
        for entry in folder.iterdir():
            if entry.name not in names:
                os.link(entry, new / entry.name, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without links
        for file in list(new.iterdir()):
            if file.name not in names:
                file.unlink()
        return False
    return True


def _change_places(folder: Path, new: Path, aside: Path) -> bool:
    """Put ``new`` in place of ``folder``; False if the system does not allow it."""
    shutil.copymode(folder, new)
    if _exchange(folder, new):
        return True
    try:
        folder.rename(aside)
    except OSError:  # an undetected mount point, or a folder that another program has open
        return False
    try:
        new.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    return True


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, where the system supports that."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):  # not Linux
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _return_others(old: Path, folder: Path, names: Collection[str]) -> None:
    """Move what was added to the folder while it was being swapped."""
    for entry in old.iterdir():
        if entry.name not in names and not os.path.lexists(folder / entry.name):
            with suppress(OSError):
                entry.rename(folder / entry.name)


def _replace_one_by_one(folder: Path, new: Path, names: Collection[str]) -> None:
    *others, last = names
    with staging(folder, folder.name) as inside:
        for name in names:
            if (new / name).exists():
                shutil.copyfile(new / name, inside / name)  # a mount point takes no renames from outside
        (folder / last).unlink(missing_ok=True)
        for name in (*others, last):
            if (inside / name).exists():
                os.replace(inside / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)


def _sync(file: Path) -> None:
    """A rename can reach the disk before the bytes do, which a crash of the machine would leave without content."""
    with suppress(OSError), file.open("rb") as opened:
        os.fsync(opened.fileno())
