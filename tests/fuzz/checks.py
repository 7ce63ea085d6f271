"""The pipeline: a program through the public steps of lq, each compared with eager PyTorch."""

from __future__ import annotations

import io
import logging
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch

from .file_checks import check_files
from .float_checks import check_evaluation, check_training, check_unprepare, is_whole, prepared
from .int8_checks import Quantized, check_int8
from .outcome import Failure, Outcome, Refusal
from .program import Program
from .qat_checks import check_qat

#: Names of the checks, in their order.
CHECKS = ("prepare", "train", "int8", "files", "qat")


def check_program(program: Program, checks: Collection[str] = CHECKS) -> Outcome:
    """Run a program through the checks, up to the first failure."""
    outcome = Outcome(program.seed)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _silent():
        warnings.simplefilter("ignore")  # lq may warn of what it does; what it computes is looked at here
        try:
            _run(program, checks, outcome)
        except Failure as failure:
            outcome.status, outcome.failure = "failure", failure
        except Exception as error:  # of eager PyTorch: the program is none
            details = "".join(traceback.format_exception(error, limit=-4))[-3000:]
            outcome.status = "failure"
            outcome.failure = Failure("program", f"{type(error).__name__} in eager PyTorch", details)
    return outcome


@contextmanager
def _silent() -> Iterator[None]:
    """Without what torch.export logs, and prints, of every program that it does not take."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _run(program: Program, checks: Collection[str], outcome: Outcome) -> None:
    def timed(name: str, run: Callable[[], None]) -> bool:
        start = time.perf_counter()
        try:
            run()
        except Refusal as refusal:
            outcome.refusals.append((refusal.check, refusal.error))
            return False
        finally:
            outcome.seconds[name] = outcome.seconds.get(name, 0) + time.perf_counter() - start
        return True

    def prepare_once() -> None:
        nonlocal model
        model = prepared(program)
        outcome.status = "whole" if is_whole(model) else "part"
        check_evaluation(program, model)

    def int8() -> None:
        nonlocal quantized
        quantized = check_int8(program)

    model = torch.nn.Module()
    quantized: Quantized | None = None
    if not timed("prepare", prepare_once):
        return
    if "train" in checks and timed("train", lambda: check_training(program, model)):
        timed("train", lambda: check_unprepare(program, model))
    if "int8" in checks or "files" in checks:
        timed("int8", int8)
    if "files" in checks and quantized is not None:
        timed("files", lambda: check_files(program, quantized, outcome.refusals))
    if "qat" in checks:
        timed("qat", lambda: check_qat(program))
