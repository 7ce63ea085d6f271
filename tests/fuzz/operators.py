"""The operator table: everything that a program can be made of."""

from __future__ import annotations

from .layers import LAYERS
from .pointwise import POINTWISE
from .scope import Operator
from .shapes import SHAPES
from .structure import STRUCTURE

#: By name.
OPERATORS: dict[str, Operator] = {**LAYERS.rows, **POINTWISE.rows, **SHAPES.rows, **STRUCTURE.rows}
