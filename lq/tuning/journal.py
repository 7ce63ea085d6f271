"""The steps of a search, in a file: what was evaluated before a process was killed is not evaluated again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lq.errors import MissingRuntimeError
from lq.results.tuning import TuningStep
from lq.tuning.builder import LEARNED_ROUNDING, Choice, tensors_of
from lq.tuning.judged import check_runtime
from lq.util.distribution import package_version
from lq.util.files import write_text
from lq.workflow.prepare import prepared_forward

_FORMAT = "lq search"


class Journal:
    """The steps that a file has of one search, and those that are added to it.

    Args:
        path: the file; it need not be there.
        key: says what is searched for, see :func:`search_key`. Steps of another search are forgotten.

    Attributes:
        runtime: the engine that judged those steps; None without any.

    Raises:
        ValueError: where there is a file of another kind at ``path``.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.runtime: str | None = None
        self._key = key
        self._steps: dict[Choice, TuningStep] = {}
        if not path.exists():
            return
        written = _read(path)
        if written.get("key") != key:
            return
        try:
            steps = [TuningStep.from_dict(values) for values in written["steps"]]
            check_runtime(written["runtime"], "runtime")
        except (ValueError, TypeError, KeyError, MissingRuntimeError):  # of a machine with other engines
            return
        self.runtime = written["runtime"]
        for step in steps:
            self._keep(step)

    def __len__(self) -> int:
        return len(self._steps)

    def step(self, choice: Choice) -> TuningStep | None:
        """The step that ``choice`` was evaluated in, if it was."""
        return self._steps.get(choice)

    def add(self, step: TuningStep, runtime: str) -> None:
        """Write ``step`` to the file.

        Raises:
            OSError: where the file cannot be written.
        """
        self._keep(step)
        self.runtime = runtime
        steps = [asdict(each) for each in self._steps.values()]
        values = {"format": _FORMAT, "key": self._key, "runtime": runtime, "steps": steps}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(values, indent=1))

    def _keep(self, step: TuningStep) -> None:
        # What is learnt or trained is another network the next time.
        if step.fine_tuned or LEARNED_ROUNDING in step.methods:
            return
        self._steps[Choice(step.calibrator, step.methods, step.float_layers)] = step


def check_journal(path: Path) -> None:
    """Refuse a file that is there, and is none that a :class:`Journal` may replace.

    Raises:
        ValueError: where that is so.
    """
    if path.exists():
        _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        is_ours = written["format"] == _FORMAT
    except (OSError, ValueError, TypeError, KeyError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"journal={str(path)!r} holds no steps of a search, and would be replaced: name another file")
    return dict(written)


def search_key(model: nn.Module, about: Mapping[str, Any]) -> str:
    """A hash of the parameters and buffers of ``model`` and of what else decides about the steps.

    Args:
        model: prepared, with the weights of the float model; its target and overrides are a part of the hash.
        about: values whose ``repr`` tells two searches apart.
    """
    forward = prepared_forward(model)
    settings = {**about, "target": forward.target, "overrides": forward.overrides, "version": package_version()}
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for name, tensor in tensors_of(model).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            # As bytes, for numpy has no bfloat16.
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
