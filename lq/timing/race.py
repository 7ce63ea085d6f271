"""Timing contenders side by side, each in a process of its own.

In one process, engines' thread pools and settings interfere with each other, and their memory cannot be measured
separately. So each contender lives in its own process, and the processes take turns: noise disturbs all alike, and
ratios hold where milliseconds do not.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lq.errors import ContenderError
from lq.timing.measure import Timing
from lq.timing.turns import PAUSE, Turns


@dataclass(frozen=True)
class Measurement:
    """What one contender showed.

    Args:
        timing: wall time of a call.
        memory_bytes: peak resident memory of its process beyond what it was before the model was loaded.
        classes: index of the largest output of each sample.
    """

    timing: Timing
    memory_bytes: int
    classes: Tensor = field(repr=False)


def race(
    contenders: Mapping[str, Callable[[], Callable[..., Any]]],
    inputs: Sequence[Any],
    *,
    threads: int | None = None,
    seconds: float = 2.0,
    sleep: float = 0.0,
    samples: Sequence[Any] = (),
    environment: Mapping[str, str] | None = None,
) -> dict[str, Measurement | ContenderError]:
    """Time contenders on the same inputs, taking turns.

    Args:
        contenders: by name, a function that makes the model; called in its process, so it must pickle.
        inputs: the arguments of a call: tensors whose first axis is the batch.
        threads: how many CPU threads torch has in each process (other engines take their own settings), or None for
            its own choice.
        seconds: about how long to time each contender.
        sleep: seconds to sleep before each call that is timed, as in a server that waits for requests: threads that
            have gone to sleep have to wake up, which costs some engines more than the call itself.
        samples: arguments of further calls, from which only the classes are kept.
        environment: variables that the processes start with besides this one's, such as those that OpenMP reads once.

    Returns:
        A measurement for each contender, or what went wrong in its process.
    """
    context = multiprocessing.get_context("spawn")
    results: dict[str, Measurement | ContenderError] = {}
    with ExitStack() as stack:
        runners: dict[str, _Runner] = {}
        for name, make in contenders.items():
            with _environment(environment or {}):
                runners[name] = stack.enter_context(_Runner(context, name, make, threads))
        # One after another: compiling and loading on all cores at once can exhaust the memory.
        for name, runner in list(runners.items()):
            try:
                runner.call("prepare", (tuple(inputs), sleep))
            except ContenderError as error:
                results[name] = error
                del runners[name]
        times: dict[str, list[float]] = {name: [] for name in runners}
        order = list(runners)
        generator = random.Random(0)
        deadline = time.perf_counter() + seconds * len(order)
        rounds = 0
        while order and (rounds < 3 or time.perf_counter() < deadline):
            generator.shuffle(order)
            for name in list(order):
                try:
                    times[name] += runners[name].call("turn", None)
                except ContenderError as error:
                    results[name] = error
                    order.remove(name)
                time.sleep(PAUSE)
            rounds += 1
        for name in order:
            try:
                memory = runners[name].call("memory", None)
                classes = torch.from_numpy(runners[name].call("classes", tuple(samples)))
                results[name] = Measurement(Timing.of(times[name], len(tree_leaves(inputs)[0])), memory, classes)
            except ContenderError as error:
                results[name] = error
    return {name: results[name] for name in contenders}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that a process started now inherits."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Runner:
    """The parent's end of one contender."""

    def __init__(self, context: Any, name: str, make: Callable[[], Callable[..., Any]], threads: int | None) -> None:
        self._name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, threads), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def call(self, what: str, argument: Any) -> Any:
        """Let the process do something, and wait for its answer."""
        # Arrays, not tensors, which would go through shared memory and its limits.
        argument = tree_map(lambda value: value.numpy() if isinstance(value, Tensor) else value, argument)
        try:
            self._connection.send((what, argument))
            failed, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise ContenderError(f"{self._name}: its process ended with code {self._process.exitcode}") from error
        if failed:
            raise ContenderError(f"{self._name}: {answer}")
        return answer


def _serve(connection: Connection, make: Callable[[], Callable[..., Any]], threads: int | None) -> None:
    """The process of one contender: does what it is told until the connection closes."""
    if threads is not None:
        torch.set_num_threads(threads)
    server = _Server(make)
    while True:
        try:
            what, argument = connection.recv()
        except (EOFError, OSError):
            return
        try:
            with torch.no_grad():
                connection.send((False, getattr(server, what)(argument)))
        except Exception:
            connection.send((True, traceback.format_exc()))


class _Server:
    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self._make = make

    def prepare(self, given: tuple[tuple[Any, ...], float]) -> None:
        arrays, sleep = given
        inputs = tree_map(torch.from_numpy, arrays)
        before = _memory("VmRSS")
        self._model = self._make()
        self._turns = Turns(lambda: self._model(*inputs), sleep)
        self._memory = _memory("VmHWM") - before

    def turn(self, _: None) -> list[float]:
        return self._turns.turn()

    def memory(self, _: None) -> int:
        return self._memory

    def classes(self, samples: tuple[Any, ...]) -> np.ndarray:
        classes = [np.empty(0, dtype=np.int64)]
        for batch in samples:
            arguments = batch if isinstance(batch, tuple) else (batch,)
            scores = tree_leaves(self._model(*tree_map(torch.from_numpy, arguments)))[0]
            classes.append(np.asarray(scores.argmax(1)))
        return np.concatenate(classes)


def _memory(key: str) -> int:
    """Resident memory of this process in bytes: ``"VmRSS"`` now, ``"VmHWM"`` at its peak; 0 if not reported.

    Not ``getrusage``, whose peak is the parent's for a process that was just started from it.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0
