"""A stand-in for the analysis, just enough to draw and to advise with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq.analysis.result import SQNR_LIMIT_DB, Analysis, LayerAnalysis
from lq.graph.placement import site, source_of
from lq.modes import evaluating
from lq.prepare import prepared_forward, quantizers, quantizers_off, simulate
from lq.quantizer import QuantizerState
from lq.report import make_report


def _sqnr(x: Tensor, y: Tensor) -> float:
    noise = (x - y).double().square().sum()
    if not noise:
        return SQNR_LIMIT_DB
    return float((10 * torch.log10(x.double().square().sum() / noise)).clamp(-SQNR_LIMIT_DB, SQNR_LIMIT_DB))


@contextmanager
def _states(model: nn.Module) -> Any:
    states = {q: q.state for q in quantizers(model).values()}
    try:
        yield
    finally:
        for q, state in states.items():
            q.state = state


@torch.no_grad()
def analyze(
    model: nn.Module,
    batches: Iterable[Any],
    num_samples: int | None = 32,
    sensitivity: bool = True,
    timing: bool = True,
    forward: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> Analysis:
    """Stand-in."""
    prepared = prepared_forward(model)
    found = quantizers(model)
    graph = prepared.analyse()
    report = make_report(model, graph, found, prepared.target)
    data, seen = [], 0
    for batch in batches:
        data.append(batch)
        seen += len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))
        if num_samples is not None and seen >= num_samples:
            break

    def outputs() -> Tensor:
        run = forward or (lambda b: model(b[0] if isinstance(b, (tuple, list)) else b))
        return torch.cat([leaf.flatten() for b in data for leaf in tree_leaves(run(b)) if isinstance(leaf, Tensor)])

    keys: dict[str, list[str]] = {}
    for chain in graph.placement.chains:
        keys[chain.name] = [chain.weight_key, site(source_of(chain.op.input, model))]
    for total in graph.placement.sums:
        keys[site(total.add)] = [site(source_of(node, model)) for node in total.add.all_input_nodes]
    inputs: dict[str, list[Tensor]] = {}
    layers = []
    with evaluating(model), _states(model):
        handles = []
        for names in keys.values():
            key = names[-1]

            def hook(_: nn.Module, args: Any, key: str = key) -> None:
                inputs.setdefault(key, []).append(args[0].detach().clone())

            if not any(key == k for k, _ in handles):
                handles.append((key, found[key].register_forward_pre_hook(hook)))
        with quantizers_off(model):
            start = time.perf_counter()
            reference = outputs()
            elapsed = (time.perf_counter() - start) * 1e3 / seen
        for _, handle in handles:
            handle.remove()
        simulate(model)
        whole = outputs()
        simulated = {q: q.state for q in found.values()}
        for row in report.layers:
            if row.precision == "float" or row.name not in keys:
                layers.append(LayerAnalysis(row.name, row.kind, row.precision, row.reason))
                continue
            mine = [found[key] for key in keys[row.name]]
            source = found[keys[row.name][-1]]
            x = torch.cat([t.flatten() for t in inputs[keys[row.name][-1]]])
            for q in found.values():
                q.state = QuantizerState.OFF
            for q in mine:
                q.state = simulated[q]
            only = outputs()
            for q, state in simulated.items():
                q.state = QuantizerState.OFF if q in mine else state
            rest = outputs()
            low, high = (float(v) for v in source.quantized_range())
            for q, state in simulated.items():
                q.state = state
            weight = parameters = None
            if keys[row.name][0].endswith(".weight"):
                w = model.get_submodule(row.name).weight
                weight = _sqnr(w, found[keys[row.name][0]](w))
                parameters = sum(p.numel() for p in model.get_submodule(row.name).parameters())
            share = (parameters or 1) / sum(p.numel() for p in model.parameters())
            layers.append(
                LayerAnalysis(
                    row.name,
                    row.kind,
                    "int8",
                    parameters=parameters or 0,
                    weight_sqnr_db=weight,
                    input_sqnr_db=_sqnr(x, source(x)),
                    output_sqnr_db=_sqnr(reference, whole),
                    cosine=float(torch.nn.functional.cosine_similarity(reference, whole, 0)),
                    clipped=float(((x < low) | (x > high)).float().mean()),
                    range=(low, high),
                    observed=(float(x.min()), float(x.max())),
                    only_sqnr_db=_sqnr(reference, only),
                    all_but_sqnr_db=_sqnr(reference, rest),
                    float_ms=elapsed * (0.3 / len(keys) + 0.7 * share) if timing else None,
                    int8_ms=elapsed * (0.2 / len(keys) + 0.2 * share) if timing else None,
                )
            )
    return Analysis(type(model).__name__, prepared.target.name, seen, _sqnr(reference, whole), tuple(layers))
