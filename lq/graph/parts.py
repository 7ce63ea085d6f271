"""A module whose parts are called one by one, by code that is not a forward: all of them as one network."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

from torch import nn

#: The one argument of a :class:`PartsForward`.
PARTS = "parts"


class PartsForward:
    """Replaces a module's forward: calls each of its parts with its own arguments.

    Captured, it is a network with an input and an output for each part, which do not depend on one another. In any
    other call it runs the forward it replaces.

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

    #: The signature of a network made from it: the replaced forward plays no part in it.
    __signature__ = inspect.Signature([inspect.Parameter(PARTS, inspect.Parameter.KEYWORD_ONLY)])

    def __init__(self, module: nn.Module, paths: Iterable[str]) -> None:
        self.module = module
        self.paths = tuple(paths)
        #: A forward that the user set on the object, which runs in place of the class's.
        self.replaced = module.__dict__.get("forward")

    @staticmethod
    def is_of_parts(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether this is a call of the parts, not one of the replaced forward."""
        return not args and kwargs.keys() == {PARTS}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_of_parts(args, kwargs):
            forward = self.replaced or MethodType(type(self.module).forward, self.module)
            return forward(*args, **kwargs)
        calls = kwargs[PARTS]
        return {path: self.module.get_submodule(path)(*calls[path][0], **calls[path][1]) for path in self.paths}

    def install(self) -> None:
        """Replace the forward."""
        self.module.forward = self

    def remove(self) -> None:
        """Restore the replaced forward."""
        del self.module.forward
        if self.replaced is not None:
            self.module.forward = self.replaced
