"""What lq makes of others' networks: ``python -m tests.networks [NAME ...] [--markdown docs/timm.md]``.

NAME is a network of timm, or one of torchvision in the list, as ``torchvision/resnet18``; ``torchvision`` stands for
all of those. Without names all of timm's in the list are run. Each runs in a process of its own with limits of time and
memory, so that one that fails does not end the run. Takes ``pip install -e ".[timm]"``. Run it from the root.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .measure import Result, measure
from .networks import NETWORKS, TORCHVISION_NETWORKS, network
from .table import page


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.networks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks; by default timm's in the list")
    parser.add_argument("--markdown", type=Path, help="also write the page to this file")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--list", action="store_true", help="print the list and stop")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default 1)")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of each (default 300)")
    parser.add_argument("--gigabytes", type=float, default=12, help="memory limit of each (default 12)")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # the child's: measure one, write it here
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.list:
        print("\n".join(f"{n.name} {n.size}" for n in (*NETWORKS.values(), *TORCHVISION_NETWORKS.values())))
        return
    if options.result is not None:
        torch.set_num_threads(options.threads)
        measure(network(options.names[0]), lambda result: _write(options.result, result))
        return
    names = options.names or list(NETWORKS)
    if names == ["torchvision"]:
        names = list(TORCHVISION_NETWORKS)
    for name in names:
        network(name)  # an unknown one ends the run before it began
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        results = list(
            pool.map(lambda name: run(name, Path(folder) / f"{name.replace('/', '.')}.json", options), names)
        )
    text = page(results, options.threads)
    print(text)
    if options.json is not None:
        _write(options.json, [vars(result) for result in results])
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text)


def run(name: str, path: Path, options: argparse.Namespace) -> Result:
    """Measure one network in a process of its own; what it had found when it ended is its result."""

    def limit() -> None:
        size = int(options.gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    command = [sys.executable, "-m", "tests.networks", name, "--result", str(path)]
    command += ["--threads", str(options.threads)]
    ended = ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=options.seconds, preexec_fn=limit, check=False
        )
        if done.returncode:
            ended = f"exit status {done.returncode}: {' '.join(done.stderr.split())[-300:]}"
    except subprocess.TimeoutExpired:
        ended = f"longer than {options.seconds:g} s"
    result = Result(**json.loads(path.read_text())) if path.exists() else Result(name, network(name).size)
    if ended:
        result.error = f"{result.error} ({ended})" if result.error else ended
    print(f"{name}: {result.error or 'done'}", file=sys.stderr, flush=True)
    return result


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


if __name__ == "__main__":
    main()
