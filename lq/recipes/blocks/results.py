"""The end of a recipe: what it prints and writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch

from lq.callback import QuantizationResult
from lq.util.cpu import cpu_name
from lq.util.files import write_text


def print_result(result: QuantizationResult, data: str, notes: dict[str, str]) -> None:
    """Print what the fit's table (printed already) is about, and where its files are."""
    print(f"\nData: {data}")
    for name, value in notes.items():
        print(f"{name + ':':20s} {value}")


def save_results(output: Path, config: Any, results: Mapping[str, Any]) -> Path:
    """Write a recipe's results to ``results.json``, with its config and the machine.

    Args:
        output: the folder.
        config: of the recipe, a dataclass.
        results: dataclasses, paths and plain values by name; what is None is left out.

    Returns:
        The path of the file.
    """
    versions = {"torch": torch.__version__, "lightning": lightning.__version__}
    values = {name: value for name, value in results.items() if value is not None}
    everything = {"config": config, "machine": cpu_name(), "versions": versions, **values}
    path = output / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(everything, indent=2, default=_plain) + "\n")
    return path


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return str(value)
