"""How TensorBoard's custom scalars group what is logged."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Categories, in them charts, and of each its kind and the tags (regular expressions) of its lines.
Layout = dict[str, dict[str, list[str | list[str]]]]


def layout(tags: Iterable[str], ranges: Iterable[str]) -> Layout:
    """Float and INT8 in one chart for each quantity, drops and gains together, and a chart for each range.

    Args:
        tags: of the result's scalars: ``float/NAME``, ``int8/NAME``, ``drop/NAME``, ``speedup/NAME``.
        ranges: names of the quantizers whose ranges were logged.
    """
    tags = list(tags)
    both = [tag.removeprefix("int8/") for tag in tags if tag.startswith("int8/")]
    categories: Layout = {
        "float and INT8": {name: _lines(f"float/{name}", f"int8/{name}") for name in both},
        "what INT8 cost and bought": {
            kind: _lines(*(tag for tag in tags if tag.startswith(f"{kind}/")))
            for kind in ("drop", "speedup")
            if any(tag.startswith(f"{kind}/") for tag in tags)
        },
        "ranges in training": {name: _lines(f"ranges/{name}/low", f"ranges/{name}/high") for name in ranges},
    }
    return {category: charts for category, charts in categories.items() if charts}


def _lines(*tags: str) -> list[str | list[str]]:
    return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]
