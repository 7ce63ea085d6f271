"""One way to call a quantized network, whichever engine runs it."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from lq.errors import MissingRuntimeError
from lq.interface.metadata import Metadata
from lq.util.distribution import install


def import_optional(package: str, title: str, extra: str) -> Any:
    """A package that comes with an extra.

    Raises:
        MissingRuntimeError: where it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingRuntimeError(f"{title} is not installed; install it with: {install(extra)}") from error


class InferenceModel(ABC):
    """A network in a file, on one engine: numpy arrays or tensors in, tensors out.

    Made by :func:`lq.load`. Inputs are passed as to the float model's forward, by position or name, and checked; the
    outputs come back in the form in which that forward returned them.

    Args:
        metadata: of the file.
        threads: how many CPU threads run it, or None for the engine's own choice.

    Attributes:
        runtime: name of the engine.
    """

    runtime: ClassVar[str]

    def __init__(self, metadata: Metadata, threads: int | None) -> None:
        self.metadata = metadata
        self.threads = threads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.metadata.unflatten(self._run(self.metadata.flatten(args, kwargs)))

    @abstractmethod
    def _run(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """The flat outputs for flat, checked inputs."""

    def __repr__(self) -> str:
        inputs = ", ".join(
            f"{spec.name}: {spec.dtype}[{', '.join('any' if n is None else str(n) for n in spec.shape)}]"
            for spec in self.metadata.tensors
        )
        return f"{type(self).__name__}({inputs}; runtime={self.runtime!r}, threads={self.threads})"
