"""What a process of ``python -m tests.fuzz`` does: a module of its own, since a process that is spawned imports it."""

from __future__ import annotations

import os

import torch

from .checks import check_program
from .generate import generate
from .outcome import Outcome


def one_thread() -> None:
    """The tensors are small: threads would wait for each other for most of the time."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def run(seed: int, longest: int, checks: tuple[str, ...]) -> Outcome:
    return check_program(generate(seed, longest), checks)
