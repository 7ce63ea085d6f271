"""Running the network on every engine that is installed: how long a call takes, and the user's own validation."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lq.callback.end.engines import EAGER, FOLDED, Engine
from lq.callback.end.joining import JoinedFile
from lq.callback.steps.batches import repeat_samples
from lq.callback.steps.stages import StagedUnit
from lq.deployment.engine_module import IN_PROCESS, EngineModule, call_by_name
from lq.deployment.formats import FORMATS, best_format
from lq.deployment.load import load
from lq.graph.cropping import crop_kernels
from lq.int8.module import Int8Module
from lq.timing.measure import Timing, measure
from lq.util.modes import evaluating
from lq.workflow.fold import folded_float
from lq.workflow.prepare import unprepared

#: The user's validation runs on one engine after another for so long, seconds; those that come later, and would take
#: longer, are judged by their classes for a few samples alone.
VALIDATION_SECONDS = 60.0


@dataclass
class Contender:
    """An engine with the network loaded.

    Args:
        engine: what is known of it.
        run: takes the forward's inputs, by name, and none of its settings; None where it could not be loaded.
        inputs: examples of these, where they are others than the unit's.
    """

    engine: Engine
    run: Callable[..., Any] | None
    inputs: Mapping[str, Any] | None = None


def contenders(unit: nn.Module, int8: Int8Module, files: Sequence[JoinedFile]) -> list[Contender]:
    """The float model as it is and folded, INT8 in process, and each file on each engine that is installed for it.

    Args:
        unit: prepared, on the CPU.
        int8: what it was converted to.
        files: what was written of it.
    """
    with unprepared(unit):
        eager = Engine(EAGER, size_bytes=_state_bytes(unit))
    engines = [Contender(eager, partial(call_by_name, int8, unit))]
    try:
        folded: nn.Module = crop_kernels(folded_float(unit), int8.example_inputs)
        engine = Engine(FOLDED, size_bytes=_state_bytes(folded))
        engines.append(Contender(engine, lambda **inputs: folded(*inputs.values())))
    except Exception as error:
        engines.append(Contender(Engine(FOLDED, note=_reason(error)), None))
    formats = [file.export.format for file in files]
    for file in files:
        written = file.export
        for runtime in FORMATS[written.format].installed_runtimes():
            if best_format(runtime, formats).name != written.format:
                continue
            engine = Engine(runtime, file=written.path.name, size_bytes=written.size_bytes)
            if runtime == IN_PROCESS:
                engines.append(Contender(engine, partial(call_by_name, int8, int8)))
                continue
            try:
                # As many threads as the float model has.
                model = load(written.path, runtime, threads=torch.get_num_threads())
                engines.append(Contender(engine, model, file.inputs))
            except Exception as error:
                engines.append(Contender(replace(engine, note=_reason(error)), None))
    return engines


def time_engines(unit: nn.Module, int8: Int8Module, engines: Sequence[Contender], batch_size: int) -> None:
    """Time all for one sample and for a batch, taking turns; what fails on one is its note.

    Args:
        unit: prepared, on the CPU.
        int8: what it was converted to, for its example inputs.
        engines: with the network loaded.
        batch_size: samples in the batch.
    """
    with unprepared(unit), evaluating(unit):
        one = _time(engines, int8.example_inputs, 1)
        many = _time(engines, int8.example_inputs, batch_size)
    for contender in engines:
        runtime = contender.engine.runtime
        contender.engine = replace(contender.engine, latency=one.get(runtime), batch=many.get(runtime))


def _time(engines: Sequence[Contender], inputs: Mapping[str, Any], batch_size: int) -> dict[str, Timing]:
    running: dict[str, Callable[..., Any]] = {}
    for contender in engines:
        if contender.run is None:
            continue
        own = inputs if contender.inputs is None else contender.inputs
        run = partial(contender.run, **repeat_samples(own, batch_size))
        try:
            with torch.no_grad():
                run()
            running[contender.engine.runtime] = run
        except Exception as error:
            note = f"a call with {batch_size} sample{'s' * (batch_size > 1)} failed: {_reason(error)}"
            contender.engine = replace(contender.engine, note=contender.engine.note or note)
    return measure(running, {}, batch_size)


def validate_engines(
    staged: StagedUnit,
    int8: Int8Module,
    engines: Sequence[Contender],
    evaluate: Callable[[], dict[str, float]],
    float_seconds: float,
) -> None:
    """The user's validation with each engine in the unit's place, but for those that have it already.

    Args:
        staged: the unit, prepared.
        int8: what it was converted to.
        engines: with the network loaded.
        evaluate: gives the metrics of the LightningModule as it is.
        float_seconds: what that took with the float model: the others are expected to take no longer.
    """
    begun = time.perf_counter()
    # Float comes last: its metrics are known but for rounding.
    for contender in sorted(engines, key=lambda each: each.engine.is_float):
        if contender.engine.runtime in (EAGER, IN_PROCESS) or contender.run is None:
            continue
        if staged.parts:
            note = "not validated: the steps call the network part by part, and the file runs all parts at once"
            contender.engine = replace(contender.engine, note=contender.engine.note or note)
            continue
        if time.perf_counter() - begun + float_seconds > VALIDATION_SECONDS:
            note = f"not validated: there are {VALIDATION_SECONDS:.0f} s for all engines together"
            contender.engine = replace(contender.engine, note=contender.engine.note or note)
            continue
        try:
            with _in_place(staged, int8, contender.run):
                contender.engine = replace(contender.engine, metrics=evaluate())
        except Exception as error:
            note = f"the validation failed: {_reason(error)}"
            contender.engine = replace(contender.engine, note=contender.engine.note or note)


@contextmanager
def _in_place(staged: StagedUnit, int8: Int8Module, run: Callable[..., Any]) -> Iterator[None]:
    staged.put_int8(EngineModule(int8, run))
    try:
        yield
    finally:
        staged.take_int8_off()


def _state_bytes(module: nn.Module) -> int:
    """Size of the module's weights on disk."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
