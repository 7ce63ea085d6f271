"""Temporary states of a module, restored on exit whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module.eval()``; each submodule's own training flag is restored on exit."""
    with keeping_modes(module):
        module.eval()
        yield


@contextmanager
def keeping_modes(module: nn.Module) -> Iterator[None]:
    """Each submodule's own training flag is restored on exit."""
    flags = {submodule: submodule.training for submodule in module.modules()}
    try:
        yield
    finally:
        for submodule, training in flags.items():
            submodule.training = training
