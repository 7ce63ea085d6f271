"""What a module of a test notes of its calls."""

from __future__ import annotations

from typing import Any


class Notes:
    """A list of notes, which stay: lists and numbers that a module keeps itself are put back when lq has called it."""

    def __init__(self) -> None:
        self.all: list[Any] = []

    def add(self, note: Any) -> None:
        self.all.append(note)
