"""Several processes: what they agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed as dist

#: Longer than any conversion or evaluation that the others wait for; if a process dies, its connections break.
_PATIENCE = timedelta(days=7)

T = TypeVar("T")

_is_alone: ContextVar[bool] = ContextVar("_is_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works by itself: nothing is agreed on or shared with the others, which wait elsewhere."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def world_size() -> int:
    """How many processes take part; 1 where ``torch.distributed`` is not in use, and inside :func:`alone`."""
    if _is_alone.get():
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(value: T) -> list[T]:
    """What every process has for ``value``, in their order; all of them have to call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    group = _new_group()
    dist.all_gather_object(values, value, group=group)
    dist.destroy_process_group(group)
    return values


def _new_group() -> Any:
    # Waiting takes as long as the slowest process, but a GPU's collectives give up after minutes.
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """Leave the body together: every process waits for the others, and if one fails, all do.

    Without this, a process that raises leaves the others waiting in their next collective operation until it times out.
    All processes have to enter it, and the body must hold no collective operation that a failure would skip.

    Args:
        what: what the body does, for the message: ``"calibrating"``.

    Raises:
        RuntimeError: where the body succeeded here and failed in another process, with that process's error.
    """
    if world_size() == 1:
        yield
        return
    group = _new_group()
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        said = None if failure is None else f"{type(failure).__name__}: {failure}"
        everybody: list[str | None] = [None] * world_size()
        try:
            dist.all_gather_object(everybody, said, group=group)
            dist.destroy_process_group(group)
        except Exception:
            if failure is None:
                raise
        if failure is None and any(everybody):
            rank, reason = next((rank, reason) for rank, reason in enumerate(everybody) if reason)
            raise RuntimeError(f"{what} failed in process {rank}: {reason}")
