"""Batches of the Trainer's dataloaders, outside its loops."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lq.callback.steps.calls import Step
from lq.callback.steps.seen import at_stage

#: Samples kept as example inputs: enough to see that the batch size may vary, few enough to keep with the model.
EXAMPLE_SAMPLES = 4


def validation_dataloaders(trainer: Any) -> Any:
    """The Trainer's validation data, whole; also where its loop never ran (``max_epochs=0``). None without any."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    # With several processes the loop has dataloaders that give this one its share.
    if loop._combined_loader is not None and trainer.world_size == 1:
        return _as_given(loop._combined_loader)
    return loop._data_source.dataloader() if loop._data_source.is_defined() else None


def train_dataloaders(trainer: Any) -> Any:
    """The Trainer's train data, whole, as a Trainer takes them.

    Works before the Trainer's loop has set its dataloaders up as well as after it has ended.
    """
    if trainer.fit_loop._combined_loader is not None and trainer.world_size == 1:
        return _as_given(trainer.fit_loop._combined_loader)
    return _original(trainer)


def batches_of(loaders: Any, pl_module: Any, step: Step = "training_step") -> Iterator[Any]:
    """The batches that a loop takes of its dataloaders, on the device of ``pl_module``, through the user's transfer
    hooks, which see the stage of ``step``."""
    return _transferred(_combined(loaders), pl_module, step)


def _combined(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, Mapping) or (isinstance(loaders, (list, tuple)) and _are_loaders(loaders)):
        loaders = CombinedLoader(loaders, "max_size_cycle")
    elif isinstance(loaders, CombinedLoader):
        loaders = CombinedLoader(loaders.iterables, loaders._mode)  # whose own position stays where it is
    for item in loaders:
        yield item[0] if isinstance(loaders, CombinedLoader) else item


def _are_loaders(items: Sequence[Any]) -> bool:
    """Whether these are dataloaders, to be read side by side, and not batches, which may be containers as well."""
    leaves = tree_leaves(list(items))
    return bool(leaves) and all(isinstance(leaf, (DataLoader, CombinedLoader)) or _is_loader(leaf) for leaf in leaves)


def _is_loader(value: Any) -> bool:
    """Whether it is some other kind of dataloader: it can be iterated over, but is no container of values."""
    is_values = isinstance(value, (Tensor, np.ndarray, str, bytes, Mapping)) or hasattr(value, "__getitem__")
    return not is_values and hasattr(value, "__iter__")


def _transferred(batches: Iterable[Any], pl_module: Any, step: Step) -> Iterator[Any]:
    for batch in batches:
        with at_stage(pl_module, step):
            moved = pl_module._apply_batch_transfer_handler(batch, device=pl_module.device, dataloader_idx=0)
        yield moved


def has_train_data(trainer: Any) -> bool:
    """Whether there is a train dataloader, or can be."""
    return trainer.train_dataloader is not None or bool(trainer.fit_loop._data_source.is_defined())


def validation_batches(trainer: Any, pl_module: Any) -> Iterator[Any]:
    """The batches of the first validation dataloader, as :func:`batches_of` gives them; none without any."""
    return batches_of(first_of(validation_dataloaders(trainer)), pl_module, "validation_step")


def first_of(loaders: Any) -> Any:
    """The first of several dataloaders that validation runs one after another; nothing to iterate over of None."""
    if isinstance(loaders, CombinedLoader) and loaders._mode == "sequential":
        loaders = loaders.iterables
    while isinstance(loaders, (Mapping, list, tuple)) and len(loaders):
        loaders = next(iter(loaders.values())) if isinstance(loaders, Mapping) else loaders[0]
    return iter(()) if loaders is None or isinstance(loaders, (Mapping, list, tuple)) else loaders


def count_samples(values: Any) -> int:
    """Length of the first axis of the first tensor in ``values`` that has one; 0 without any."""
    return next((len(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def calibration_batches(trainer: Any, pl_module: Any, dataloader: Iterable[Any] | None) -> Iterator[Any]:
    """This process's share of the batches of ``dataloader``, or of the train dataloader in random order.

    As in :func:`batches_of`, on the device of ``pl_module``.
    """
    loader = dataloader
    if loader is None:
        # Those of the loop are dealt out already, in order where training was not shuffled: the user's own are not.
        original = trainer.world_size > 1 and isinstance(_original(trainer), DataLoader)
        combined = trainer.fit_loop._combined_loader
        own = _original(trainer) if original or combined is None else _as_given(combined)
        loader = _shuffled(own, anew=original)
    batches = _combined(loader)
    if not isinstance(getattr(loader, "sampler", None), DistributedSampler):
        batches = itertools.islice(batches, trainer.global_rank, None, trainer.world_size)
    return _transferred(batches, pl_module, "training_step")


def _as_given(combined: CombinedLoader) -> Any:
    """What a loop's dataloaders were made of: one, or several in the way that they are combined."""
    several = isinstance(combined.iterables, (Mapping, list, tuple))
    return combined if several else combined.iterables


def _original(trainer: Any) -> Any:
    """The user's own train dataloader, before Lightning's sampler for several processes was put in."""
    return trainer.fit_loop._data_source.dataloader()


def _shuffled(loader: Any, anew: bool = False) -> Any:
    """``loader`` with its samples in random order, where it is a plain DataLoader that takes them one after another.

    The first batches of files sorted by class show one class, and ranges fit for no other.

    Args:
        loader: of any kind.
        anew: whether to shuffle one that is shuffled already, so that every process has the same order.
    """
    if not isinstance(loader, DataLoader):
        return loader
    if not isinstance(loader.sampler, (SequentialSampler, RandomSampler) if anew else SequentialSampler):
        return loader
    if type(loader) is not DataLoader or type(loader.batch_sampler) is not BatchSampler:
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        shuffle=True,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        # The same samples on every process, which then deal the batches out among them.
        generator=torch.Generator().manual_seed(0),
    )


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
