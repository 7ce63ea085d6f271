"""A module whose parts are called one by one, by code that is no forward: all of them as one network."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

from torch import nn

#: The one argument of a :class:`PartsForward`.
PARTS = "parts"


class PartsForward:
    """Stands in for a module's forward: calls each of its parts with arguments of its own.

    Captured, it is a network with an input and an output for each part, which do not depend on one another. In any
    other call it is the forward that it stands in for.

    Args:
        module: the module.
        paths: of the parts, none of which lies in another.

    Example:
        >>> import torch
        >>> net = nn.ModuleDict({"features": nn.Flatten(), "head": nn.Linear(4, 2)})
        >>> net.forward = PartsForward(net, ["features", "head"])
        >>> parts = {"features": [[torch.zeros(1, 2, 2)], {}], "head": [[torch.zeros(1, 4)], {}]}
        >>> {path: tuple(output.shape) for path, output in net(parts=parts).items()}
        {'features': (1, 4), 'head': (1, 2)}
    """

    #: How a network made of it is called: what it stands in for is no part of that.
    __signature__ = inspect.Signature([inspect.Parameter(PARTS, inspect.Parameter.KEYWORD_ONLY)])

    def __init__(self, module: nn.Module, paths: Iterable[str]) -> None:
        self.module = module
        self.paths = tuple(paths)
        #: A forward that the user put on the object, which runs in the place of the class's.
        self.replaced = module.__dict__.get("forward")

    @staticmethod
    def is_of_parts(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call is one of the parts, and not one of the forward that this stands in for."""
        return not args and kwargs.keys() == {PARTS}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_of_parts(args, kwargs):
            forward = self.replaced or MethodType(type(self.module).forward, self.module)
            return forward(*args, **kwargs)
        calls = kwargs[PARTS]
        return {path: self.module.get_submodule(path)(*calls[path][0], **calls[path][1]) for path in self.paths}

    def install(self) -> None:
        """Put it in the forward's place."""
        self.module.forward = self

    def remove(self) -> None:
        """Put back what it stands in for."""
        del self.module.forward
        if self.replaced is not None:
            self.module.forward = self.replaced
