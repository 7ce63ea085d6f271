"""What values a quantized tensor takes, and what its range and its grid make of them."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from lq.charts.theme import Theme, get_theme, legend, new_figure, nothing_to_show, style
from lq.numerics.functional import fake_quantize
from lq.numerics.histogram import Histogram
from lq.numerics.observers import HistogramObserver
from lq.numerics.quantizer import Quantizer

#: Bars of a histogram.
_BINS = 160


def tensor_histogram(
    name: str, quantizer: Quantizer, theme: str | Theme = "light", observer: HistogramObserver | None = None
) -> Figure:
    """The values that a quantizer has seen (log scale), with its range marked and another colour outside it.

    Args:
        name: of the quantizer.
        quantizer: of one range.
        theme: ``"light"`` or ``"dark"``.
        observer: statistics of the tensor; by default those of the quantizer itself.

    Raises:
        ValueError: where no histogram was collected.
    """
    theme = get_theme(theme)
    seen = observer or quantizer.observer
    if not isinstance(seen, HistogramObserver):
        raise ValueError(f"the quantizer {name!r} has a {type(seen).__name__}, which keeps no histogram; give observer")
    histogram = Histogram.of(seen)
    total = float(histogram.counts.sum())
    if not total:
        return nothing_to_show(theme, name, "nothing was observed")
    centers, counts, width = _coarse(histogram)
    figure, axes = _panel(theme, name)
    outside = torch.zeros(len(counts), dtype=torch.bool)
    if quantizer.calibrated:
        low, high = (float(end) for end in quantizer.quantized_range())
        step = float(quantizer.scale)
        # Values beyond the last step, but within half of one, are rounded and not clipped.
        outside = (centers < low - step / 2) | (centers > high + step / 2)
        look = {"color": theme.text, "linewidth": 1.2, "linestyle": (0, (4, 2))}
        axes.axvline(low, **look, label=f"range [{low:.4g}, {high:.4g}], step {step:.3g}")
        axes.axvline(high, **look)
    edges = torch.cat([centers - width / 2, centers[-1:] + width / 2]).tolist()
    share = float(counts[outside].sum() / total)
    for chosen, color, label in (
        (~outside, theme.int8, "inside"),
        (outside, theme.alarm, f"outside, {share:.3%} of the values"),
    ):
        if chosen.any():
            axes.stairs((counts * chosen / total).tolist(), edges, fill=True, color=color, label=label)
    _finish(axes, theme, "value of the float tensor")
    return figure


def _panel(theme: Theme, title: str) -> tuple[Figure, Any]:
    """A small figure of fixed layout: there is one for each quantizer, and finding a layout takes most of the time."""
    figure = new_figure(theme, 6, 2.7, title)
    figure.set_layout_engine("none")
    return figure, figure.add_axes((0.13, 0.3, 0.85, 0.58))


def _finish(axes: Any, theme: Theme, xlabel: str) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high / 300), high)  # at least two powers of ten, or no tick has a label
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:g}")  # powers of ten would take a third of the time
    style(axes, theme, xlabel, "share of values per bar")
    legend(axes, theme, loc="upper left", bbox_to_anchor=(-0.02, -0.24), ncols=3)


def _coarse(histogram: Histogram) -> tuple[Tensor, Tensor, float]:
    """Centres, counts and width of at most :data:`_BINS` bins."""
    merged = max(1, -(-len(histogram.counts) // _BINS))
    padding = -len(histogram.counts) % merged
    counts = torch.nn.functional.pad(histogram.counts, (0, padding)).reshape(-1, merged).sum(1)
    width = float(histogram.width) * merged
    first = float(histogram.upper[0]) - float(histogram.width)
    centers = first + width * (torch.arange(len(counts)).double() + 0.5)
    return centers, counts, width


def weight_histogram(name: str, weight: Tensor, quantizer: Quantizer, theme: str | Theme = "light") -> Figure:
    """The weight's values before (outline) and after rounding to the grid (filled), log scale.

    Args:
        name: of the quantizer.
        weight: of the layer, any shape.
        quantizer: of the weight, calibrated.
        theme: ``"light"`` or ``"dark"``.
    """
    theme = get_theme(theme)
    before = weight.detach().float().cpu()
    with torch.no_grad():
        after = fake_quantize(before, quantizer.scale.cpu(), quantizer.zero_point.cpu(), quantizer.spec)
    noise = float((before - after).double().square().sum())
    signal = float(before.double().square().sum())
    ratio = "" if noise == 0 or signal == 0 else f", SQNR {10 * torch.log10(torch.tensor(signal / noise)):.1f} dB"
    figure, axes = _panel(theme, f"{name}{ratio}")
    reach = float(torch.maximum(before.abs().max(), after.abs().max())) or 1.0
    edges = torch.linspace(-reach, reach, 102)
    for values, color, filled, label in (
        (after, theme.int8, True, "after rounding"),
        (before, theme.float_, False, "before"),
    ):
        counts = torch.histc(values, bins=101, min=-reach, max=reach) / values.numel()
        look = {"fill": True, "alpha": 0.75} if filled else {"linewidth": 1.3}
        axes.stairs(counts.tolist(), edges.tolist(), color=color, label=label, **look)
    _finish(axes, theme, "value of the weight")
    return figure
