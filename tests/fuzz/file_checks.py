"""Exported files on every engine that is installed, against the simulation of the network they were made from."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lq

from .int8_checks import Noise, Quantized, judge
from .outcome import Refusal, answers, has_vnni
from .program import Program, random_inputs
from .rounding import outputs_of

#: Engines by format, with the package that each needs.
ENGINES = {"pt2": {"torch": "torch"}, "onnx": {"onnxruntime": "onnxruntime", "openvino": "openvino"}}

#: Engines sum in an order of their own and may keep products of scales in float32: this many times as far from the
#: simulation as kernels may be is no fault.
_ENGINE = 2.0


def check_files(program: Program, quantized: Quantized, refusals: list[tuple[str, str]]) -> None:
    """Write each format, and run each engine on the example's batch and on one sample.

    Args:
        program: the network.
        quantized: what it became.
        refusals: takes the errors by which lq refuses to write a file.
    """
    with tempfile.TemporaryDirectory() as folder:
        for format, engines in ENGINES.items():
            if not all(find_spec(package) for package in engines.values()):
                continue
            path = Path(folder) / f"network.{format}"
            try:
                with answers(f"files, {format}"):
                    quantized.int8.execution = "simulation"
                    lq.export(quantized.int8, path)
            except Refusal as refusal:
                refusals.append((refusal.check, refusal.error))
                continue
            for engine in engines:
                try:
                    _check_engine(program, quantized, path, engine)
                except Refusal as refusal:
                    refusals.append((refusal.check, refusal.error))


def _check_engine(program: Program, quantized: Quantized, path: Path, engine: str) -> None:
    check = f"files, {engine}"
    if not has_vnni() and program.target != "x86_avx2":
        return  # its kernels overflow, of which lq warns
    with answers(check):
        loaded: Any = lq.load(path, runtime=engine, threads=1)
    batch = tuple(x[: program.shapes[0][0]] for x in quantized.inputs)
    single = tuple(x[:1] for x in quantized.inputs)
    for what, inputs in (("the batch", batch), ("one sample", single)):
        expected = outputs_of(quantized.int8, inputs)
        with answers(check):
            found = [torch.as_tensor(value) for value in tree_leaves(loaded(*inputs))]
        judge(check, what, found, expected, _of_engine(quantized, inputs))
    if engine == "torch":
        _check_size(program, quantized, loaded)


def _check_size(program: Program, quantized: Quantized, loaded: Any) -> None:
    """A program that takes images of any size takes those that the INT8 network takes, and no others."""
    inputs: tuple[Tensor, ...] = random_inputs(program, seed=30, grow=2)
    try:
        expected = outputs_of(quantized.int8, inputs)
    except Exception:  # a network for one size
        return
    check = "files, torch"
    with answers(check):
        found = outputs_of(loaded, inputs)
    judge(check, "another size", found, expected, _of_engine(quantized, inputs))


def _of_engine(quantized: Quantized, inputs: tuple[Tensor, ...]) -> Noise:
    return lambda: [(_ENGINE * rms, _ENGINE * most) for rms, most in quantized.noise(inputs)()]
