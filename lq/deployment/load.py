"""Load: a file in, a callable out, whatever the engine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lq.deployment.formats import RUNTIMES, Format, Runtime, format_of
from lq.engines.base import InferenceModel
from lq.errors import MissingRuntimeError
from lq.int8.module import Int8Module
from lq.interface.metadata import Metadata
from lq.util.distribution import install


def load(path: str | Path, runtime: str = "auto", *, threads: int | None = None) -> InferenceModel | Int8Module:
    """Load an exported network to run it.

    A ``.pt2`` program or an ``.onnx`` file may come from anyone: nothing in it is unpickled, evaluated, imported or
    followed to another file, and its checksums are verified; so it is with a ``.pte`` file, as far as ExecuTorch's own
    checks of a program go. An AOTInductor package is compiled code, which runs as it
    is loaded, with all that this process may do: load one that you trust, and say so with ``runtime="aoti"``.

    Args:
        path: written by :func:`lq.export`: a ``.pt2``, an ``.onnx`` (one from elsewhere will do as well) or a ``.pte``
            file.
        runtime: ``"torch"`` (a ``.pt2`` program, in process: an :class:`lq.Int8Module`), ``"aoti"`` (a ``.pt2``
            AOTInductor package), ``"openvino"`` or ``"onnxruntime"`` (an ``.onnx`` file), ``"executorch"`` (a ``.pte``
            file; its threads are those of all such networks in the process); ``"auto"`` takes the one
            that reads the file, for ``.onnx`` OpenVINO where it is installed, reads it and computes it right, else ONNX
            Runtime, and never takes an AOTInductor package. A file that is for one engine alone is run by that one.
        threads: how many CPU threads run it, or None for the engine's own choice.

    Returns:
        A callable: numpy arrays or tensors in, tensors out, in the form of the float model's forward.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where an argument is not one of its choices, the runtime does not read such a file, or the file is
            damaged or foreign.
        MissingRuntimeError: where the runtime's package is not installed; the message names the extra.
    """
    if runtime != "auto" and runtime not in RUNTIMES:
        raise ValueError(f"runtime={runtime!r} is unknown; choose one of 'auto', {', '.join(map(repr, RUNTIMES))}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} must be at least 1, or None for the engine's own choice")
    path = Path(path)
    format = format_of(path)
    known = None if runtime == "auto" else _reader(path, format, runtime)
    if known is None:
        _check_harmless(path, format)
    if format.check is not None:
        format.check(path)
    engines = _engines(path, format)
    if known is not None and engines and known.name not in engines:
        raise ValueError(
            f"path={str(path)!r} is for {' and '.join(map(repr, engines))}: runtime={runtime!r} computes something "
            f"else of it, or was not tried when it was written"
        )
    *others, last = _installed(path, format, engines) if known is None else (known,)
    for other in others:
        # It refuses what it is known to compute wrongly, and may not have all of the operators.
        with suppress(Exception):
            return other.load(path, threads)
    return last.load(path, threads)


def _engines(path: Path, format: Format) -> tuple[str, ...]:
    """Names of the engines that a file says it is for; empty where it does not say so."""
    if len(format.runtimes) == 1:
        return ()
    with suppress(ValueError, RecursionError):  # the engine says what is wrong with it
        text = format.read(path)
        return () if text is None else Metadata.from_json(text).engines
    return ()


def _reader(path: Path, format: Format, name: str) -> Runtime:
    runtime = format.runtime(name)
    if runtime is None:
        raise ValueError(
            f"runtime={name!r} does not read path={str(path)!r}, which is {format.description}; choose "
            f"{' or '.join(repr(runtime.name) for runtime in format.runtimes)}, or export the network for {name!r} "
            f"with lq.export"
        )
    return runtime


def _check_harmless(path: Path, format: Format) -> None:
    first = format.runtimes[0]
    if first.runs_code:
        raise ValueError(
            f"path={str(path)!r} is {format.description}: compiled code, which runs as it is loaded; where you trust "
            f"it: lq.load({str(path)!r}, {first.name!r})"
        )


def _installed(path: Path, format: Format, engines: tuple[str, ...]) -> list[Runtime]:
    """The engines that "auto" tries for a file, the best one first."""
    suitable = [runtime for runtime in format.runtimes if not engines or runtime.name in engines]
    installed = [runtime for runtime in suitable if runtime.is_installed]
    if not installed:
        raise MissingRuntimeError(
            f"path={str(path)!r} is {format.description}, and no runtime for it is installed; install one with: "
            f"{' or '.join(install(runtime.extra) for runtime in suitable)}"
        )
    return installed
