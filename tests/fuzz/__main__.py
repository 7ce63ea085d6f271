"""``python -m tests.fuzz COUNT``: so many random networks through lq; see ``--help``."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

from .checks import CHECKS, check_program
from .generate import generate
from .outcome import Failure, Outcome
from .program import Program, source
from .shrink import shrink
from .worker import one_thread, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("count", type=int, help="how many programs")
    parser.add_argument("--start", type=int, default=0, metavar="SEED", help="the first one's seed")
    parser.add_argument("--checks", default=",".join(CHECKS), help="some of %(default)s; prepare always runs")
    parser.add_argument("--longest", type=int, default=40, help="steps of a program at most (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s)")
    parser.add_argument("--time", type=float, default=float("inf"), metavar="SECONDS", help="start none after that")
    parser.add_argument("--shrink", type=float, default=30, metavar="SECONDS", help="for a failure (0: leave it)")
    parser.add_argument(
        "--keep", type=int, default=3, help="programs shown of one kind of failure (default %(default)s)"
    )
    options = parser.parse_args()
    checks = tuple(options.checks.split(","))
    if unknown := set(checks) - set(CHECKS):
        parser.error(f"--checks: {', '.join(sorted(unknown))} is none of {', '.join(CHECKS)}")
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    shown = time.perf_counter()
    kinds: Counter[str] = Counter()
    for outcome in _outcomes(options, checks):
        outcomes.append(outcome)
        if outcome.failure is not None:
            kind = str(outcome.failure).splitlines()[0]
            kinds[kind] += 1
            if kinds[kind] <= options.keep:
                _show(outcome, checks, options)
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            print(_progress(outcomes, options.count, shown - start), flush=True)
    _summary(outcomes, kinds, time.perf_counter() - start)
    return 1 if kinds else 0


def _outcomes(options: argparse.Namespace, checks: tuple[str, ...]) -> Iterator[Outcome]:
    end = time.perf_counter() + options.time
    seeds = iter(range(options.start, options.start + options.count))
    if options.jobs == 1:
        one_thread()
        for seed in seeds:
            if time.perf_counter() > end:
                return
            yield run(seed, options.longest, checks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=one_thread) as pool:
        first = itertools.islice(seeds, 2 * options.jobs)
        pending = {pool.submit(run, seed, options.longest, checks) for seed in first}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
                seed = next(seeds, None)
                if seed is not None and time.perf_counter() < end:
                    pending.add(pool.submit(run, seed, options.longest, checks))


def shrunk(program: Program, failure: Failure, checks: tuple[str, ...], seconds: float) -> Program:
    """A small program that fails in the same check in the same way."""

    def fails(candidate: Program) -> bool:
        found = check_program(candidate, checks).failure
        return found is not None and (found.check, found.kind) == (failure.check, failure.kind)

    return shrink(program, fails, seconds)


def _show(outcome: Outcome, checks: tuple[str, ...], options: argparse.Namespace) -> None:
    failure = outcome.failure
    assert failure is not None
    program = generate(outcome.seed, options.longest)
    small = shrunk(program, failure, checks, options.shrink) if options.shrink else program
    again = check_program(small, checks).failure or failure
    print(f"\n=== seed {outcome.seed} fails in {again}")
    print(f"--- {program.count()} steps, shrunk to {small.count()}; target={small.target!r}, inputs {small.shapes}:\n")
    print(source(small), flush=True)


def _progress(outcomes: list[Outcome], count: int, seconds: float) -> str:
    failures = sum(outcome.failure is not None for outcome in outcomes)
    return f"{len(outcomes)} of {count} programs, {failures} failures, {len(outcomes) / seconds:.1f} a second"


def _summary(outcomes: list[Outcome], kinds: Counter[str], seconds: float) -> None:
    print()
    count = max(len(outcomes), 1)
    for status, number in Counter(outcome.status for outcome in outcomes).most_common():
        print(f"{status:>8}: {number} ({number / count:.1%})")
    for (check, error), number in Counter(r for outcome in outcomes for r in outcome.refusals).most_common():
        print(f"refused in {check} by {error}: {number}")
    for kind, number in kinds.most_common():
        seeds = [str(o.seed) for o in outcomes if o.failure is not None and str(o.failure).splitlines()[0] == kind]
        print(f"failure, {number}: {kind} (seeds {', '.join(seeds[:8])})")
    spent: Counter[str] = Counter()
    for outcome in outcomes:
        spent.update(outcome.seconds)
    print(", ".join(f"{name} {value / count * 1e3:.0f} ms" for name, value in spent.items()), "a program")
    print(f"{len(outcomes)} programs in {seconds:.0f} s, {len(outcomes) / seconds:.1f} a second")


if __name__ == "__main__":
    sys.exit(main())
