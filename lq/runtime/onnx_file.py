"""What an ONNX file says about its inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils import _pytree as pytree

from lq.metadata import KEY, Metadata, TensorSpec

_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool"}


def unreadable(path: Path, engine: str, error: Exception) -> ValueError:
    """The error for a file that an engine does not take."""
    reason = " ".join(str(error).split())
    return ValueError(
        f"path={str(path)!r} is no ONNX model that {engine} can run: it is damaged, or of an opset or with an operator "
        f"that this version of {engine} does not know. {engine} says: {reason}"
    )


def metadata_of(path: Path, properties: dict[str, str], inputs: list[tuple[str, str, list[Any]]]) -> Metadata:
    """The metadata lq wrote, or for an ONNX file from elsewhere what its inputs say.

    Args:
        path: the file, for error messages.
        properties: the file's metadata properties.
        inputs: name, ONNX type and shape of each input; a size that is free is no integer.

    Raises:
        ValueError: where the metadata are damaged, or an input is of a type that no tensor here has.
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
