"""The table of file formats: what writes each, which engines run it, and how it is read without running it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.export import ExportedProgram

from lq.deployment.verify import QuantizedTensor, check_onnx
from lq.engines.aoti import AotiModel
from lq.engines.base import InferenceModel
from lq.engines.executorch import ExecutorchModel, import_executorch
from lq.engines.onnxruntime import OnnxRuntimeModel, import_onnxruntime
from lq.engines.openvino import OpenVinoModel
from lq.engines.program import load_program
from lq.formats.aoti.write import (
    check_compiler,
    for_inductor,
    for_this_cpu,
    write_package,
)
from lq.formats.executorch.read import check_file as check_pte
from lq.formats.executorch.read import read_texts
from lq.formats.executorch.write import import_exir, write_pte
from lq.formats.onnx.read import check_file, read_properties
from lq.formats.onnx.write import import_onnx, to_onnx, write_onnx
from lq.formats.pt2.read import read_program
from lq.formats.pt2.write import examples, write_program
from lq.graph.cropping import crop_kernels
from lq.int8.module import Int8Module
from lq.interface.metadata import KEY, Metadata
from lq.schemes.targets import ONNXRUNTIME, XNNPACK, Target
from lq.util.archives import read_members

FormatName = Literal["pt2", "aoti", "onnx", "onnxruntime", "executorch"]


@dataclass(frozen=True)
class Draft:
    """What is written.

    Args:
        program: the network, exported.
        metadata: what the file says of itself.
        tensors: a name for the output of each of its quantize nodes.
        opset: version of the ONNX operator set.
    """

    program: ExportedProgram
    metadata: Metadata
    tensors: list[str]
    opset: int


@dataclass(frozen=True)
class Runtime:
    """An engine that runs files.

    Args:
        name: what :func:`lq.load` calls it.
        load: a file and a number of threads (None: the engine's own choice) to the network.
        package: the one it needs.
        extra: of lq that installs it.
        runs_code: whether loading a file runs code that is in it, so that the user has to name the engine.
    """

    name: str
    load: Callable[[Path, int | None], InferenceModel | Int8Module]
    package: str = "torch"
    extra: str = ""
    runs_code: bool = False

    @property
    def is_installed(self) -> bool:
        return find_spec(self.package) is not None


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Args:
        name: what :func:`lq.export` calls it.
        description: in words, with an article.
        suffix: what its files' names end in.
        file: what the callback calls its file.
        runtimes: the engines that run it, the preferred one first.
        matches: whether a file with this suffix is of this format.
        check: verifies a file's checksums, where reading it does not. Raises ValueError where it is damaged.
        read: the text of a file's metadata, or None; no code of the file runs.
        write: the draft, to a path.
        check_dependencies: raises where something is missing that writing (or, if asked for, verifying) needs.
        adapt: gives the INT8 network as this format's engines compute it; the file is compared with that.
        layout: that network as it is written: its weights laid out or cut for the example's image size.
        check_layers: a file, its draft, what the simulation quantizes, its outputs and the flat inputs: raises where a
            layer computes something else. None where the engine shows no layers.
        free_sizes: whether it takes images of any size that the network takes.
        packages: that have to be there for the callback to write it unasked; None where it never does.
        takes_long: writing it takes a compiler tens of seconds: the rehearsal leaves it out.
        placed: the model's target, placing quantizers as this format's engines want them; None: as it is, so that the
            INT8 module itself is written.
        float_outputs: whether its engines take numbers from INT8 kernels that are not rounded to integers again, so
            that the network's results are left as they are, whatever the target.
    """

    name: FormatName
    description: str
    suffix: str
    file: str
    runtimes: tuple[Runtime, ...]
    matches: Callable[[Path], bool]
    read: Callable[[Path], str | None]
    write: Callable[[Draft, Path], None]
    check: Callable[[Path], None] | None = None
    check_dependencies: Callable[[bool], None] = lambda verify: None
    adapt: Callable[[Int8Module], Int8Module] = lambda int8: int8
    layout: Callable[[Int8Module], Int8Module] = lambda int8: int8
    check_layers: Callable[[Path, Draft, list[QuantizedTensor], Any, list[Tensor]], None] | None = None
    free_sizes: bool = False
    packages: tuple[str, ...] | None = None
    takes_long: bool = False
    placed: Callable[[Target], Target] | None = None
    float_outputs: bool = False

    def installed_runtimes(self) -> tuple[str, ...]:
        """Names of the engines that can be used here, the preferred one first."""
        return tuple(runtime.name for runtime in self.runtimes if runtime.is_installed)

    def runtime(self, name: str) -> Runtime | None:
        return next((runtime for runtime in self.runtimes if runtime.name == name), None)


def _load_program(path: Path, threads: int | None) -> Int8Module:
    int8 = load_program(path)
    int8.threads = threads
    return int8


def _is_compiled(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any("aotinductor" in name for name in archive.namelist())


def _read_package(path: Path) -> str | None:
    members = read_members(path)
    described = [json.loads(members[name]) for name in members if name.endswith("_metadata.json")]
    return next((each[KEY] for each in described if isinstance(each, dict) and KEY in each), None)


def _check_package(path: Path) -> None:
    # torch unpacks it without checking the checksums.
    try:
        read_members(path)
    except ValueError as error:
        raise ValueError(
            f"path={str(path)!r} is no AOTInductor package written by lq, or is damaged: {error}"
        ) from error


def _read_onnx(path: Path) -> str | None:
    check_file(path)
    return read_properties(path).get(KEY)


def _write_onnx(draft: Draft, path: Path) -> None:
    # TensorRT refuses to dequantize 32-bit integers, and quantizes the biases itself.
    int32_bias = draft.metadata.target != "tensorrt"
    write_onnx(to_onnx(draft.program, draft.tensors, draft.metadata, opset=draft.opset, int32_bias=int32_bias), path)


def _check_onnx_dependencies(verify: bool) -> None:
    import_onnx()
    if verify:
        import_onnxruntime()


def _check_onnx_layers(
    path: Path, draft: Draft, quantized: list[QuantizedTensor], outputs: Any, inputs: list[Tensor]
) -> None:
    check_onnx(import_onnx().load(path), draft.tensors, quantized, outputs, inputs)


def _check_executorch_dependencies(verify: bool) -> None:
    import_exir()
    if verify:
        import_executorch()


def _cropped(int8: Int8Module) -> Int8Module:
    return crop_kernels(int8, examples(int8))


_ONNX = Format(
    name="onnx",
    description="an ONNX model",
    suffix=".onnx",
    file="int8.onnx",
    runtimes=(
        Runtime("openvino", OpenVinoModel, package="openvino", extra="openvino"),
        Runtime("onnxruntime", OnnxRuntimeModel, package="onnxruntime", extra="onnx"),
    ),
    matches=lambda path: True,
    check=check_file,
    read=_read_onnx,
    write=_write_onnx,
    check_dependencies=_check_onnx_dependencies,
    layout=_cropped,
    check_layers=_check_onnx_layers,
    packages=("onnx", "onnxscript", "onnxruntime"),
    # ONNX Runtime adds in a kernel of its own, which reads integers on both sides; OpenVINO runs that as fast.
    placed=lambda target: target if target.activation.symmetric else replace(target, residual="operands"),
    float_outputs=True,
)

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            name="pt2",
            description="a torch.export program",
            suffix=".pt2",
            file="int8.pt2",
            runtimes=(Runtime("torch", _load_program),),
            matches=lambda path: not _is_compiled(path),
            read=lambda path: read_program(path)[1],
            write=lambda draft, path: write_program(draft.program, draft.metadata, path),
            free_sizes=True,
        ),
        Format(
            name="aoti",
            description="an AOTInductor package",
            suffix=".pt2",
            file="int8.aoti.pt2",
            runtimes=(Runtime("aoti", AotiModel, runs_code=True),),
            matches=_is_compiled,
            check=_check_package,
            read=_read_package,
            write=lambda draft, path: write_package(draft.program, draft.metadata, path),
            check_dependencies=lambda verify: check_compiler(),
            adapt=for_this_cpu,
            layout=lambda int8: for_inductor(_cropped(int8)),
            takes_long=True,
        ),
        _ONNX,
        replace(
            _ONNX,
            name="onnxruntime",
            description="an ONNX model for ONNX Runtime",
            file="int8.onnxruntime.onnx",
            runtimes=_ONNX.runtimes[1:],
            placed=lambda target: replace(target, residual="operands", operators=ONNXRUNTIME.operators),
        ),
        Format(
            name="executorch",
            description="an ExecuTorch program",
            suffix=".pte",
            file="int8.pte",
            runtimes=(Runtime("executorch", ExecutorchModel, package="executorch", extra="executorch"),),
            matches=lambda path: True,
            check=check_pte,
            read=lambda path: read_texts(path).get(KEY),
            write=lambda draft, path: write_pte(draft.program, draft.metadata, path),
            check_dependencies=_check_executorch_dependencies,
            layout=_cropped,
            takes_long=True,
            # Whatever it was calibrated or trained for; the weights keep their bits.
            placed=lambda target: replace(XNNPACK, weight=target.weight),
        ),
    )
}

#: Names of all engines that run files.
RUNTIMES: tuple[str, ...] = tuple(
    dict.fromkeys(runtime.name for format in FORMATS.values() for runtime in format.runtimes)
)


def best_format(runtime: str, among: Iterable[str] = FORMATS) -> Format:
    """The format that an engine runs best: one that is for it alone, where there is one.

    Args:
        runtime: the engine's name.
        among: names of formats.
    """
    formats = [FORMATS[name] for name in among if FORMATS[name].runtime(runtime) is not None]
    return min(formats, key=lambda format: len(format.runtimes))


def others_read(format: Format) -> bool:
    """Whether engines can read a format's files that they are not written for."""
    return any(other.read is format.read and len(other.runtimes) > len(format.runtimes) for other in FORMATS.values())


def format_of(path: Path) -> Format:
    """The format of a file, from its name and content.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it has none of the formats.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: no such file")
    known = [format for format in FORMATS.values() if format.suffix == path.suffix]
    if not (known and path.suffix != ".pt2") and not zipfile.is_zipfile(path):
        raise ValueError(
            f"path={str(path)!r} is not an INT8 network written by lq, or is damaged: it is neither an .onnx "
            f"or .pte file nor a zip archive, which a .pt2 file is"
        )
    try:
        # A zip archive is known by what is in it, whatever its name.
        return next(format for format in known or FORMATS.values() if format.matches(path))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"path={str(path)!r} is damaged: {error}") from error


def read_metadata(path: str | Path) -> Metadata:
    """What a file says of itself, without loading the network: no code of the file runs, whatever its format.

    Args:
        path: written by :func:`lq.export`.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is damaged, or lq did not write it.
    """
    path = Path(path)
    format = format_of(path)
    try:
        text = format.read(path)
        if text is None:
            raise ValueError("it does not describe its inputs: lq did not write it")
        return Metadata.from_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path={str(path)!r} is no INT8 network written by lq, or is damaged: {error}") from error
