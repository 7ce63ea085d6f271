"""Files of one network where the steps call its parts one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lq.callback.end.inspection import validation_samples
from lq.callback.settings import QuantizationSettings
from lq.callback.steps.batches import count_samples
from lq.callback.steps.between import Between, between_parts
from lq.callback.steps.calls import Step
from lq.callback.steps.stages import StagedUnit
from lq.deployment.export import ExportResult, export, network_for
from lq.deployment.formats import FORMATS, FormatName
from lq.int8.module import Int8Module
from lq.util.causes import first_line


def joined_files(settings: QuantizationSettings, trainer: Any, staged: StagedUnit, int8: Int8Module) -> Between | None:
    """What the user's step computes between the parts that it calls, for files of one network; None where it calls one
    network, or where that is no part of the files, which is said.

    Args:
        settings: say where the data are.
        trainer: the Trainer, for its data.
        staged: the unit.
        int8: its INT8 network.
    """
    if not staged.parts:
        return None
    step, samples = validation_samples(settings, trainer, staged)
    name = f"{step} of {type(staged.pl_module).__name__}"
    if not samples:
        rank_zero_info(
            f"lq: the files take the inputs of {', '.join(map(repr, staged.parts))} one by one: what {name} computes "
            f"between them can be seen with data only, and there are none"
        )
        return None
    return joined_in_step(staged, step, samples, int8)


@dataclass(frozen=True)
class JoinedFile:
    """A file, and examples of what it takes where that is not what the unit does."""

    export: ExportResult
    inputs: Mapping[str, Any] | None = None


def export_joined(
    name: FormatName, folder: Path, unit: nn.Module, int8: Int8Module, between: Between | None, **about: Any
) -> JoinedFile:
    """Write a file: of one network where ``between`` says how, of the parts where the format cannot express it.

    Args:
        name: of the format.
        folder: for the file.
        unit: prepared, with its ranges.
        int8: the INT8 network.
        between: what the step computes between the parts, see :func:`joined_files`.
        about: what :func:`lq.export` takes beside.

    Raises:
        ValueError: where the parts cannot be exported, either.
    """
    format = FORMATS[name]
    network: nn.Module = int8 if format.placed is None else unit
    if between is not None:
        try:
            whole = between.network(network_for(network, format))
            return JoinedFile(export(whole, folder / format.file, format=name, **about), between.inputs)
        except ValueError as error:
            rank_zero_warn(
                f"lq: {format.file} takes the inputs of each part that the step calls: what it computes between them "
                f"cannot be written to {format.description} ({first_line(error)})"
            )
    return JoinedFile(export(network, folder / format.file, format=name, **about))


def joined_in_step(staged: StagedUnit, step: Step, samples: list[Any], int8: Int8Module) -> Between | None:
    """As :func:`joined_files`, with data.

    Args:
        staged: the unit.
        step: which step.
        samples: batches of its data.
        int8: the INT8 network.
    """
    name = f"{step} of {type(staged.pl_module).__name__}"
    try:
        between = between_parts(staged, step, samples)
        between.network(int8)
    except Exception as error:
        rank_zero_warn(
            f"lq: files take the inputs of {', '.join(map(repr, staged.parts))} one by one, and give the results of "
            f"each: what {name} computes between them is no part of the files ({first_line(error)}). For a file of all "
            f"of it, call the network in one piece, as self(x) or as a module of its own"
        )
        return None
    if between.numbers:
        rank_zero_warn(
            f"lq: the files compute what {name} does with {', '.join(between.numbers)} of the first batch, whatever "
            f"others have there: put a tensor into the batches instead, or a number into the module"
        )
    batches = "" if between.any_batch else f", for batches of {count_samples(between.inputs)} samples alone"
    rank_zero_info(
        f"lq: the files compute what {name} does with {', '.join(map(repr, between.inputs))} up to the results of the "
        f"last part that it calls{batches}"
    )
    return between
