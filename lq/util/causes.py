"""What an exception of another library says, in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of a message; the exception's class where there is none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """The exception that all the others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
