"""What a check of a program ends in, and which of lq's errors are an answer rather than a crash."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lq

_LQ = str(Path(lq.__file__).parent)


class Failure(Exception):  # noqa: N818
    """lq computes something else than eager PyTorch does, or crashes.

    Args:
        check: name of the check.
        kind: what is wrong, in words that other programs with the same fault share.
        details: numbers and a traceback.
    """

    def __init__(self, check: str, kind: str, details: str = "") -> None:
        super().__init__(f"{check}: {kind}\n{details}")
        self.check, self.kind, self.details = check, kind, details

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled with the message alone, and this one goes from one process to another.
        return type(self), (self.check, self.kind, self.details)


class Refusal(Exception):  # noqa: N818
    """lq says by an error of its own that it does not take the program."""

    def __init__(self, check: str, error: str, details: str) -> None:
        super().__init__(f"{check}: {error}: {details}")
        self.check, self.error, self.details = check, error, details


@dataclass
class Outcome:
    """What became of one program.

    Args:
        seed: of the program.
        status: ``"whole"``: every convolution and linear layer is quantized; ``"part"``: some stay float;
            ``"refused"``: ``lq.prepare`` does not take it; ``"failure"``.
        failure: where it is one.
        refusals: checks and errors, those of later steps than ``lq.prepare`` included.
        seconds: by check.
    """

    seed: int
    status: str = "refused"
    failure: Failure | None = None
    refusals: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def answers(check: str) -> Iterator[None]:
    """Around a call of lq: its own errors become a :class:`Refusal`, all others a :class:`Failure`."""
    try:
        yield
    except (Failure, Refusal):
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        if is_refusal(error):
            raise Refusal(check, type(error).__name__, text) from error
        where = traceback.extract_tb(error.__traceback__)[-1]
        details = "".join(traceback.format_exception(error, limit=-4)).strip()[-3000:]
        kind = f"crash, {type(error).__name__} in {Path(where.filename).name}: {_without_numbers(text.splitlines()[0])}"
        raise Failure(check, kind, details) from error


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", text)[:100]


def is_refusal(error: BaseException) -> bool:
    """Whether an error is one of lq's own: a class of its own, or a built-in one that lq raises in so many words."""
    if type(error).__module__.split(".")[0] == "lq":
        return True
    if not isinstance(error, ValueError | TypeError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    # A TypeError that Python raises within lq's code is a crash; one of a `raise` statement there is not.
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return frame.filename.startswith(_LQ) and line.startswith("raise ")


def has_vnni() -> bool:
    """Whether INT8 kernels are to be trusted with 8-bit weights on this CPU."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: True)())
