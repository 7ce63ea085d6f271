"""Running an AOTInductor package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lq.engines.base import InferenceModel
from lq.interface.metadata import KEY, Metadata
from lq.util.cpu import torch_threads


class AotiModel(InferenceModel):
    """A network that was compiled ahead of time; it runs machine code from the file, so load only files you trust."""

    runtime = "aoti"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        # It takes a second, which the other runtimes are spared; torch 2.10 needs the first and does not import it.
        import torch._inductor.codecache  # noqa: F401
        from torch._inductor import aoti_load_package

        try:
            self._package = aoti_load_package(str(path))
            metadata = Metadata.from_json(self._package.loader.get_metadata()[KEY])  # type: ignore[attr-defined]
        except Exception as error:
            raise ValueError(
                f"path={str(path)!r} is not an AOTInductor package written by lq, is damaged, or was compiled for "
                f"another machine: {error}"
            ) from error
        super().__init__(metadata, threads)

    def _run(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad(), torch_threads(self.threads):
            # The compiled code assumes the example's memory layout and ignores strides.
            outputs = self._package.loader.run([x.contiguous() for x in inputs])  # type: ignore[attr-defined]
        return list(outputs)
