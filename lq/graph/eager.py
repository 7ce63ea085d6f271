"""Code that `torch.compile` has to leave alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def never_compiled(function: F) -> F:
    """``function``, run uncompiled even where compiled code calls it.

    Quantizers change state that a compiler treats as constant, and INT8 kernels are compiled already.
    """
    # Code that compiles has imported the compiler; importing it here would take seconds.
    dynamo = sys.modules.get("torch._dynamo")
    return function if dynamo is None else dynamo.disable(function)
