"""Modules that stand in for float ones, also for code that asks them for more than a forward."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_ORIGINAL = "_original"


class StandIn(nn.Module):
    """What it has not itself it takes from the module that it stands in for, as long as that lives.

    Steps of a training ask a network for more than a forward: for ``network.num_classes``, ``network.loss``, or
    ``network.predict(x)``, whose ``self(x)`` is then a call of the stand-in. A copy, or one from a file, stands in for
    nothing.
    """

    def stand_in_for(self, original: nn.Module) -> None:
        """Take attributes from ``original``, and let the parts take theirs from its parts of the same names."""
        self.__dict__[_ORIGINAL] = weakref.ref(original)
        for name, child in self.named_children():
            part = original._modules.get(name)
            if isinstance(child, StandIn) and part is not None:
                child.stand_in_for(part)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = original_of(self)
            if original is None or name.startswith(("__", "_lq")):
                raise
            try:
                of_class = inspect.getattr_static(type(original), name)
            except AttributeError:
                return getattr(original, name)
            if isinstance(of_class, property) and of_class.fget is not None:
                return of_class.fget(self)
            return MethodType(of_class, self) if isinstance(of_class, FunctionType) else getattr(original, name)

    def __getitem__(self, index: Any) -> Any:
        return _container(self)[index]

    def __len__(self) -> int:
        return len(_container(self))

    def __iter__(self) -> Iterator[Any]:
        return iter(_container(self))

    def __bool__(self) -> bool:
        return True  # not by its length

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _ORIGINAL}


def original_of(module: nn.Module) -> nn.Module | None:
    reference = module.__dict__.get(_ORIGINAL)
    return None if reference is None else reference()


def _container(module: nn.Module) -> Any:
    original = original_of(module)
    if original is None:
        raise TypeError(f"{type(module).__name__!r} object is no container")
    return original
