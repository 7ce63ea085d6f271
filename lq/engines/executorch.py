"""Running a ``.pte`` file with ExecuTorch's Python runtime."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lq.engines.base import InferenceModel, import_optional
from lq.formats.executorch.read import read_texts
from lq.interface.metadata import KEY, Metadata
from lq.util.quiet import quiet


class _ThreadPool:
    """The threads that run every network in this process.

    ExecuTorch has one pool for all, and networks keep pointing to the pool of when they were loaded: whoever finds
    another one has to load anew.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.generation = 0
        self._own_choice: int | None = None

    def resize(self, threads: int | None) -> int:
        """Have as many threads (None: ExecuTorch's own choice). Returns the pool's generation."""
        functions = import_optional("executorch.extension.pybindings.portable_lib", "ExecuTorch", "executorch")
        current = functions._threadpool_get_thread_count()
        if self._own_choice is None:
            self._own_choice = current
        wanted = threads or self._own_choice
        if wanted != current:
            functions._unsafe_reset_threadpool(wanted)
            self.generation += 1
        return self.generation


_POOL = _ThreadPool()


def import_executorch() -> Any:
    """ExecuTorch's runtime.

    Raises:
        MissingRuntimeError: where it is not installed.
    """
    with quiet("torch.utils._pytree", "root"):
        return import_optional("executorch.runtime", "ExecuTorch", "executorch")


class ExecutorchModel(InferenceModel):
    """A network in a ``.pte`` file on ExecuTorch: XNNPACK's kernels, as on a phone.

    A file holds memory for a largest batch; larger ones are run in parts.
    """

    runtime = "executorch"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self._runtime = import_executorch().Runtime.get()
        self._path = path
        self._generation = -1
        self._method: Any = None
        try:
            text = read_texts(path).get(KEY)
            if text is None:
                raise ValueError("it does not describe its inputs: lq did not write it")
            metadata = Metadata.from_json(text)
        except ValueError as error:
            raise ValueError(f"path={str(path)!r} is no INT8 network written by lq, or is damaged: {error}") from error
        super().__init__(metadata, threads)
        with _POOL.lock:
            self._load()

    def _load(self) -> None:
        """Load the network for the threads that it is to run on, unless that was done."""
        generation = _POOL.resize(self.threads)
        if generation == self._generation:
            return
        try:
            self._program = self._runtime.load_program(self._path)  # kept: the method reads from it
            self._method = self._program.load_method("forward")
        except RuntimeError as error:
            raise ValueError(
                f"path={str(self._path)!r} is not a program that this version of ExecuTorch can run: it is damaged, or "
                f"has an operator or a backend that ExecuTorch was built without. ExecuTorch says: {error}"
            ) from error
        self._generation = generation
        # The sizes of the file's inputs are the largest that they may have.
        sizes = [self._method.metadata.input_tensor_meta(index).sizes() for index in range(len(self.metadata.tensors))]
        is_free = [bool(spec.shape) and spec.shape[0] is None for spec in self.metadata.tensors]
        self._largest = min(size[0] for size in sizes) if is_free and all(is_free) else None

    def _run(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        inputs = [x.detach().contiguous() for x in inputs]
        with _POOL.lock:
            self._load()
            if self._largest is None or len(inputs[0]) <= self._largest:
                return list(self._method.execute(inputs))
            parts = zip(*(x.split(self._largest) for x in inputs), strict=True)
            outputs = [self._method.execute(list(part)) for part in parts]
        return [torch.cat(values) for values in zip(*outputs, strict=True)]
