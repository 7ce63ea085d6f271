"""Code that `torch.compile` has to leave alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def never_compiled(function: F) -> F:
    """``function``, run as it is also where it is called from compiled code.

    Quantizers change state that a compiler takes for constant, and INT8 kernels are compiled already.
    """
    # Whoever compiles has imported the compiler; to import it here would take seconds.
    dynamo = sys.modules.get("torch._dynamo")
    return function if dynamo is None else dynamo.disable(function)
