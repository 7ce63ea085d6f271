"""The engine that judges INT8 networks, and a network as that engine runs it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lq.analysis.samples import first_samples
from lq.deployment.engine_module import IN_PROCESS, EngineModule, call_by_name
from lq.deployment.export import export
from lq.deployment.formats import FORMATS, RUNTIMES, best_format
from lq.deployment.load import load
from lq.errors import MissingRuntimeError
from lq.int8.module import Int8Module
from lq.schemes.targets import Target
from lq.timing.measure import measure
from lq.util.distribution import install

_log = logging.getLogger("lq")

#: The choice of the engine that is the fastest here.
FASTEST = "auto"

#: About how long to time a network for one sample, seconds.
_SECONDS = 0.2


def check_runtime(runtime: str, name: str = "runtime") -> None:
    """Refuse an engine that cannot judge.

    Args:
        runtime: what the user gave.
        name: the argument's name.

    Raises:
        ValueError: where it is none of the choices.
        MissingRuntimeError: where its package is not installed; the message names the extra.
    """
    if runtime == FASTEST:
        return
    if runtime not in RUNTIMES:
        raise ValueError(f"{name}={runtime!r} is unknown; choose one of {FASTEST!r}, {', '.join(map(repr, RUNTIMES))}")
    format = best_format(runtime)
    engine = format.runtime(runtime)
    assert engine is not None
    if not engine.is_installed:
        raise MissingRuntimeError(
            f"{name}={runtime!r}: {engine.package} is not installed; install it with: {install(engine.extra)}"
        )
    format.check_dependencies(False)


class Judge:
    """Has INT8 networks run by one engine.

    Args:
        runtime: what :func:`lq.load` calls it; ``"auto"`` for the one of ``formats`` that takes the least time for one
            sample of the first network that is judged.
        formats: names of the formats to choose from. Those that take a compiler tens of seconds are left out.
        target: the engine family that files are placed for; by default the model's own.

    Attributes:
        runtime: the engine, once a network has been judged.
    """

    def __init__(self, runtime: str, formats: Sequence[str] = tuple(FORMATS), target: Target | None = None) -> None:
        self.runtime = runtime
        self._formats = formats
        self._target = target

    def network(self, model: nn.Module, int8: Int8Module) -> nn.Module:
        """``int8`` as the engine runs it; itself where that is in process.

        Args:
            model: prepared; what ``int8`` was just converted from.
            int8: its conversion.
        """
        if self.runtime == FASTEST:
            self.runtime = self._fastest(model, int8)
        if self.runtime == IN_PROCESS:
            return int8
        with tempfile.TemporaryDirectory() as folder:
            network = EngineModule(int8, self._deployed(model, self.runtime, Path(folder)))
        network.stand_in_for(model)
        return network

    def latency(self, int8: Int8Module, network: nn.Module) -> float | None:
        """Median wall time of a forward with one sample, ms; None where the network takes no single one."""
        try:
            return _latencies({"": partial(call_by_name, int8, network)}, int8)[""]
        except Exception as error:
            _log.debug("lq: a call with one sample failed: %s", error)
            return None

    def _fastest(self, model: nn.Module, int8: Int8Module) -> str:
        quick = [name for name in self._formats if not FORMATS[name].takes_long]
        runs: dict[str, Callable[..., Any]] = {IN_PROCESS: partial(call_by_name, int8, int8)}
        with tempfile.TemporaryDirectory() as folder:
            for runtime in dict.fromkeys(name for each in quick for name in FORMATS[each].installed_runtimes()):
                if runtime == IN_PROCESS:
                    continue
                try:
                    run = self._deployed(model, runtime, Path(folder), quick)
                    run(**first_samples(int8.example_inputs, 1))
                    runs[runtime] = run
                except Exception as error:
                    _log.info("lq: %s does not judge: %s", runtime, " ".join(str(error).split())[:200])
        try:
            times = _latencies(runs, int8)
        except Exception as error:
            _log.debug("lq: a call with one sample failed: %s", error)
            return IN_PROCESS
        return min(times, key=times.__getitem__)

    def _deployed(
        self, model: nn.Module, runtime: str, folder: Path, formats: Sequence[str] | None = None
    ) -> Callable[..., Any]:
        having = [name for name in formats or self._formats if FORMATS[name].runtime(runtime) is not None]
        format = best_format(runtime, having or FORMATS)
        path = folder / format.file
        if not path.exists():
            export(model, path, format=format.name, target=self._target, verify=False)
        # As many threads as in process.
        return load(path, runtime, threads=torch.get_num_threads())


def _latencies(runs: dict[str, Callable[..., Any]], int8: Int8Module) -> dict[str, float]:
    one = first_samples(int8.example_inputs, 1)
    return {name: timing.p50_ms for name, timing in measure(runs, one, 1, seconds=_SECONDS * len(runs)).items()}
