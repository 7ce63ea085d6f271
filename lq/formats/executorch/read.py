"""What a ``.pte`` file says of itself, read as bytes: nothing in it runs, and ExecuTorch need not be installed.

A ``.pte`` file is a flatbuffer, with what the kernels are given in segments after it. Where its fields are stands in
ExecuTorch's ``schema/program.fbs``, and the header in its ``docs/source/pte-file-format.md``.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

#: Names of the methods that return the metadata and the checksum of the rest of the file: ``.pte`` has no fields for
#: these, and an app reads a method without inputs as easily (``module.execute("lq")``).
CHECKSUM = "lq_sha256"

#: What stands in the place of the checksum while it is computed.
NO_CHECKSUM = "0" * hashlib.sha256().digest_size * 2

_MAGIC, _HEADER_MAGIC = b"ET", b"eh00"

#: Places of fields in their tables.
_PLANS, _PLAN_NAME, _PLAN_VALUES, _VALUE_TYPE, _VALUE, _STRING = 1, 0, 2, 0, 1, 0

#: Which of the types of a value is a string.
_IS_STRING = 6


class _Flatbuffer:
    """Tables, vectors and strings of a flatbuffer. What lies outside of it is a ValueError."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def number(self, code: str, at: int) -> int:
        if at < 0:
            raise ValueError("it points to before its beginning")
        try:
            (number,) = struct.unpack_from(f"<{code}", self.content, at)
        except struct.error as error:
            raise ValueError("it ends too early") from error
        return int(number)

    def follow(self, at: int) -> int:
        """Where an offset leads to."""
        return at + self.number("I", at)

    def field(self, table: int, index: int) -> int | None:
        """Where a table has a field; None where it has none."""
        vtable = table - self.number("i", table)
        if 4 + 2 * index >= self.number("H", vtable):
            return None
        offset = self.number("H", vtable + 4 + 2 * index)
        return table + offset if offset else None

    def tables(self, table: int, index: int) -> Iterator[int]:
        """The tables in a field that is a vector of them."""
        at = self.field(table, index)
        if at is None:
            return
        vector = self.follow(at)
        for item in range(self.number("I", vector)):
            yield self.follow(vector + 4 + 4 * item)

    def string(self, table: int, index: int) -> slice | None:
        """Where the bytes of a field that is a string are."""
        at = self.field(table, index)
        if at is None:
            return None
        start = self.follow(at)
        stop = start + 4 + self.number("I", start)
        if stop > len(self.content):
            raise ValueError("it ends within a text")
        return slice(start + 4, stop)


def _texts(content: bytes) -> dict[str, slice]:
    """The methods of a file that return a text, and where the bytes of that text are."""
    if content[4:6] != _MAGIC:
        raise ValueError("it is not an ExecuTorch program")
    buffer = _Flatbuffer(content)
    _check_length(buffer)
    texts: dict[str, slice] = {}
    for plan in buffer.tables(buffer.follow(0), _PLANS):
        name = buffer.string(plan, _PLAN_NAME)
        values = list(islice(buffer.tables(plan, _PLAN_VALUES), 2))
        if name is None or len(values) != 1:
            continue
        kind, value = buffer.field(values[0], _VALUE_TYPE), buffer.field(values[0], _VALUE)
        if kind is None or value is None or buffer.number("B", kind) != _IS_STRING:
            continue
        text = buffer.string(buffer.follow(value), _STRING)
        if text is not None:
            texts[content[name].decode()] = text
    return texts


def _check_length(buffer: _Flatbuffer) -> None:
    content = buffer.content
    if content[8:12] != _HEADER_MAGIC:
        return
    has_segment_size = buffer.number("I", 12) >= 32
    program, segments = buffer.number("Q", 16), buffer.number("Q", 24)
    wanted = max(program, segments + (buffer.number("Q", 32) if has_segment_size else 0))
    if len(content) < wanted:
        raise ValueError(f"it has {len(content)} bytes, and its header says {wanted}")


def read_texts(path: Path) -> dict[str, str]:
    """The texts that a file's methods return, by the method's name.

    Raises:
        ValueError: where it is not an ExecuTorch program, or is cut off.
    """
    content = path.read_bytes()
    return {name: content[place].decode() for name, place in _texts(content).items()}


def with_checksum(content: bytes) -> bytes:
    """A file in which :data:`NO_CHECKSUM` stands, with its checksum in that place."""
    place = _texts(content)[CHECKSUM]
    return content[: place.start] + _checksum(content, place).encode() + content[place.stop :]


def check_file(path: Path) -> None:
    """Refuse a file that was changed after lq wrote it.

    Raises:
        ValueError: where its content is not what lq wrote, or it is not an ExecuTorch program.
    """
    content = path.read_bytes()
    try:
        place = _texts(content).get(CHECKSUM)
    except ValueError as error:
        raise ValueError(f"path={str(path)!r} is not an ExecuTorch program, or is damaged: {error}") from error
    if place is not None and content[place].decode(errors="replace") != _checksum(content, place):
        raise ValueError(f"path={str(path)!r} is damaged: its content is not what lq wrote (checksum)")


def _checksum(content: bytes, place: slice) -> str:
    return hashlib.sha256(content[: place.start] + NO_CHECKSUM.encode() + content[place.stop :]).hexdigest()
