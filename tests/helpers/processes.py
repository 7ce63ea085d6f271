"""Real processes that start fast: forked from one that has imported everything and run nothing."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lq.callback", "helpers.runs"])


def start(function: Callable[..., None], *args: Any, output: Path) -> BaseProcess:
    """Run ``function(*args)`` in a process of its own; what it prints goes to the file ``output``."""
    process = _CONTEXT.Process(target=_run, args=(function, args, str(output)))
    process.start()
    return process


def finish(process: BaseProcess, output: Path, timeout: float = 120.0) -> None:
    """Wait for the end of a process, which has to be a happy one."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode == 0, output.read_text()[-4000:]


def _run(function: Callable[..., None], args: tuple[Any, ...], output: str) -> None:
    import torch

    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Two of them run side by side, and a network as small as these gains nothing from threads.
    torch.set_num_threads(1)
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
