"""What a run writes: the formats of its network, and the names of its files."""

from __future__ import annotations

from importlib.util import find_spec

from lq.deployment.formats import FORMATS, FormatName

#: The format that is always written, and those that are written beside it, on request: what takes long comes last.
NETWORK: FormatName = "pt2"
OTHER_FORMATS: tuple[FormatName, ...] = tuple(
    format.name for format in sorted(FORMATS.values(), key=lambda format: format.takes_long) if format.name != NETWORK
)

#: Those of them that are written where nothing is asked for, and what they need is installed.
UNASKED: tuple[FormatName, ...] = tuple(name for name in OTHER_FORMATS if FORMATS[name].packages is not None)

#: What was done, on one page, and the result in numbers.
PAGE, RESULT = "int8.html", "int8.json"

#: All that a run writes: what an earlier one left under these names goes where this one writes nothing of that name.
OUTPUTS = (*(FORMATS[name].file for name in (NETWORK, *OTHER_FORMATS)), PAGE, RESULT)


def default_formats() -> tuple[FormatName, ...]:
    """What is written beside ``int8.pt2`` where nothing is asked for: as far as what it needs is installed."""
    return tuple(name for name in UNASKED if all(find_spec(package) for package in FORMATS[name].packages or ()))
