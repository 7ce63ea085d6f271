"""The results as a page of Markdown."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torchvision

from .measure import EQUAL, Result
from .networks import TORCHVISION

_HEADERS = (
    "network",
    "image",
    "prepare, s",
    "batch",
    "first sample",
    "training step",
    "multiply-adds in INT8, %",
    "INT8",
    "float",
    "loose norms",
    "INT8 to float, dB",
    "to calibrated, dB",
    "kernels, dB",
)

_LEGEND = """\
Each network has random weights, and batch norm statistics of two batches of noise.

- batch, first sample: the prepared model's output against eager, before calibration: `=` (to {equal:g} of the largest
  value) or the largest difference in percent of the largest value.
- training step: the same of outputs, all gradients and buffers after one forward and backward in training mode; with
  the worst of them.
- multiply-adds: of convolutions, linear layers and matrix products (those inside torch's attention are not
  counted), the share that INT8 kernels do in process.
- INT8, float: rows of the report. Loose norms: batch norms computed on a convolution's very output, not folded.
- dB: signal to quantization noise of the INT8 simulation against float and against the calibrated model, and of the
  INT8 kernels against the simulation. Deep networks of random weights amplify one rounding: the first tells little.
"""


def page(results: Sequence[Result], threads: int) -> str:
    """A summary, the table, the errors, and what stays float with its reason."""
    is_torchvision = all(result.name.startswith(TORCHVISION) for result in results)
    versions = f"torchvision {torchvision.__version__}" if is_torchvision else f"timm {timm.__version__}"
    parts = [
        f"# Networks of {'torchvision' if is_torchvision else 'timm'}",
        _LEGEND.format(equal=EQUAL),
        f"{versions}, torch {torch.__version__}, {threads} thread{'s' if threads > 1 else ''} a network.",
        _summary(results),
        _table(_HEADERS, [_row(result) for result in results]),
    ]
    failed = [result for result in results if result.error]
    if failed:
        parts += ["## Errors", _table(("network", "step and error"), [(r.name, r.error) for r in failed])]
    different = [r for r in results if r.training_error is not None and r.training_error > EQUAL]
    if different:
        rows = [(r.name, r.training_worst, _difference(r.training_error)) for r in different]
        parts += ["## Training steps that differ", _table(("network", "worst", "difference"), rows)]
    parts += ["## What stays in float", _float_layers(results)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _summary(results: Sequence[Result]) -> str:
    def count(values: list[Any], good: Any) -> str:
        return f"{sum(value is not None and good(value) for value in values)} of {len(results)}"

    def equal(value: float) -> bool:
        return value <= EQUAL

    total = sum(result.int8_layers or 0 for result in results)
    loose = sum(result.loose_norms or 0 for result in results)
    seconds = sorted(r.prepare_seconds for r in results if r.prepare_seconds is not None)
    return "\n".join(
        [
            f"- prepared: {len(seconds)} of {len(results)}"
            + (f", median {seconds[len(seconds) // 2]:.1f} s, longest {seconds[-1]:.1f} s" if seconds else ""),
            f"- evaluation equal for the batch: {count([r.batch_error for r in results], equal)}; for its first "
            f"sample: {count([r.sample_error for r in results], equal)}",
            f"- training step equal: {count([r.training_error for r in results], equal)}",
            f"- converted: {count([r.int8_layers for r in results], bool)}, with {total} layers in INT8 and "
            f"{loose} loose batch norms",
            f"- simulation ran: {count([r.simulation_sqnr for r in results], lambda _: True)}; kernels ran: "
            f"{count([r.kernels_sqnr for r in results], lambda _: True)}",
        ]
    )


def _row(result: Result) -> tuple[str, ...]:
    return (
        result.name.removeprefix(TORCHVISION),
        str(result.size),
        _number(result.prepare_seconds, ".1f"),
        _difference(result.batch_error),
        _difference(result.sample_error),
        _difference(result.training_error),
        _number(None if result.int8_share is None else 100 * result.int8_share, ".1f"),
        _number(result.int8_layers, "d"),
        "" if result.int8_layers is None else str(sum(result.float_layers.values())),
        _number(result.loose_norms, "d"),
        _number(result.simulation_sqnr, ".0f"),
        _number(result.rounding_sqnr, ".0f"),
        _number(result.kernels_sqnr, ".0f"),
    )


def _float_layers(results: Sequence[Result]) -> str:
    rows: Counter[str] = Counter()
    where: dict[str, list[str]] = defaultdict(list)
    for result in results:
        for reason, number in result.float_layers.items():
            rows[reason] += number
            where[reason].append(result.name.removeprefix(TORCHVISION))
    lines = []
    for reason, number in rows.most_common():
        kind, _, why = reason.partition(": ")
        names = where[reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append((kind, why, str(number), ", ".join(names[:3]) + more))
    return _table(("operator", "reason", "rows", "networks"), lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _difference(value: float | None) -> str:
    if value is None:
        return ""
    if value <= EQUAL:
        return "="
    return "None-ness" if math.isinf(value) else f"{100 * value:.2g} %" if value < 10 else f"{value:.1g}×"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(headers), "|" + "---|" * len(headers), *(line(row) for row in rows)])
