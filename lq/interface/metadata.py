"""What an exported file says about itself, whatever its format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lq.errors import GuardError
from lq.interface.guards import check_guards, compile_guard
from lq.interface.treespecs import load_treespec

#: Where it is stored: an entry of a `.pt2` archive, a metadata property of an ONNX model.
KEY = "lq"


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


#: What an input may be: what torch and numpy both have.
_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a network takes.

    Args:
        name: as the file calls it.
        shape: sizes of its axes, None where a size is free, such as the batch's.
        dtype: as torch calls it, ``"float32"`` or ``"uint8"``, say.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"

    def check(self, value: Tensor) -> Tensor:
        """``value`` as the network takes it: floating-point values are cast to the dtype, nothing else is.

        Raises:
            ValueError: where its shape does not fit.
            TypeError: where its dtype does not.
        """
        wanted = _DTYPES[self.dtype]
        if value.dtype is not wanted:
            if not (value.dtype.is_floating_point and wanted.is_floating_point):
                raise TypeError(f"input {self.name!r} must be {self.dtype}, got {dtype_name(value.dtype)}")
            value = value.to(wanted)
        fits = value.dim() == len(self.shape) and all(
            free is None or free == size for free, size in zip(self.shape, value.shape, strict=True)
        )
        if not fits:
            axes = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise ValueError(f"input {self.name!r} must have the shape ({axes}), got {tuple(value.shape)}")
        return value


@dataclass(frozen=True)
class Metadata:
    """What an exported file says about itself.

    Args:
        lq: version of lq that wrote it.
        target: name of the target it was converted for.
        inputs: the arguments of the network's forward, by name.
        tensors: the tensors in them, in order.
        in_spec: how the arguments nest the tensors, as torch's pytree module writes it.
        out_spec: how the forward nests the outputs, likewise; None for a flat tuple.
        labels: names of the classes, or None.
        preprocessing: what has to be done to an image first (JSON values, such as mean and std), or None.
        report: the quantization report as plain values, or None.
        guards: conditions on the sizes of the inputs beyond their shapes, see :mod:`lq.interface.guards`.
        notes: other remarks on the file, such as why a size is fixed.
        engines: those that the file is for; empty where it is for all that read it.
    """

    lq: str
    target: str
    inputs: tuple[str, ...]
    tensors: tuple[TensorSpec, ...]
    in_spec: str
    out_spec: str | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = field(default=None, repr=False)
    guards: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Metadata:
        """The metadata that :meth:`to_json` gave.

        Raises:
            ValueError: where ``text`` is not such metadata.
        """
        try:
            values = json.loads(text)
            tensors = tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in values.pop("tensors"))
            labels = values.pop("labels")
            # Files of an earlier version have none of the last three.
            values |= {name: tuple(values.get(name, ())) for name in ("inputs", "guards", "notes", "engines")}
            for guard in values["guards"]:
                compile_guard(guard)
            metadata = cls(**values, tensors=tensors, labels=None if labels is None else tuple(labels))
            if not all(name.isidentifier() and not iskeyword(name) for name in metadata.inputs):  # they become code
                raise ValueError(f"its metadata name an input that is not an argument: {', '.join(metadata.inputs)}")
            _ = metadata._specs
            return metadata
        except (KeyError, TypeError, AttributeError, GuardError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"its metadata are not lq's: {error!r}") from error

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call of the network, checked; numpy arrays become tensors.

        Raises:
            TypeError: where the arguments are not the network's, or a dtype does not fit.
            ValueError: where a shape does not fit.
        """
        if len(args) + len(kwargs) != len(self.inputs) or set(kwargs) != set(self.inputs[len(args) :]):
            raise TypeError(
                f"this network takes the inputs {', '.join(self.inputs)}; got {len(args)} positional arguments"
                f"{' and ' + ', '.join(kwargs) if kwargs else ''}"
            )
        values = (*args, *(kwargs[name] for name in self.inputs[len(args) :]))
        if len(values) == 1 and isinstance(values[0], Tensor) and len(self.tensors) == 1:
            return self.check([values[0]])  # the general case would take a tenth of a small network's time
        leaves, spec = pytree.tree_flatten(values)
        if len(leaves) != len(self.tensors):
            raise TypeError(
                f"this network takes the tensors {', '.join(spec.name for spec in self.tensors)}; got {len(leaves)} "
                f"values in its arguments"
            )
        if spec != self._specs[0]:
            raise TypeError(f"the arguments are nested as {spec}; the network was exported for {self._specs[0]}")
        return self.check([torch.as_tensor(leaf) for leaf in leaves])

    def check(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a call as the network takes them, in the order of ``tensors``.

        Raises:
            TypeError: where a dtype does not fit.
            ValueError: where a shape does not fit, or a guard does not hold.
        """
        checked = [tensor.check(value) for tensor, value in zip(self.tensors, values, strict=True)]
        if self.guards:
            check_guards(
                self.guards, {spec.name: value.shape for spec, value in zip(self.tensors, checked, strict=True)}
            )
        return checked

    def unflatten(self, outputs: Sequence[Tensor]) -> Any:
        """The outputs as the network's forward returned them."""
        spec = self._specs[1]
        if spec is None:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        return outputs[0] if spec.is_leaf() else pytree.tree_unflatten(list(outputs), spec)

    @cached_property
    def _specs(self) -> tuple[pytree.TreeSpec, pytree.TreeSpec | None]:
        out_spec = None if self.out_spec is None else load_treespec(self.out_spec)
        return load_treespec(self.in_spec), out_spec
