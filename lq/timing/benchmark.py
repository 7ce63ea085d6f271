"""Benchmark: which engine to deploy on, measured on this machine."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from lq.deployment.formats import RUNTIMES, format_of
from lq.deployment.load import load
from lq.errors import ContenderError
from lq.graph.cropping import crop_kernels
from lq.timing.race import Measurement, race
from lq.util.cpu import cpu_name
from lq.util.display import as_text
from lq.util.files import write_atomically
from lq.workflow.fold import fold_batch_norm

#: Name of the float model's rows.
FLOAT = "float"


@dataclass(frozen=True)
class BenchmarkRow:
    """One model on one runtime at one batch size with one number of threads.

    Args:
        model: name of the file, or ``"float"``.
        runtime: the engine; for the float model ``"eager"``, or ``"folded"``: eager, with batch norm folded and kernels
            cropped.
        batch_size: samples in one call.
        threads: CPU threads.
        p50_ms: median time of a call, milliseconds.
        p95_ms: 95th percentile, milliseconds.
        throughput: samples per second at the median.
        speedup: the float model's median divided by this one's; None without a float model.
        memory_mb: peak resident memory beyond that of the process before the model was loaded, 10^6 bytes.
        file_mb: size of the file, 10^6 bytes; of the parameters and buffers for the float model.
        top1_agreement: share of the samples with the float model's class, in [0, 1]; None without a float model.
    """

    model: str
    runtime: str
    batch_size: int
    threads: int
    p50_ms: float
    p95_ms: float
    throughput: float
    speedup: float | None
    memory_mb: float
    file_mb: float
    top1_agreement: float | None


@dataclass(frozen=True)
class Benchmark:
    """What was measured; ``str(benchmark)`` is a table.

    Args:
        rows: model by model within each batch size and number of threads.
        failures: why a contender is missing, by its name.
        machine: the CPU.
    """

    rows: tuple[BenchmarkRow, ...]
    failures: dict[str, str]
    machine: str

    def table(self) -> Table:
        table = Table(title=f"on {self.machine}")
        for header in ("batch", "threads", "model", "runtime", "p50 ms", "p95 ms", "samples/s", "against float"):
            table.add_column(header, justify="left" if header in ("model", "runtime") else "right")
        for header in ("memory MB", "file MB", "top-1 agreement"):
            table.add_column(header, justify="right")
        group = None
        for row in self.rows:
            if group not in (None, (row.batch_size, row.threads)):
                table.add_section()
            group = (row.batch_size, row.threads)
            table.add_row(
                str(row.batch_size),
                str(row.threads),
                row.model,
                row.runtime,
                f"{row.p50_ms:.3g}",
                f"{row.p95_ms:.3g}",
                f"{row.throughput:.0f}",
                "" if row.speedup is None else f"{row.speedup:.2f}×",
                f"{row.memory_mb:.0f}",
                f"{row.file_mb:.2f}",
                "" if row.top1_agreement is None else f"{row.top1_agreement:.2%}",
            )
        return table

    def __str__(self) -> str:
        failures = [f"{name} did not run: {reason.strip().splitlines()[-1]}" for name, reason in self.failures.items()]
        return as_text(self.table(), 150) + "\n".join(failures)

    def save_csv(self, path: str | Path) -> None:
        """Write the rows to a CSV file with a header."""

        def write(beside: Path) -> None:
            with beside.open("w", newline="") as file:
                writer = csv.DictWriter(file, [item.name for item in fields(BenchmarkRow)])
                writer.writeheader()
                writer.writerows(asdict(row) for row in self.rows)

        write_atomically(Path(path), write)

    def save_chart(self, path: str | Path) -> None:
        """Write a bar chart of the median times, a panel for each batch size and number of threads, as an image."""
        groups = list(dict.fromkeys((row.batch_size, row.threads) for row in self.rows))
        most = max(sum((row.batch_size, row.threads) == group for row in self.rows) for group in groups)
        figure = Figure(figsize=(8, len(groups) * (0.9 + 0.32 * most)), layout="constrained")
        figure.suptitle(f"Median time of a call, {self.machine}", fontsize=11)
        for axes, group in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
            rows = sorted((r for r in self.rows if (r.batch_size, r.threads) == group), key=lambda row: -row.p50_ms)
            names = [f"{row.model}, {row.runtime}" for row in rows]
            colors = ["#9a9a9a" if row.model == FLOAT else "#2f6fb0" for row in rows]
            bars = axes.barh(names, [row.p50_ms for row in rows], color=colors)
            labels = [f"{r.p50_ms:.3g} ms" + (f"  ({r.speedup:.1f}×)" if r.speedup else "") for r in rows]
            axes.bar_label(bars, labels, padding=4, fontsize=9)
            axes.set_title(f"batch {group[0]}, {group[1]} thread{'s' * (group[1] != 1)}", loc="left", fontsize=10)
            axes.set_xlabel("milliseconds", fontsize=9)
            axes.margins(x=0.22)
            axes.tick_params(labelsize=9)
            axes.spines[["top", "right"]].set_visible(False)
        suffix = Path(path).suffix.removeprefix(".") or "png"
        write_atomically(Path(path), lambda beside: figure.savefig(beside, format=suffix, dpi=150))


def benchmark(
    models: Sequence[str | Path],
    *,
    float_model: nn.Module | None = None,
    folded: bool = False,
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    runtimes: Sequence[str] | None = None,
    samples: Tensor | None = None,
    seconds: float = 2.0,
) -> Benchmark:
    """Measure exported networks on every runtime that is installed, taking turns, each in a process of its own.

    A script that calls this needs the usual ``if __name__ == "__main__":``, because the processes import it.

    Args:
        models: files from :func:`lq.export`, of networks with one input.
        float_model: what they were made from: measured in PyTorch eager, and the reference for the agreement of
            classes. It is sent to another process, so it must pickle.
        folded: also measure it as the files have it, except in float: with batch norm folded, and without the weights
            that meet only padding at the samples' size. That gain is not due to INT8.
        batch_sizes: samples in one call.
        threads: numbers of CPU threads; by default torch's own.
        runtimes: those to measure; by default all that are installed.
        samples: inputs ``(N, ...)`` for the agreement and for the calls that are timed; by default random ones.
        seconds: about how long to time each contender.

    Raises:
        FileNotFoundError: where a file does not exist.
        ValueError: where an argument is not one of its choices, or ``float_model`` does not pickle.
    """
    for name in runtimes or ():
        if name not in RUNTIMES:
            raise ValueError(f"runtimes has {name!r}, which is unknown; choose from {', '.join(map(repr, RUNTIMES))}")
    for argument, values in (("batch_sizes", batch_sizes), ("threads", threads)):
        if any(value < 1 for value in values):
            raise ValueError(f"{argument}={list(values)} must be at least 1 each")
    paths = [Path(model) for model in models]
    pairs = [
        (path, runtime)
        for path in paths
        for runtime in format_of(path).installed_runtimes()
        if runtimes is None or runtime in runtimes
    ]
    if not pairs:
        raise ValueError(f"models={[str(path) for path in paths]}: none of the runtimes that read them is installed")
    if samples is None:
        samples = _random_samples(*pairs[0], count=max(64, *batch_sizes))
    floats: dict[str, nn.Module] = {} if float_model is None else {FLOAT: float_model}
    if float_model is not None and folded:
        inputs = samples[:2]
        floats[f"{FLOAT}, folded"] = crop_kernels(fold_batch_norm(float_model, inputs), {"input": inputs})
    pickled = {name: _pickle(network) for name, network in floats.items()}
    rows: list[BenchmarkRow] = []
    failures: dict[str, str] = {}
    names = _distinct_names(paths)
    for batch_size in batch_sizes:
        for count in threads or (torch.get_num_threads(),):
            contenders: dict[str, Callable[[], Callable[..., Any]]] = {
                name: partial(_unpickle, network) for name, network in pickled.items()
            }
            for path, runtime in pairs:
                contenders[f"{names[path]}, {runtime}"] = partial(load, path, runtime, threads=count)
            inputs = samples.repeat(-(-batch_size // len(samples)), *[1] * (samples.dim() - 1))[:batch_size]
            results = race(
                contenders, [inputs], threads=count, seconds=seconds, samples=list(samples.split(batch_size))
            )
            reference = results.get(FLOAT)
            sizes = {f"{names[path]}, {runtime}": path.stat().st_size for path, runtime in pairs}
            for name, result in results.items():
                if isinstance(result, ContenderError):
                    failures[f"{name}, batch {batch_size}"] = str(result)
                    continue
                size = _state_bytes(floats[name]) if name in floats else sizes[name]
                rows.append(_row(name, result, reference, batch_size, count, size))
    return Benchmark(tuple(rows), failures, cpu_name())


def _pickle(model: nn.Module) -> bytes:
    try:
        return pickle.dumps(model)
    except Exception as error:
        raise ValueError(
            f"float_model is a {type(model).__name__} that cannot be sent to another process: {error}"
        ) from error


def _unpickle(model: bytes) -> nn.Module:
    network: nn.Module = pickle.loads(model)
    return network.eval()


def _distinct_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The files' names, with their folders where two have the same name."""
    alike = {path.name for path in paths if sum(other.name == path.name for other in paths) > 1}
    return {path: str(path) if path.name in alike else path.name for path in paths}


def _random_samples(path: Path, runtime: str, count: int) -> Tensor:
    metadata = load(path, runtime).metadata
    assert metadata is not None
    if len(metadata.tensors) != 1:
        raise ValueError(f"path={str(path)!r} takes {len(metadata.tensors)} inputs; the benchmark supports only one")
    shape = metadata.tensors[0].shape
    if None in shape[1:]:
        raise ValueError(f"path={str(path)!r} takes inputs of any size; give samples=..., or an ONNX file first")
    return torch.randn(count, *shape[1:], generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def _state_bytes(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def _row(
    name: str, measured: Measurement, reference: Any, batch_size: int, threads: int, size_bytes: int
) -> BenchmarkRow:
    model, _, runtime = name.rpartition(", ")
    compares = isinstance(reference, Measurement)
    return BenchmarkRow(
        model=model or FLOAT,
        runtime=runtime if model else "eager",
        batch_size=batch_size,
        threads=threads,
        p50_ms=measured.timing.p50_ms,
        p95_ms=measured.timing.p95_ms,
        throughput=measured.timing.throughput,
        speedup=reference.timing.p50_ms / measured.timing.p50_ms if compares else None,
        memory_mb=measured.memory_bytes / 1e6,
        file_mb=size_bytes / 1e6,
        top1_agreement=float((measured.classes == reference.classes).double().mean()) if compares else None,
    )
