"""What was tried to reach an accuracy, step by step, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from lq.util.display import as_text


@dataclass(frozen=True)
class TuningStep:
    """One INT8 network that was evaluated.

    Args:
        change: what is new in it, in words.
        metric: of the INT8 network.
        drop: by how much that is worse than the float model's, in the metric's own units.
        seconds: to make and to evaluate it; of the first step that needs a method, with what the method takes.
        calibrator: of the ranges.
        methods: what the weights and biases went through, in order.
        float_layers: names of the layers that stayed in float for the accuracy's sake.
        latency_ms: median wall time of a forward with one sample on the engine that judged; None where it was not
            measured. The steps were timed one after another: other work on the machine shows.
        fine_tuned: whether the network was trained with fake-quantizers, from the weights and ranges of the others.
    """

    change: str
    metric: float
    drop: float
    seconds: float
    calibrator: str
    methods: tuple[str, ...] = ()
    float_layers: tuple[str, ...] = ()
    latency_ms: float | None = None
    fine_tuned: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TuningStep:
        """The step of which :func:`dataclasses.asdict` gave ``values``, also after a round trip through JSON."""
        return cls(**{**values, "methods": tuple(values["methods"]), "float_layers": tuple(values["float_layers"])})


@dataclass(frozen=True)
class Tuning:
    """The way to an accuracy; ``str(tuning)`` is a table of the steps.

    Args:
        metric_name: what to call the metric.
        float_metric: of the float model.
        allowed_drop: by how much INT8 may be worse, in the metric's own units.
        steps: in the order they were tried.
        chosen: index of the step that was taken.
        ended: why no more was tried.
        runtime: the engine that judged, as :func:`lq.load` calls it.
    """

    metric_name: str
    float_metric: float
    allowed_drop: float
    steps: tuple[TuningStep, ...]
    chosen: int
    ended: str
    runtime: str = "torch"

    @property
    def step(self) -> TuningStep:
        """The one that was taken."""
        return self.steps[self.chosen]

    @property
    def met(self) -> bool:
        """Whether the drop is within what was allowed."""
        return self.step.drop <= self.allowed_drop

    @property
    def shortfall(self) -> float:
        """By how much the drop is larger than allowed, in the metric's own units; 0 where it is not."""
        return max(0.0, self.step.drop - self.allowed_drop)

    @property
    def float_layers(self) -> tuple[str, ...]:
        """The layers that stayed in float for the accuracy's sake, the most harmful first."""
        return self.step.float_layers

    @property
    def evaluations(self) -> int:
        """How often the metric was measured, with the float model."""
        return len(self.steps) + 1

    @property
    def verdict(self) -> str:
        """How it ended, in a sentence or two."""
        step = self.step
        how = "meets" if self.met else f"falls short by {self.shortfall:.4g} of"
        text = (
            f"{self.metric_name} {step.metric:.4g} {how} the allowed drop of {self.allowed_drop:.4g} from "
            f"{self.float_metric:.4g} in float, as {self.runtime!r} runs it; {self.ended}"
        )
        if step.float_layers:
            text += f". In float: {', '.join(step.float_layers)}{self._cost}"
        return text

    @property
    def _cost(self) -> str:
        """What the layers in float cost, in words."""
        whole = self.steps[0].latency_ms  # no layer is in float for the accuracy's sake
        if self.step.latency_ms is None or whole is None:
            return ""
        return f", which takes {self.step.latency_ms:.3g} ms for one sample, without them {whole:.3g}"

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows of the table of steps; the second and later columns are numbers."""
        headers = ["change", self.metric_name, "drop", "layers in float", "p50, ms", "seconds"]
        rows = []
        for step in self.steps:
            latency = "" if step.latency_ms is None else f"{step.latency_ms:.3g}"
            numbers = [f"{step.metric:.4f}", f"{step.drop:+.4f}", str(len(step.float_layers)), latency]
            rows.append([step.change, *numbers, f"{step.seconds:.1f}"])
        return headers, rows

    def table(self) -> Table:
        headers, rows = self.cells()
        table = Table(title=f"float {self.float_metric:.4f}, allowed drop {self.allowed_drop:.4g}")
        table.add_column("", justify="center")
        for index, header in enumerate(headers):
            table.add_column(header, justify="right" if index else "left", overflow="fold")
        for index, row in enumerate(rows):
            table.add_row("*" if index == self.chosen else "", *row)
        table.caption = self.verdict
        return table

    def __str__(self) -> str:
        return as_text(self.table(), 120)

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tuning:
        """The tuning that :meth:`to_dict` gave, also after a round trip through JSON."""
        return cls(**{**values, "steps": tuple(map(TuningStep.from_dict, values["steps"]))})
