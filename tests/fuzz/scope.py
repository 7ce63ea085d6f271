"""What an operator of the table sees while a program grows, and how it joins the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from .program import Step

Shape = tuple[int, ...]


class Scope:
    """The values there are so far, by their shapes, and the choices to be made.

    Args:
        rng: makes the choices.
        shapes: of the values, with the batch as their first axis; the last one is the newest.
        grow: makes a body of at most so many steps on a value of a shape, or None where none came about; with
            ``keep`` its last value has the shape of the first.
        depth: how many bodies this one is in.
    """

    def __init__(
        self,
        rng: Random,
        shapes: Sequence[Shape],
        grow: Callable[[Shape, int, bool, int], tuple[Step, ...] | None],
        depth: int = 0,
    ) -> None:
        self.rng = rng
        self.shapes = list(shapes)
        self.depth = depth
        self._grow = grow

    def pick(self, fits: Callable[[Shape], bool] = lambda shape: True) -> int | None:
        """A value that fits, the newest rather than an older one."""
        fitting = [index for index, shape in enumerate(self.shapes) if fits(shape)]
        if not fitting:
            return None
        if fitting[-1] == len(self.shapes) - 1 and self.rng.random() < 0.8:
            return fitting[-1]
        return self.rng.choice(fitting)

    def image(self, smallest: int = 1) -> int | None:
        """A value ``(N, C, H, W)`` with an H and a W of at least ``smallest``."""
        return self.pick(lambda shape: len(shape) == 4 and min(shape[2:]) >= smallest)

    def same(self, index: int) -> int:
        """A value of the shape of another, which it may be itself."""
        fitting = [other for other, shape in enumerate(self.shapes) if shape == self.shapes[index]]
        return self.rng.choice(fitting)

    def choice(self, *values: Any) -> Any:
        return self.rng.choice(values)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def options(self, **choices: Any) -> tuple[tuple[str, Any], ...]:
        """Keyword arguments, each there every third time: a value, or a list of those to choose from."""
        chosen = []
        for name, values in choices.items():
            if self.chance(0.33):
                chosen.append((name, self.rng.choice(values) if isinstance(values, list) else values))
        return tuple(chosen)

    def body(self, index: int, most: int = 4, keep: bool = False) -> tuple[Step, ...] | None:
        """Steps on a value, for a block."""
        return self._grow(self.shapes[index], self.rng.randint(1, most), keep, self.depth + 1)


#: A constructor that starts with this makes one layer for all calls in its class.
SHARED = "Shared:"

Propose = Callable[[Scope], Step | None]


@dataclass(frozen=True)
class Operator:
    """A row of the table: how often it is proposed, and how it makes a step, or None where no value is fit for it."""

    name: str
    weight: float
    propose: Propose


class Table:
    """Operators under their names."""

    def __init__(self) -> None:
        self.rows: dict[str, Operator] = {}

    def add(self, weight: float) -> Callable[[Propose], Propose]:
        def register(propose: Propose) -> Propose:
            self.rows[propose.__name__] = Operator(propose.__name__, weight, propose)
            return propose

        return register

    def simple(
        self, name: str, weight: float, *codes: str, rank: int | None = None, layers: Sequence[str] = ()
    ) -> None:
        """An operator of one value, of any rank or of a given one, written in one of several ways.

        Args:
            name: of the operator.
            weight: how often it is proposed.
            codes: ways to write it; see :class:`~fuzz.program.Step`.
            rank: axes that its value must have.
            layers: for each way a constructor of its ``{layer}``, or ``""``.
        """

        def propose(scope: Scope) -> Step | None:
            index = scope.pick(lambda shape: rank is None or len(shape) == rank)
            if index is None:
                return None
            way = scope.rng.randrange(len(codes))
            layer = layers[way] if layers else ""
            if not layer:
                return Step(name, (index,), codes[way])
            # One for the whole class is called by its kind, as people call it.
            role = f"{layer.split('.')[-1].split('(')[0].lower()}*" if layer.startswith(SHARED) else "layer"
            code = codes[way].replace("{layer}", f"{{{role.removesuffix('*')}}}")
            return Step(name, (index,), code, ((role, layer.removeprefix(SHARED)),))

        self.rows[name] = Operator(name, weight, propose)
