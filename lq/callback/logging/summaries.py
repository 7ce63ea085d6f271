"""Single entries of an event file."""

from __future__ import annotations

from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from lq.charts.chart import Chart
from lq.numerics.histogram import Histogram

#: Bars of a histogram.
BINS = 80


def add_chart(writer: Any, tag: str, chart: Chart, step: int, dpi: int = 100) -> None:
    """A figure, as PNG; without pyplot, which ``add_figure`` would import."""
    content = chart.png(dpi=dpi)
    width, height = (int.from_bytes(content[place : place + 4], "big") for place in (16, 20))  # of PNG's first chunk
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=content)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def add_graph(writer: Any, graph: GraphDef) -> None:
    """A graph that is there already, which ``add_graph`` of the writer would trace with TorchScript."""
    writer._get_file_writer().add_event(Event(graph_def=graph.SerializeToString()))


def add_values(writer: Any, tag: str, values: Tensor, step: int) -> None:
    """A histogram of a tensor's values."""
    flat = values.detach().float().flatten()
    low, high = float(flat.min()), float(flat.max())
    if low == high:
        high = low + max(abs(low), 1.0) * 1e-6
    counts = torch.histc(flat, BINS, low, high)
    edges = torch.linspace(low, high, BINS + 1)[1:]
    _add(writer, tag, counts, edges, low, high, float(flat.sum()), float(flat.square().sum()), step)


def add_histogram(writer: Any, tag: str, histogram: Histogram, step: int) -> None:
    """The histogram that an observer collected."""
    merged = max(1, -(-len(histogram.counts) // BINS))
    padding = -len(histogram.counts) % merged
    counts = torch.nn.functional.pad(histogram.counts, (0, padding)).reshape(-1, merged).sum(1)
    edges = histogram.upper[0] + histogram.width * (merged * torch.arange(1, len(counts) + 1) - 1)
    centres = histogram.centers()
    total, squares = histogram.counts @ centres, histogram.counts @ centres.square()
    low, high = float(histogram.low), float(histogram.high)
    _add(writer, tag, counts, edges, low, high, float(total), float(squares), step)


def _add(
    writer: Any,
    tag: str,
    counts: Tensor,
    edges: Tensor,
    low: float,
    high: float,
    total: float,
    squares: float,
    step: int,
) -> None:
    writer.add_histogram_raw(
        tag,
        min=low,
        max=high,
        num=float(counts.sum()),
        sum=total,
        sum_squares=squares,
        bucket_limits=edges.tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
