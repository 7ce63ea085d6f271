"""Export: choose the network that an engine wants, write it in its format, and check what was written."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lq.deployment.formats import FORMATS, Draft, Format, FormatName, others_read
from lq.deployment.load import load
from lq.deployment.verify import (
    OUTPUT_TOLERANCE,
    QuantizedTensor,
    UnreadableError,
    Verification,
    allowed_difference,
    check_kernels,
    check_program,
    compare,
    simulated,
)
from lq.errors import ExportMismatchError
from lq.formats.aoti.write import for_this_cpu, overflows_here
from lq.formats.onnx.write import OPSET
from lq.formats.pt2.write import Program, examples, export_program
from lq.graph.ops import OpKind
from lq.graph.qdq import QUANTIZE, QUANTIZE_BUFFER
from lq.int8.module import Int8Module
from lq.interface.guards import input_name
from lq.interface.metadata import Metadata, TensorSpec, dtype_name
from lq.interface.treespecs import without_names
from lq.schemes.targets import Target, get_target
from lq.util.cpu import has_onednn_int8
from lq.util.distribution import package_version
from lq.util.files import ensure_writable_dir, write_atomically
from lq.util.modes import evaluating
from lq.workflow.convert import convert
from lq.workflow.prepare import example_arguments, is_prepared, prepared_forward


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Args:
        path: the file.
        format: ``"pt2"``, ``"aoti"``, ``"onnx"``, ``"onnxruntime"`` or ``"executorch"``.
        target: the target whose placement the file has.
        size_bytes: the file's size.
        verifications: for each engine that ran the file, how far its outputs are from the simulation's.
        unreadable: why an engine that is installed cannot run the file, by its name.
        seconds: what writing it took, verification not included.
        verification_seconds: what verifying it took.
    """

    path: Path
    format: FormatName
    target: str
    size_bytes: int
    verifications: tuple[Verification, ...] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)
    verification_seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        unreadable = (f"{runtime} cannot run it: {reason}" for runtime, reason in self.unreadable.items())
        lines = [f"{self.path} ({self.format} for {self.target}, {self.size_bytes / 1e6:.2f} MB)"]
        return "\n".join([*lines, *(f"  {line}" for line in (*self.verifications, *unreadable))])


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: FormatName | None = None,
    target: str | Target | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    samples: Any = None,
    opset: int = OPSET,
    verify: bool = True,
) -> ExportResult:
    """Write an INT8 network to a file that runs without its training code.

    * ``"pt2"``: a ``torch.export`` program. ``lq.load`` runs it on INT8 kernels; ``torch.export.load`` reads it too.
    * ``"aoti"``: an AOTInductor package, compiled for this machine's CPU (which takes a C++ compiler and tens of
      seconds); it runs without Python model code.
    * ``"onnx"``: an ONNX file for OpenVINO, TensorRT and ONNX Runtime, its batch size free.
    * ``"onnxruntime"``: one for ONNX Runtime alone, with what lies between the convolutions (products, gates, SiLU,
      concatenations, pools) in INT8 kernels, too. OpenVINO, which has these in the convolutions' kernels, is slower
      with it; in a network of convolutions, ReLUs and residual adds it is the same as ``"onnx"``.
    * ``"executorch"``: a ``.pte`` file for ExecuTorch on phones and ARM boards, its INT8 operators in subgraphs of the
      XNNPACK backend. Always placed for target ``"xnnpack"``, whatever the model's own; batches of up to 16 images.

    A ``"pt2"`` file takes images of any size that the network takes. The others are for the size of the example
    inputs, and hold no weights that meet nothing but padding there: a ResNet-18 with the ImageNet stem for 32x32
    images has 4.2 million weights there rather than 11.2 million, and computes the same.

    A residual add is computed by a kernel of its own on ONNX Runtime and by the convolution's kernel elsewhere, so an
    ONNX file has quantizers on both operands (OpenVINO runs that as fast) unless ``target`` says otherwise or is
    ``"tensorrt"``. All scales are those of ``model``.

    The file is written under another name and renamed once it has been verified: whatever goes wrong, no incomplete or
    wrong file stands under the final name.

    Args:
        model: prepared by :func:`lq.prepare` and calibrated or trained; or from :func:`lq.convert`, which has the
            placement of its own target and no other.
        path: the file, ending in ``.pt2``, ``.onnx`` or ``.pte``.
        format: ``"pt2"``, ``"aoti"``, ``"onnx"``, ``"onnxruntime"`` or ``"executorch"``; by default what the path ends
            in, ``"pt2"`` for ``.pt2``, ``"onnx"`` for ``.onnx`` and ``"executorch"`` for ``.pte``.
        target: whose placement and grids the file has; by default the model's own, but for the residual adds.
        labels: names of the classes, for the file's metadata.
        preprocessing: what has to be done to an image before the network sees it, for the file's metadata: a mapping
            of JSON values, such as ``{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}``.
        samples: inputs to verify the file with, in the form of ``example_inputs`` of :func:`lq.prepare`; by default
            those example inputs.
        opset: version of the ONNX operator set.
        verify: whether to run the file on the engines that are installed, and to compare.

    Raises:
        ValueError: where an argument is not one of its choices, the model is not converted or calibrated, or the
            network cannot be expressed in the format.
        OSError: where the path cannot be written.
        MissingRuntimeError: where a package that the format needs is not installed; the message names the extra.
        CompilerError: where the format is ``"aoti"`` and there is no C++ compiler, or the network cannot be compiled.
        ExportMismatchError: where the file does not compute what the network does; with the first layer that differs.
    """
    begun = time.perf_counter()
    path = Path(path)
    chosen = _format(path, format)
    chosen.check_dependencies(verify)
    if preprocessing is not None:
        _check_json(preprocessing)
    int8 = network_for(model, chosen, target)
    ensure_writable_dir(path.parent, "path")
    inputs = _samples(int8, samples)
    with torch.no_grad():
        written, int8 = chosen.layout(int8), chosen.adapt(int8)
        simulation = simulated(int8, inputs)
        _check_values(inputs, simulation[0], chosen)
        program = export_program(written, free_sizes=chosen.free_sizes)
        metadata = _metadata(int8, program, simulation[0], labels, preprocessing)
        if others_read(chosen):
            metadata = replace(metadata, engines=tuple(runtime.name for runtime in chosen.runtimes))
        draft = Draft(program.exported, metadata, _tensors(written), opset)
        result = _write(written, draft, path, chosen, inputs, simulation, verify)
    return replace(result, seconds=time.perf_counter() - begun - result.verification_seconds)


def pays_off(model: nn.Module, name: FormatName) -> bool:
    """Whether a format has something for a prepared model that a format for more engines has not."""
    placed, forward = FORMATS[name].placed, prepared_forward(model)
    if placed is None or len(FORMATS[name].runtimes) > 1:
        return True
    target = placed(forward.target)
    if not forward.watches(target):
        return False
    kinds = {operator.kind for operator in forward.analyze(target).placement.operators}
    return not kinds <= {OpKind.ADD, OpKind.AVG_POOL}  # these two are in every file as they are there


def _format(path: Path, name: FormatName | None) -> Format:
    suffixes = list(dict.fromkeys(format.suffix for format in FORMATS.values()))
    if name is None:
        if path.suffix not in suffixes:
            raise ValueError(f"path={str(path)!r} must end in {' or '.join(suffixes)}")
        return next(format for format in FORMATS.values() if format.suffix == path.suffix)
    if name not in FORMATS:
        raise ValueError(f"format={name!r} is unknown; choose one of {', '.join(map(repr, FORMATS))}")
    format = FORMATS[name]
    if path.suffix != format.suffix:
        raise ValueError(f"path={str(path)!r} must end in {format.suffix} for format={name!r}")
    return format


def network_for(model: nn.Module, format: Format, target: str | Target | None = None) -> Int8Module:
    """The network for a file: as its target wants it.

    Args:
        model: see :func:`export`.
        format: of the file.
        target: see :func:`export`.

    Raises:
        ValueError: where the model is not converted or calibrated, or was converted for another target.
    """
    resolved = None if target is None else get_target(target)
    if isinstance(model, Int8Module):
        own = "" if model.report is None else model.report.target
        if resolved is not None and resolved.name != own:
            raise ValueError(
                f"target={resolved.name!r}: this INT8 module was converted for {own!r} and holds no other ranges; "
                f"export the prepared model, from before lq.convert, instead"
            )
        return model
    if not is_prepared(model):
        raise ValueError(
            f"model is a {type(model).__name__}, neither converted nor prepared; call lq.prepare(model, ...) and "
            f"lq.calibrate(model, ...) first"
        )
    if resolved is None:
        resolved = prepared_forward(model).target
        if format.placed is not None:
            resolved = format.placed(resolved)
    if format.float_outputs:
        resolved = replace(resolved, integer_outputs=False)
    with evaluating(model):
        return convert(model, resolved)


def _samples(int8: Int8Module, samples: Any) -> dict[str, Any]:
    """Inputs by name, on the CPU, to verify with."""
    if samples is not None:
        args, kwargs = example_arguments(samples)
        names = list(int8.example_inputs)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if list(inputs) != names:
            raise ValueError(f"samples must be inputs of the network, {', '.join(names)}; got {', '.join(inputs)}")
    else:
        inputs = int8.example_inputs
    generator = torch.Generator().manual_seed(0)

    def prepare(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        if not value.is_floating_point():
            return value
        if not value.any():  # a network that was loaded from a file has no samples
            return torch.randn(value.shape, generator=generator)
        return value.float()

    return {name: pytree.tree_map(prepare, value) for name, value in inputs.items()}


def _metadata(
    int8: Int8Module,
    program: Program,
    outputs: Any,
    labels: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
) -> Metadata:
    inputs = examples(int8)
    paths, _ = pytree.tree_flatten_with_path(inputs)
    _, in_spec = pytree.tree_flatten(tuple(inputs.values()))
    tensors = tuple(
        TensorSpec(input_name(path), shape, dtype_name(value.dtype))
        for (path, value), shape in zip(paths, program.shapes, strict=True)
    )
    guards, notes = tuple(dict.fromkeys((*int8.guards, *program.guards))), program.notes
    _, out_spec = pytree.tree_flatten(without_names(outputs))
    if int8.metadata is not None:  # it was loaded from a file, whose metadata serve where the caller gives none
        labels = int8.metadata.labels if labels is None else labels
        preprocessing = int8.metadata.preprocessing if preprocessing is None else preprocessing
        # Its program was made for certain sizes, and stays restricted to them.
        tensors = tuple(
            replace(new, shape=tuple(b if a is None else a for a, b in zip(new.shape, old.shape, strict=True)))
            for new, old in zip(tensors, int8.metadata.tensors, strict=True)
        )
        guards = tuple(dict.fromkeys((*guards, *int8.metadata.guards)))
        notes = tuple(dict.fromkeys((*notes, *int8.metadata.notes)))
    return Metadata(
        lq=package_version(),
        target="" if int8.report is None else int8.report.target,
        inputs=tuple(inputs),
        tensors=tensors,
        in_spec=pytree.treespec_dumps(in_spec),
        out_spec=pytree.treespec_dumps(out_spec),
        labels=None if labels is None else tuple(labels),
        preprocessing=preprocessing,
        report=None if int8.report is None else int8.report.to_dict(),
        guards=guards,
        notes=notes,
    )


def _check_values(inputs: Mapping[str, Any], outputs: Any, format: Format) -> None:
    """Refuse what a file has no place for.

    Raises:
        ValueError: where an input or a result is no tensor.
    """
    for name, value in inputs.items():
        odd = [leaf for leaf in pytree.tree_leaves(value) if not isinstance(leaf, Tensor)]
        if odd:
            raise ValueError(
                f"the network takes {odd[0]!r} in its input {name!r}, and a file takes tensors alone: call the network "
                f"with the tensors that it computes with, or name the part of it that takes tensors"
            )
    for value in pytree.tree_leaves(outputs):
        if not isinstance(value, Tensor) and not (value is None and format.name == "pt2"):
            raise ValueError(
                f"the network returns {value!r} beside tensors, and a file of the format {format.name!r} gives tensors "
                f"alone: leave it out of the results of the forward, or name the part of the network that does"
            )


def _check_json(preprocessing: Mapping[str, Any]) -> None:
    try:
        json.dumps(dict(preprocessing))
    except (TypeError, ValueError) as error:
        raise ValueError(f"preprocessing={preprocessing!r} must be a mapping of JSON values: {error}") from error


def _write(
    int8: Int8Module,
    draft: Draft,
    path: Path,
    format: Format,
    inputs: dict[str, Any],
    simulation: tuple[Any, list[QuantizedTensor]],
    verify: bool,
) -> ExportResult:
    verifications: list[Verification] = []
    unreadable: dict[str, str] = {}
    wrong: dict[str, ExportMismatchError] = {}
    outputs, quantized = simulation
    verifying = 0.0

    def write(beside: Path) -> None:
        nonlocal verifying
        format.write(draft, beside)
        if not verify:
            return
        begun = time.perf_counter()
        if format.check_layers is not None:
            with suppress(UnreadableError):  # the engines run it once more below, each with its own error
                format.check_layers(beside, draft, quantized, outputs, draft.metadata.flatten((), inputs))
        for runtime in format.installed_runtimes():
            try:
                verifications.append(_verify(beside, runtime, int8, inputs, simulation))
            except UnreadableError as error:
                if len(format.runtimes) == 1:  # it was written for this engine alone
                    raise error.__cause__ or error from None
                unreadable[runtime] = error.reason
                warnings.warn(f"lq: {error}", stacklevel=2)
            except ExportMismatchError as error:
                wrong[runtime] = error
        if wrong and not verifications:
            raise next(iter(wrong.values()))
        if wrong:  # another engine computes it right, so that it is not the file that is wrong
            for runtime, mismatch in wrong.items():
                unreadable[runtime] = f"it computes something else than the network ({mismatch})"
                warnings.warn(f"lq: {runtime} cannot run the file: {unreadable[runtime]}", stacklevel=2)
            right = tuple(verification.runtime for verification in verifications)
            format.write(replace(draft, metadata=replace(draft.metadata, engines=right)), beside)
        if not verifications:
            raise ValueError(
                "none of the engines that are installed can run the file, so it cannot be verified; verify=False "
                "writes it anyway: " + "; ".join(f"{runtime} says: {reason}" for runtime, reason in unreadable.items())
            )
        verifying = time.perf_counter() - begun

    write_atomically(path, write)
    size = path.stat().st_size
    target = draft.metadata.target
    return ExportResult(
        path, format.name, target, size, tuple(verifications), unreadable, verification_seconds=verifying
    )


def _verify(
    file: Path, runtime: str, int8: Int8Module, inputs: dict[str, Any], simulation: tuple[Any, list[QuantizedTensor]]
) -> Verification:
    """Judge what an engine makes of a file: layer by layer where its layers are accessible, else by its outputs."""
    expected, quantized = simulation
    try:
        loaded = load(file, runtime)
        outputs = loaded(**inputs)
    except Exception as error:
        raise UnreadableError(runtime, error) from error
    verification = compare(runtime, outputs, expected)
    wrong = None
    if isinstance(loaded, Int8Module):
        tensors = _tensors(int8)
        check_program(loaded, tensors, quantized, expected, inputs)
        if not has_onednn_int8():
            return verification
        try:
            check_kernels(loaded, tensors, quantized, expected, inputs)
        except ExportMismatchError as error:
            wrong = str(error)
    elif verification.relative_difference > OUTPUT_TOLERANCE:
        verification = replace(verification, allowed=allowed_difference(int8, inputs, expected))
        if verification.relative_difference > verification.allowed:
            wrong = f"the exported file does not compute what the INT8 network does: {verification}"
    if wrong is None:
        return verification
    # In process, convolutions that other engines' kernels get wrong are never given to a kernel.
    is_known = overflows_here(int8) if loaded.runtime == "torch" else for_this_cpu(int8) is not int8
    if loaded.runtime != "aoti" and is_known:
        # The file itself has been checked: only this CPU's kernels differ.
        warnings.warn(
            f"lq: {verification}. The file is right, but this CPU's INT8 kernels get it wrong: without VNNI they sum "
            f"in 16 bits, which 8-bit weights overflow, or they fail on a strided 1x1 convolution with a number of "
            f"input channels that is not a multiple of 16. For the first, calibrate or train for target='x86_avx2'",
            stacklevel=2,
        )
        return verification
    raise ExportMismatchError(wrong)


def _tensors(int8: Int8Module) -> list[str]:
    """A name for the output of each quantize node: of the tensor, once for each time it is quantized."""
    names: list[str] = []
    for node in int8.graph.nodes:
        if node.op != "call_function" or node.target not in (QUANTIZE, QUANTIZE_BUFFER):
            continue
        name = f"tensor_{len(names)}"  # a network that was loaded from a file has its scales as numbers
        if node.target is QUANTIZE_BUFFER:
            name = str(node.args[1].target).removesuffix(".scale").removesuffix("_quantizer")
        made_by = node.args[0]
        if name in names:
            name = f"{name}.{made_by.name}"
        names.append(name)
    return names
