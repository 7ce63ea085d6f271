"""From batches to the inputs that a model is analyzed on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lq.graph.analysis import GraphAnalysis
from lq.graph.parts import PartsForward
from lq.util.modes import evaluating
from lq.workflow.calibrate import batch_size, default_forward
from lq.workflow.prepare import prepared_forward, unprepared

#: Samples that run at once: enough to keep a CPU busy, few enough to keep their values in memory.
CHUNK = 8

#: Default number of samples, its lower limit for large networks, and the number of multiplications that measuring
#: sensitivity should stay within. Two CPU cores do 10 to 20 * 10**9 of them a second.
MOST_SAMPLES, FEWEST_SAMPLES, MULTIPLICATIONS = 32, 2, 10**12


def default_num_samples(analysis: GraphAnalysis) -> int:
    """As many as :data:`MULTIPLICATIONS` allow: each layer takes two runs of what follows it, half of all."""
    chains = analysis.placement.chains
    one = 0.0
    for chain in chains:
        weight = analysis.values[chain.op.weight]
        out = analysis.values[chain.op.node]
        one += out[:1].numel() * weight[0].numel()
    fitting = int(MULTIPLICATIONS / max(1.0, one * len(chains)))
    return min(max(fitting, FEWEST_SAMPLES), MOST_SAMPLES)


def first_samples(batch: Any, count: int) -> Any:
    """The first ``count`` samples of a batch: of every tensor in it whose first axis is the batch's."""
    return _slice(batch, 0, count)


def _slice(batch: Any, start: int, stop: int) -> Any:
    size = batch_size(batch)
    if start == 0 and size <= stop:
        return batch
    return tree_map(
        lambda value: value[start:stop] if isinstance(value, Tensor) and value.dim() and len(value) == size else value,
        batch,
    )


def model_inputs(
    model: nn.Module, batches: Iterable[Any], num_samples: int, forward: Callable[[Any], Any] | None
) -> list[dict[str, Any]]:
    """What ``model`` is called with on ``batches``: inputs by name, up to :data:`CHUNK` samples in each.

    Args:
        model: prepared; its float model runs once on each batch.
        batches: see :func:`lq.calibrate`.
        num_samples: an upper limit.
        forward: see :func:`lq.calibrate`.

    Raises:
        ValueError: where there are no samples, or the model is called with other settings than it was prepared for.
    """
    prepared = prepared_forward(model)
    run = forward or default_forward(model)
    chunks: list[dict[str, Any]] = []
    seen = 0

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        if isinstance(prepared.own, PartsForward) and not prepared.own.is_of_parts(args, kwargs):
            return  # the user's own call of a module whose parts are what is quantized
        inputs, settings = prepared.bind(args, kwargs)
        if tuple(inputs) != tuple(prepared.inputs) or settings != prepared.settings:
            raise ValueError(
                f"the model was called with {_call(inputs, settings)}, but prepared for "
                f"{_call(prepared.inputs, prepared.settings)}; lq.analyze looks at the forward it was prepared for"
            )
        for chunk in _chunks(first_samples(inputs, num_samples - seen)):
            if seen < num_samples:
                # Copies: the model, or a loader that reuses one buffer, may overwrite its inputs.
                chunks.append(tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, chunk))
                seen += batch_size(chunk)

    with unprepared(model), evaluating(model), torch.no_grad():
        # Before hooks of the user's own: what they do to the inputs is part of what is analyzed.
        handle = model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        try:
            for batch in batches:
                run(first_samples(batch, num_samples - seen) if forward is None else batch)
                if seen >= num_samples:
                    break
        finally:
            handle.remove()
    if not seen:
        raise ValueError(
            "batches has no samples: give lq.analyze at least one batch that is not empty"
            + ("" if forward is None else ", and a forward=... that calls the model")
        )
    return chunks


def _chunks(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for start in range(0, batch_size(inputs), CHUNK):
        yield _slice(inputs, start, start + CHUNK)


def _call(inputs: dict[str, Any], settings: dict[str, Any]) -> str:
    return f"({', '.join([*inputs, *(f'{name}={value!r}' for name, value in settings.items())])})"
