"""The fewest of many layers that have to stay in float, found by groups of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def fewest(ranking: Sequence[str], meets: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...] | None:
    """A small set of ``ranking`` that ``meets`` holds for.

    First the shortest beginning of the ranking, by doubling and then bisection: about ``2 * log2(n)`` calls for a
    beginning of ``n``, whatever the length of the ranking. Then members of it that are not needed are taken out, halves
    first and then ever smaller groups, in about as many calls again; the last member is needed, or a shorter beginning
    would have done.

    Args:
        ranking: the most harmful first.
        meets: whether a set is enough; assumed to hold for whatever contains a set that it holds for.

    Returns:
        The set, in the order of the ranking; None where not even all of it is enough.
    """
    below, above = 0, 1
    while not meets(tuple(ranking[: min(above, len(ranking))])):
        if above >= len(ranking):
            return None
        below, above = above, 2 * above
    above = min(above, len(ranking))
    while above - below > 1:
        middle = (below + above) // 2
        if meets(tuple(ranking[:middle])):
            above = middle
        else:
            below = middle
    return _without_the_unneeded(tuple(ranking[:above]), meets)


def _without_the_unneeded(needed: tuple[str, ...], meets: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    calls = 2 * len(needed).bit_length()
    size = len(needed) // 2
    while size:
        start = 0
        while start < len(needed) - 1:
            stop = min(start + size, len(needed) - 1)
            rest = needed[:start] + needed[stop:]
            if not calls:
                return needed
            calls -= 1
            if meets(rest):
                needed = rest
            else:
                start = stop
        size //= 2
    return needed
