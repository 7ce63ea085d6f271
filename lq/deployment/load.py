"""Load: a file in, a callable out, whatever the engine."""

from __future__ import annotations

import json
import zipfile
from importlib.util import find_spec
from pathlib import Path

from lq.engines.aoti import AotiModel
from lq.engines.base import InferenceModel
from lq.engines.onnxruntime import OnnxRuntimeModel
from lq.engines.openvino import OpenVinoModel
from lq.engines.program import load_program
from lq.errors import MissingRuntimeError
from lq.formats.onnx.read import check_file, read_properties
from lq.formats.pt2.read import read_program
from lq.int8.module import Int8Module
from lq.interface.metadata import KEY, Metadata
from lq.util.archives import read_members
from lq.util.distribution import install

#: The runtimes of each file format, the one that "auto" prefers first.
RUNTIMES = {"pt2": ("torch",), "aoti": ("aoti",), "onnx": ("openvino", "onnxruntime")}

_FORMATS = {"pt2": "a torch.export program", "aoti": "an AOTInductor package", "onnx": "an ONNX model"}


def file_format(path: Path) -> str:
    """``"pt2"``, ``"aoti"`` or ``"onnx"``, from the file's name and content.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is none of these.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: no such file")
    if path.suffix == ".onnx":
        return "onnx"
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"path={str(path)!r} is no INT8 network written by lq, or is damaged: it is no .onnx file and no zip "
            f"archive, which a .pt2 file is"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return "aoti" if any("aotinductor" in name for name in archive.namelist()) else "pt2"
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"path={str(path)!r} is damaged: {error}") from error


def installed_runtimes(format: str) -> tuple[str, ...]:
    """The runtimes for a file format that can be used here, the preferred one first."""
    packages = {"openvino": "openvino", "onnxruntime": "onnxruntime"}
    return tuple(name for name in RUNTIMES[format] if find_spec(packages.get(name, "torch")) is not None)


def read_metadata(path: str | Path) -> Metadata:
    """What a file says of itself, without loading the network: no code of the file runs, whatever its format.

    Args:
        path: written by :func:`lq.export`.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is damaged, or lq did not write it.
    """
    path = Path(path)
    format = file_format(path)
    try:
        if format == "pt2":
            return Metadata.from_json(read_program(path)[1])
        if format == "onnx":
            check_file(path)
            texts = [read_properties(path).get(KEY)]
        else:
            members = read_members(path)
            described = [json.loads(members[name]) for name in members if name.endswith("_metadata.json")]
            texts = [each.get(KEY) for each in described if isinstance(each, dict)]
        return Metadata.from_json(next(text for text in texts if text is not None))
    except StopIteration as error:
        raise ValueError(f"path={str(path)!r} says nothing of its inputs: lq did not write it") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path={str(path)!r} is no INT8 network written by lq, or is damaged: {error}") from error


def check_package(path: Path) -> None:
    """Verify the checksums of an AOTInductor package, which torch unpacks without a look at them.

    Raises:
        ValueError: where it is damaged.
    """
    try:
        read_members(path)
    except ValueError as error:
        raise ValueError(
            f"path={str(path)!r} is no AOTInductor package written by lq, or is damaged: {error}"
        ) from error


def load(path: str | Path, runtime: str = "auto", *, threads: int | None = None) -> InferenceModel | Int8Module:
    """Load an exported network to run it.

    A ``.pt2`` program or an ``.onnx`` file may come from anyone: nothing in it is unpickled, evaluated, imported or
    followed to another file, and its checksums are verified. An AOTInductor package is compiled code, which runs as it
    is loaded, with all that this process may do: load one that you trust, and say so with ``runtime="aoti"``.

    Args:
        path: written by :func:`lq.export`: a ``.pt2`` or an ``.onnx`` file (one from elsewhere will do as well).
        runtime: ``"torch"`` (a ``.pt2`` program, in process: an :class:`lq.Int8Module`), ``"aoti"`` (a ``.pt2``
            AOTInductor package), ``"openvino"`` or ``"onnxruntime"`` (an ``.onnx`` file); ``"auto"`` takes the one
            that reads the file, for ``.onnx`` OpenVINO where it is installed, else ONNX Runtime, and none for an
            AOTInductor package.
        threads: how many CPU threads run it, or None for the engine's own choice.

    Returns:
        A callable: numpy arrays or tensors in, tensors out, in the form of the float model's forward.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where an argument is none of its choices, the runtime does not read such a file, or the file is
            damaged or foreign.
        MissingRuntimeError: where the runtime's package is not installed; the message names the extra.
    """
    choices = [name for names in RUNTIMES.values() for name in names]
    if runtime != "auto" and runtime not in choices:
        raise ValueError(f"runtime={runtime!r} is unknown; choose one of 'auto', {', '.join(map(repr, choices))}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} must be at least 1, or None for the engine's own choice")
    path = Path(path)
    format = file_format(path)
    if runtime == "auto" and format == "aoti":
        raise ValueError(
            f"path={str(path)!r} is an AOTInductor package: compiled code, which runs as it is loaded; where you trust "
            f"it: lq.load({str(path)!r}, 'aoti')"
        )
    if runtime == "auto":
        installed = installed_runtimes(format)
        if not installed:
            raise MissingRuntimeError(
                f"path={str(path)!r}: no runtime for ONNX files is installed; install one with: "
                f"{install('openvino')} or {install('onnx')}"
            )
        runtime = installed[0]
    if runtime not in RUNTIMES[format]:
        raise ValueError(
            f"runtime={runtime!r} does not read path={str(path)!r}, which is {_FORMATS[format]}; choose "
            f"{' or '.join(map(repr, RUNTIMES[format]))}, or export the network for {runtime!r} with lq.export"
        )
    if format == "onnx":
        check_file(path)
    if runtime == "torch":
        int8 = load_program(path)
        int8.threads = threads
        return int8
    if runtime == "aoti":
        check_package(path)
        return AotiModel(path, threads)
    return OpenVinoModel(path, threads) if runtime == "openvino" else OnnxRuntimeModel(path, threads)
