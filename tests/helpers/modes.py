"""Post-training quantization and quantization-aware training, with one test for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def both_modes(test: Callable[..., Any]) -> Any:
    """A test with a parameter ``mode``: the two take turns among its cases, and ``--thorough`` runs each with both."""
    return pytest.mark.in_turns("mode")(pytest.mark.parametrize("mode", ["ptq", "qat"])(test))
