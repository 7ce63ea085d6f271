"""What is in a quantized model's file: its layers in the terminal, and everything as one HTML page beside the file.

python -m lq.recipes.inspect_file int8.pt2            or .onnx: its layers; with int8.json beside it what was measured
python -m lq.recipes.inspect_file int8.json           the same without the network
python -m lq.recipes.inspect_file last.ckpt           a Trainer's checkpoint: how it was prepared, and its ranges
python -m lq.recipes.inspect_file int8.json benchmark=runs/benchmark/benchmark.csv      with the time on every runtime
"""

from __future__ import annotations

import csv
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

import lq
from lq.callback.checkpoints.hooks import section_of
from lq.callback.checkpoints.ranges import SavedQuantizer, saved_quantizers
from lq.callback.end.page import result_page, settings_table
from lq.callback.result import QuantizationResult
from lq.deployment.formats import read_metadata
from lq.errors import ConfigError
from lq.page import Column, Table, layer_table, page, section
from lq.recipes.blocks.config import field, main
from lq.results.report import QuantizationReport
from lq.timing.benchmark import Benchmark, BenchmarkRow
from lq.util.archives import check_torch_archive
from lq.util.files import ensure_writable_dir, write_text

#: Largest size of an ``int8.json``, bytes; for a network with a thousand layers it has a few million.
_LARGEST_RESULT = 100_000_000


@dataclass
class Config:
    """What is in a quantized model's file."""

    files: list[str] = field(help="INT8 networks (.pt2, .onnx), int8.json, or checkpoints", positional=True)
    benchmark: str | None = field(None, help="benchmark.csv of the recipe benchmark, for the time on every runtime")
    output_dir: str | None = field(None, help="folder for the pages; by default each beside its file")
    trusted: bool = field(False, help="whether checkpoints may hold pickled objects, which can run code when loaded")


def run(config: Config) -> None:
    for file in config.files:
        path = Path(file)
        if not path.is_file():
            raise ConfigError(f"files={file!r}: no such file")
        text = _inspect(path, config)
        output = path.parent if config.output_dir is None else Path(config.output_dir)
        ensure_writable_dir(output, "output_dir")
        written = output / f"{path.name}.html"
        write_text(written, text)
        print(f"written: {written}")


def _inspect(path: Path, config: Config) -> str:
    """Print what is in a file, and return its page."""
    try:
        if path.suffix == ".json":
            return _result(_read_result(path), config)
        if path.suffix in (".pt2", ".onnx"):
            return _network(path, config)
        return _checkpoint(path, config.trusted)
    except (ValueError, lq.MissingRuntimeError) as error:
        raise ConfigError(f"files={str(path)!r}: {error}") from error


def _result(result: QuantizationResult, config: Config) -> str:
    print(result)
    print(result.report)
    if result.analysis is not None:
        Console(width=150).print(result.analysis.table())
    return result_page(result, runtimes=None if config.benchmark is None else _read_benchmark(config.benchmark))


def _network(path: Path, config: Config) -> str:
    beside = path.with_name("int8.json")
    if beside.is_file():
        result = _read_result(beside)
        if path.name in {Path(name).name for name in (result.artifact, *result.exports)}:
            return _result(result, config)
    metadata = read_metadata(path)  # the network itself may be compiled code
    if metadata.report is None:
        raise ValueError("it does not describe its layers: lq did not write it")
    report = QuantizationReport.from_dict(dict(metadata.report))
    print(report)
    settings = {
        "target": metadata.target,
        "inputs": ", ".join(f"{t.name}: {t.dtype} {_shape(t.shape)}" for t in metadata.tensors),
        "classes": "unknown" if metadata.labels is None else len(metadata.labels),
        "preprocessing": dict(metadata.preprocessing or {}),
        "size, MB": path.stat().st_size / 1e6,
        "written by": f"lq {metadata.lq}",
    }
    sections = [
        section("Layers", layer_table(report, None).markup()),
        section("Settings", settings_table(settings).markup()),
    ]
    lead = f"{len(report.int8_layers)} layers in INT8 for {metadata.target}, {len(report.float_layers)} in float."
    return page(f"{report.model} in INT8: {path.name}", lead, sections, ["Layers", "Settings"])


def _read_result(path: Path) -> QuantizationResult:
    if path.stat().st_size > _LARGEST_RESULT:
        raise ValueError(f"{path.name} has {path.stat().st_size / 1e6:.0f} MB, and lq writes no such file")
    return QuantizationResult.from_json(path.read_text())


def _shape(sizes: tuple[int | None, ...]) -> str:
    return "×".join("any" if size is None else str(size) for size in sizes)


def _checkpoint(path: Path, trusted: bool) -> str:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a checkpoint, or is damaged")
    try:
        check_torch_archive(path)
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=not trusted)
    except Exception as error:
        hint = "" if trusted else "; if it holds pickled objects and you trust it, add trusted=true"
        raise ValueError(f"it cannot be loaded{hint} ({' '.join(str(error).split())[:200]})") from error
    saved = section_of(checkpoint) if isinstance(checkpoint, dict) else None
    if saved is None:
        raise ValueError("it holds a float model, without any quantization")
    preparation: dict[str, Any] = saved["preparation"] or {}
    quantizers = saved_quantizers(saved)
    console = RichTable(title=f"{path.name}: {len(quantizers)} quantizers")
    rows = [_row(quantizer) for quantizer in quantizers]
    for column in _COLUMNS:
        console.add_column(column.title, justify="right" if column.is_number else "left", overflow="fold")
    for row in rows:
        console.add_row(*row)
    Console(width=150).print(console)
    settings = {
        "stage": saved["stage"],
        "epoch": checkpoint.get("epoch", "unknown"),
        "step": checkpoint.get("global_step", "unknown"),
        **{name: value for name, value in preparation.items() if name != "target"},
        **{f"target: {name}": value for name, value in preparation.get("target", {}).items()},
    }
    if not preparation:
        settings["preparation"] = "not known: a forward argument was not a plain value"
    for name, value in settings.items():
        print(f"{name}: {value}")
    table = Table(_COLUMNS, rows, "Click a header to sort by it.", sortable=True)
    mode, target = preparation.get("mode", "unknown"), preparation.get("target", {}).get("name", "unknown")
    sections = [section("Ranges", table.markup()), section("Settings", settings_table(settings).markup())]
    lead = f"{mode.upper()} for {target}, {saved['stage']}: {len(quantizers)} quantizers."
    return page(f"Checkpoint {path.name}", lead, sections, ["Ranges", "Settings"])


_COLUMNS = [
    Column("quantizer", css="name"),
    Column("channels"),
    Column("step (scale)"),
    Column("zero point"),
    Column("observed"),
    Column("calibrator"),
    Column("state"),
]


def _row(quantizer: SavedQuantizer) -> list[str]:
    def ends(pair: tuple[float, float] | None, missing: str) -> str:
        if pair is None:
            return missing
        return f"{pair[0]:.4g}" if pair[0] == pair[1] else f"{pair[0]:.4g} to {pair[1]:.4g}"

    return [
        quantizer.name,
        str(quantizer.channels),
        ends(quantizer.scale, "no range yet"),
        ends(quantizer.zero_points, ""),
        "nothing" if quantizer.observed is None else f"[{quantizer.observed[0]:.4g}, {quantizer.observed[1]:.4g}]",
        quantizer.calibrator,
        quantizer.state.lower().replace("|", ", "),
    ]


def _read_benchmark(file: str) -> Benchmark:
    """The rows of a CSV file that :meth:`lq.Benchmark.save_csv` wrote."""
    types = {item.name: item.type for item in fields(BenchmarkRow)}

    def value(name: str, text: str) -> Any:
        kind = str(types[name])
        if "None" in kind and not text:
            return None
        return text if kind == "str" else int(text) if kind == "int" else float(text)

    try:
        with open(file, newline="") as lines:
            rows = [{name: value(name, text) for name, text in row.items()} for row in csv.DictReader(lines)]
        return Benchmark(tuple(BenchmarkRow(**row) for row in rows), {}, "")
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"benchmark={file!r} is not a readable benchmark.csv: {error!r}") from error


def plan(config: Config) -> str:
    place = config.output_dir or "the same folder"
    return f"print what is in {', '.join(config.files)}, and write a page of each to {place}"


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
