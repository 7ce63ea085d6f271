"""Batches of the Trainer's own train dataloader, outside its loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

#: Samples kept as example inputs: enough to see that the batch size may vary, few enough to keep with the model.
EXAMPLE_SAMPLES = 4


def validation_dataloaders(trainer: Any) -> Any:
    """The Trainer's validation data, also where its loop never ran (``max_epochs=0``); None where there are none."""
    if trainer.val_dataloaders is not None:
        return trainer.val_dataloaders
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return source.dataloader() if source.is_defined() else None


def train_batches(trainer: Any, pl_module: Any) -> Iterator[Any]:
    """The train dataloader's batches, on the device of ``pl_module``, through the user's transfer hooks.

    Works before the Trainer's loop has set its dataloaders up as well as after it has ended.
    """
    loader = trainer.train_dataloader
    if loader is None:
        loader = trainer.fit_loop._data_source.dataloader()
    if isinstance(loader, (Mapping, list, tuple)):
        loader = (batch for batch, *_ in CombinedLoader(loader, "max_size_cycle"))
    for batch in loader:
        yield pl_module._apply_batch_transfer_handler(batch, device=pl_module.device, dataloader_idx=0)


def first_samples(values: Any, count: int = EXAMPLE_SAMPLES) -> Any:
    """The first samples of every tensor in ``values`` whose first axis is the batch."""
    sizes = [len(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.dim()]
    batch = sizes[0] if sizes else 0

    def cut(value: Any) -> Any:
        is_batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
        return value[:count].detach().clone() if is_batched else value

    return tree_map(cut, values)


def repeat_samples(values: Any, batch_size: int) -> Any:
    """``values`` with as many samples as wanted, repeating what there is."""
    sizes = [len(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.dim()]
    batch = sizes[0] if sizes else 0

    def repeat(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.dim() and len(value) == batch):
            return value
        times = -(-batch_size // batch)
        return value.repeat(times, *[1] * (value.dim() - 1))[:batch_size]

    return tree_map(repeat, values)
