"""Zip archives from untrusted sources: checked before anything is unpacked, and unpacked only as far as checked."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

#: Zip containers that Python and torch read; a file that starts differently is not one.
_MAGIC = b"PK"

#: More members than any file has that lq reads: a data set of a million images.
MAX_MEMBERS = 2_000_000

_UNPACKED = (zipfile.ZIP_STORED,)
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

_ENCRYPTED = 0x1


def checked_members(
    archive: zipfile.ZipFile, *, max_bytes: int | None = None, max_members: int = MAX_MEMBERS
) -> dict[str, zipfile.ZipInfo]:
    """The files in an archive by name, folders left out.

    Args:
        archive: open for reading.
        max_bytes: what all members may unpack to together, for an archive that may be compressed; None for one whose
            members must be stored uncompressed, as torch writes them, and so cannot unpack to more than the file.
        max_members: how many there may be.

    Raises:
        ValueError: where there are more, where two have one name, where a name leads out of the archive or a member is
            a link, or where they would unpack to more.
    """
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if len(infos) > max_members:
        raise ValueError(f"it holds {len(infos)} members, and {max_members} are the most that such a file has")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename
        if name in members:
            raise ValueError(f"it holds two members of the name {name!r}")
        if info.orig_filename != name or name.startswith("/") or "\\" in name or ".." in name.split("/") or ":" in name:
            raise ValueError(f"its member {info.orig_filename!r} has a name that leads out of the archive")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(f"its member {name!r} is a symbolic link")
        if info.flag_bits & _ENCRYPTED:
            raise ValueError(f"its member {name!r} is encrypted")
        if info.compress_type not in (_UNPACKED if max_bytes is None else _PACKED):
            raise ValueError(f"its member {name!r} is compressed in a way that no such file is")
        if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
            raise ValueError(f"its member {name!r} has two sizes")
        members[name] = info
    packed = sum(info.compress_size for info in infos)
    length = _length(archive.fp)
    if packed > length:  # members that overlap
        raise ValueError(f"its members take {packed} bytes of the {length} that it has")
    unpacked = sum(info.file_size for info in infos)
    if max_bytes is not None and unpacked > max_bytes:
        raise ValueError(f"it unpacks to {unpacked} bytes, and {max_bytes} are the most that such a file has")
    return members


def read_members(file: str | Path | IO[bytes]) -> dict[str, bytes]:
    """The content of all members of an uncompressed archive, by name; every checksum is verified.

    Raises:
        ValueError: where :func:`checked_members` refuses it, or it is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return {name: archive.read(info) for name, info in checked_members(archive).items()}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError) as error:
        raise ValueError(f"it is damaged: {error}") from error


def check_torch_archive(path: Path) -> None:
    """Verify the checksums of what ``torch.save`` wrote, which ``torch.load`` ignores.

    A file that is not a zip archive, as older versions of torch wrote it, is accepted.

    Raises:
        ValueError: where it is damaged, or unpacks to more than its size; the message names the path.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return
    try:
        with zipfile.ZipFile(path) as archive:
            for info in checked_members(archive).values():
                _read_through(archive, info)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def _read_through(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    with archive.open(info) as member:
        while member.read(1 << 20):
            pass


def _length(file: IO[bytes] | None) -> int:
    assert file is not None
    position = file.tell()
    length = file.seek(0, 2)
    file.seek(position)
    return length


def names_of(members: Iterable[str]) -> tuple[str, list[str]]:
    """The one folder that all members lie in, with its ``/``, and their names in it.

    Raises:
        ValueError: where they do not lie in one.
    """
    names = list(members)
    roots = {name.partition("/")[0] for name in names if "/" in name}
    if len(roots) != 1 or not all("/" in name for name in names):
        raise ValueError("its members do not lie in one folder")
    root = f"{roots.pop()}/"
    return root, [name.removeprefix(root) for name in names]
