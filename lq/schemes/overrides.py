"""Layers that are quantized in another way than the rest of the model, or not at all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

from lq.numerics.calibrators import Calibrator, get_calibrator
from lq.numerics.quantizer import WeightRange
from lq.numerics.rounding import get_rounding
from lq.numerics.spec import QuantSpec
from lq.schemes.targets import Operator, Residual, Target


@dataclass(frozen=True)
class LayerSpec:
    """How the layers of a module differ from the target; None means as in the target.

    Args:
        weight_bits: bits of the weights, 2 to 8; stored as int8 in any case, so every engine runs them.
        activation_bits: bits of the tensors that the module makes, 2 to 8.
        calibrator: of the tensors that the module makes, see :func:`lq.calibrate`; independent of the others'.
        weight_range: what the weights' integers cover: ``"minmax"`` (the default), all values of a channel; ``"mse"``,
            so much that the rounded weights are nearest and the largest ones are clamped, which pays off with few bits
            (searched whenever the weights change: each step of QAT takes longer).
        weight_rounding: how weights are rounded: ``"nearest"`` (the default), or a name that was given to a function of
            your own, see :func:`lq.register_rounding`.

    Raises:
        ValueError: where an argument is not one of its choices.
    """

    weight_bits: int | None = None
    activation_bits: int | None = None
    calibrator: str | None = None
    weight_range: WeightRange | None = None
    weight_rounding: str | None = None

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if bits is not None and not (isinstance(bits, int) and 2 <= bits <= 8):
                raise ValueError(f"{name}={bits!r} must be a whole number from 2 to 8, or None for the target's own")
        if self.calibrator is not None:
            get_calibrator(self.calibrator)
        if self.weight_range not in (None, *get_args(WeightRange)):
            raise ValueError(f"weight_range={self.weight_range!r} is unknown; choose 'minmax' or 'mse', or None")
        if self.weight_rounding is not None:
            get_rounding(self.weight_rounding)

    def as_dict(self) -> dict[str, Any]:
        """What is set, as plain values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


#: What the user gives, by name: a spec, a mapping of its arguments (from YAML), or None for a module that stays float.
OverridesLike = Mapping[str, "LayerSpec | Mapping[str, Any] | None"]


@dataclass(frozen=True)
class Overrides:
    """Specs by the names of modules; the most specific name decides.

    A name is a path (``"layer4.0.conv1"``), which stands for everything inside that module, and each of its parts may
    be a glob (``"layer*.*.conv1"``). Of several that match, the one with more parts decides, then the one with fewer
    globs, then the longer one.

    Args:
        specs: pairs of a name and its spec; None keeps the module in float.
    """

    specs: tuple[tuple[str, LayerSpec | None], ...] = ()

    @classmethod
    def of(cls, overrides: OverridesLike | Overrides | None) -> Overrides:
        """What the user gave, checked.

        Raises:
            ValueError: where a spec has an unknown key, or a value that is not one of its choices.
            TypeError: where a spec is neither a LayerSpec, a mapping nor None.
        """
        if isinstance(overrides, Overrides):
            return overrides
        return cls(tuple((name, _spec(name, value)) for name, value in (overrides or {}).items()))

    def find(self, *names: str) -> LayerSpec | None:
        """The spec for a tensor or layer with any of ``names``; the default one if nothing matches."""
        matches: list[tuple[tuple[int, int, int, str], LayerSpec | None]] = []
        for pattern, spec in self.specs:
            if any(_matches(pattern, name) for name in names):
                parts = pattern.split(".")
                literal = sum(not any(c in part for c in "*?[") for part in parts)
                matches.append(((len(parts), literal, len(pattern), pattern), spec))
        return max(matches, key=lambda item: item[0])[1] if matches else LayerSpec()

    @property
    def calibrators(self) -> set[str]:
        """Those that any spec names."""
        return {spec.calibrator for _, spec in self.specs if spec is not None and spec.calibrator is not None}

    def in_float(self, name: str) -> bool:
        return self.find(name) is None

    def check(self, names: Iterable[str]) -> None:
        """Refuse patterns that match none of the model's ``names``.

        Raises:
            ValueError: with similar names.
        """
        known = list(dict.fromkeys(names))
        for pattern, _ in self.specs:
            if not any(_matches(pattern, name) for name in known):
                near = difflib.get_close_matches(pattern, known, n=4, cutoff=0.4) or known[:4]
                raise ValueError(
                    f"overrides: {pattern!r} matches nothing in the model; similar are {', '.join(map(repr, near))}"
                )

    def within(self, path: str, names: Iterable[str]) -> Overrides:
        """The same for a model that has the one which the patterns were written for at ``path``.

        Args:
            path: what stands before the names of that part.
            names: of the whole model's tensors and layers. A pattern that matches one of them is left as it is.
        """
        known = list(names)

        def moved(pattern: str) -> str:
            longer = f"{path}.{pattern}"
            is_whole = any(_matches(pattern, name) for name in known)
            # What its first part names is enough: the rest may be of a tensor.
            begins = f"{path}.{pattern.partition('.')[0]}"
            return longer if not is_whole and any(_matches(begins, name) for name in known) else pattern

        return Overrides(tuple((moved(pattern), spec) for pattern, spec in self.specs)) if path else self

    def as_dict(self) -> dict[str, dict[str, Any] | None]:
        """The overrides as plain values, as :meth:`of` takes them."""
        return {name: None if spec is None else spec.as_dict() for name, spec in self.specs}


@dataclass(frozen=True)
class Scheme:
    """What each tensor of a model is rounded to: as the target says, except for the overrides.

    Args:
        target: the engine family.
        overrides: what differs.
    """

    target: Target
    overrides: Overrides = Overrides()

    @property
    def residual(self) -> Residual:
        return self.target.residual

    @property
    def operators(self) -> tuple[Operator, ...]:
        return self.target.operators

    @property
    def integer_outputs(self) -> bool:
        return self.target.integer_outputs

    @property
    def integer_batch_norms(self) -> bool:
        return self.target.integer_batch_norms

    def weight(self, layer: str) -> QuantSpec:
        """The grid of a layer's weight."""
        spec = self.overrides.find(layer) or LayerSpec()
        grid = _with_bits(self.target.weight, spec.weight_bits)
        return replace(grid, rounding=spec.weight_rounding or grid.rounding)

    def weight_range(self, layer: str) -> WeightRange:
        """How the range of a layer's weight is found."""
        spec = self.overrides.find(layer) or LayerSpec()
        return spec.weight_range or "minmax"

    def activation(self, *names: str) -> QuantSpec:
        """The grid of a tensor, by its quantizer's name and that of the layer which makes it."""
        spec = self.overrides.find(*names) or LayerSpec()
        return _with_bits(self.target.activation, spec.activation_bits)

    def calibrator(self, *names: str) -> Calibrator | None:
        """A tensor's own calibrator; None for the common one."""
        spec = self.overrides.find(*names) or LayerSpec()
        return None if spec.calibrator is None else get_calibrator(spec.calibrator)


def _spec(name: str, value: Any) -> LayerSpec | None:
    if value is None or isinstance(value, LayerSpec):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(
            f"overrides: {name!r} has {value!r}; give a LayerSpec, a mapping of its arguments, or None for float"
        )
    known = [f.name for f in fields(LayerSpec)]
    for key in value:
        if key not in known:
            raise ValueError(
                f"overrides: {name!r} has an unknown key {key!r}; choose from {', '.join(map(repr, known))}"
            )
    return LayerSpec(**value)


def _matches(pattern: str, name: str) -> bool:
    """Whether ``name`` is the module that ``pattern`` names, or lies inside it."""
    wanted, parts = pattern.split("."), name.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatchcase, parts, wanted))


def _with_bits(spec: QuantSpec, bits: int | None) -> QuantSpec:
    """``spec`` with at most so many bits; one that is narrower already stays as it is."""
    if bits is None:
        return spec
    if not spec.symmetric:
        return replace(spec, quant_max=min(spec.quant_max, spec.quant_min + 2**bits - 1))
    most = min(spec.quant_max, 2 ** (bits - 1) - 1)
    is_narrow = spec.quant_min == -spec.quant_max
    return replace(spec, quant_max=most, quant_min=-most if is_narrow else max(spec.quant_min, -most - 1))
