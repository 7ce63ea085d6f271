"""What an ONNX file says about its inputs and outputs, and whether it is intact."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils import _pytree as pytree

from lq.interface.metadata import KEY, Metadata, TensorSpec

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    **{f"tensor({name})": name for name in ("float16", "int64", "int32", "int16", "int8", "uint8", "bool")},
}

#: The metadata property with the checksum of the file's graph; the format itself has none.
CHECKSUM = "lq.sha256"

#: Where a tensor can lie in a file: for each message type of onnx.proto, the fields that hold messages, and which.
_FIELDS = {
    "model": {7: "graph", 14: "property", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}

#: Fields of a tensor that say that its values are in another file.
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14

#: Levels of nested subgraphs: no network has so many, but a small malicious file could.
_MAX_DEPTH = 100


def check_file(path: Path) -> None:
    """Refuse a file whose values are in other files, and one that was changed after lq wrote it.

    An engine would follow a path in the file, on this machine and with this user's rights. What cannot be read as ONNX
    is left to the engine, which says why.

    Raises:
        ValueError: where a tensor's values are elsewhere, or the graph is not the one that lq wrote.
    """
    content = memoryview(path.read_bytes())
    try:
        external = _external_tensor(content, "model", 0)
        graph = b"".join(part for number, part in _parts(content) if number == 7)
        written = dict(_property(part) for number, part in _parts(content) if number == 14).get(CHECKSUM)
    except (ValueError, IndexError, TypeError):
        return
    if external:
        raise ValueError(
            f"path={str(path)!r} keeps values in another file (external data), which lq does not follow; put them into "
            f"the file: onnx.save(onnx.load({path.name!r}), {path.name!r})"
        )
    if written is not None and written != hashlib.sha256(graph).hexdigest():
        raise ValueError(f"path={str(path)!r} is damaged: its graph is not the one that lq wrote (checksum)")


def read_properties(path: Path) -> dict[str, str]:
    """The file's metadata properties.

    Raises:
        ValueError: where it is not an ONNX file.
    """
    try:
        return dict(_property(part) for number, part in _parts(memoryview(path.read_bytes())) if number == 14)
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError("it is not an ONNX model") from error


def _external_tensor(message: memoryview, kind: str, depth: int) -> bool:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if kind == "tensor":
        return any(number == _EXTERNAL_DATA or (number == _DATA_LOCATION and part) for number, part in _parts(message))
    fields = _FIELDS.get(kind, {})
    return any(
        _external_tensor(part, fields[number], depth + 1)
        for number, part in _parts(message)
        if number in fields and isinstance(part, memoryview)
    )


def _property(message: Any) -> tuple[str, str]:
    parts = dict(_parts(message))
    return bytes(parts.get(1, b"")).decode(), bytes(parts.get(2, b"")).decode()


def _parts(message: memoryview) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: field number, and the bytes or the integer that it holds."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _number(message, at)
            yield number, value
            continue
        length = {1: 8, 5: 4}.get(wire, 0)
        if wire == 2:
            length, at = _number(message, at)
        elif not length:
            raise ValueError("not a protobuf message")
        if at + length > len(message):
            raise ValueError("ends within a field")
        yield number, message[at : at + length]
        at += length


def _number(message: memoryview, at: int) -> tuple[int, int]:
    """A varint (seven bits per byte), and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("not a varint")


def unreadable(path: Path, engine: str, error: Exception) -> ValueError:
    """The error for a file that an engine does not take."""
    reason = " ".join(str(error).split())
    return ValueError(
        f"path={str(path)!r} is not an ONNX model that {engine} can run: it is damaged, or has an opset or an operator "
        f"that this version of {engine} does not know. {engine} says: {reason}"
    )


def metadata_of(path: Path, properties: dict[str, str], inputs: list[tuple[str, str, list[Any]]]) -> Metadata:
    """The metadata lq wrote, or for an ONNX file from elsewhere what its inputs say.

    Args:
        path: the file, for error messages.
        properties: the file's metadata properties.
        inputs: name, ONNX type and shape of each input; a free size is not an integer.

    Raises:
        ValueError: where the metadata are damaged, or an input has an unsupported type.
    """
    if KEY in properties:
        try:
            return Metadata.from_json(properties[KEY])
        except ValueError as error:
            raise ValueError(f"path={str(path)!r} is damaged: {error}") from error
    for name, dtype, _ in inputs:
        if dtype not in _DTYPES:
            raise ValueError(
                f"path={str(path)!r}: its input {name!r} is a {dtype}; only {', '.join(_DTYPES)} are supported"
            )
    tensors = tuple(
        TensorSpec(name, tuple(n if isinstance(n, int) and n > 0 else None for n in shape), _DTYPES[dtype])
        for name, dtype, shape in inputs
    )
    names = tuple(spec.name for spec in tensors)
    _, in_spec = pytree.tree_flatten(names)
    return Metadata("", "", names, tensors, in_spec=pytree.treespec_dumps(in_spec))
