"""Batches of the Trainer's dataloaders, outside its loops."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

#: Samples kept as example inputs: enough to see that the batch size may vary, few enough to keep with the model.
EXAMPLE_SAMPLES = 4


def validation_dataloaders(trainer: Any) -> Any:
    """The Trainer's validation data, whole; also where its loop never ran (``max_epochs=0``). None without any."""
    # With several processes the loop has dataloaders that give this one its share.
    if trainer.val_dataloaders is not None and trainer.world_size == 1:
        return trainer.val_dataloaders
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return source.dataloader() if source.is_defined() else None


def train_dataloaders(trainer: Any) -> Any:
    """The Trainer's train data, whole, as a Trainer takes them."""
    if trainer.train_dataloader is not None and trainer.world_size == 1:
        return trainer.train_dataloader
    return _original(trainer)


def train_batches(trainer: Any, pl_module: Any) -> Iterator[Any]:
    """The train dataloader's batches, on the device of ``pl_module``, through the user's transfer hooks.

    Works before the Trainer's loop has set its dataloaders up as well as after it has ended.
    """
    return _transferred(_train_dataloader(trainer), pl_module)


def given_batches(loader: Iterable[Any], pl_module: Any) -> Iterator[Any]:
    """The batches of any dataloader, as :func:`train_batches` gives them."""
    return _transferred(loader, pl_module)


def has_train_data(trainer: Any) -> bool:
    """Whether there is a train dataloader, or can be."""
    return trainer.train_dataloader is not None or bool(trainer.fit_loop._data_source.is_defined())


def validation_batches(trainer: Any, pl_module: Any) -> Iterator[Any]:
    """The batches of the first validation dataloader, as :func:`train_batches` gives them; none without any."""
    loaders = validation_dataloaders(trainer)
    while isinstance(loaders, (Mapping, list, tuple)) and len(loaders):
        loaders = next(iter(loaders.values())) if isinstance(loaders, Mapping) else loaders[0]
    return _transferred(() if loaders is None else loaders, pl_module)


def count_samples(values: Any) -> int:
    """Length of the first axis of the first tensor in ``values`` that has one; 0 without any."""
    return next((len(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def calibration_batches(trainer: Any, pl_module: Any, dataloader: Iterable[Any] | None) -> Iterator[Any]:
    """This process's share of the batches of ``dataloader``, or of the train dataloader in random order.

    As in :func:`train_batches`, on the device of ``pl_module``.
    """
    loader = dataloader
    if loader is None:
        # Those of the loop are dealt out already, in order where training was not shuffled: the user's own are not.
        original = trainer.world_size > 1 and isinstance(_original(trainer), DataLoader)
        loader = _shuffled(_original(trainer) if original else _train_dataloader(trainer), anew=original)
    batches: Iterable[Any] = loader
    if not isinstance(getattr(loader, "sampler", None), DistributedSampler):
        batches = itertools.islice(loader, trainer.global_rank, None, trainer.world_size)
    return _transferred(batches, pl_module)


def _train_dataloader(trainer: Any) -> Any:
    loader = trainer.train_dataloader
    if loader is None:
        loader = _original(trainer)
    if isinstance(loader, (Mapping, list, tuple)):
        loader = (batch for batch, *_ in CombinedLoader(loader, "max_size_cycle"))
    return loader


def _original(trainer: Any) -> Any:
    """The user's own train dataloader, before Lightning's sampler for several processes was put in."""
    return trainer.fit_loop._data_source.dataloader()


def _transferred(batches: Iterable[Any], pl_module: Any) -> Iterator[Any]:
    for batch in batches:
        yield pl_module._apply_batch_transfer_handler(batch, device=pl_module.device, dataloader_idx=0)


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
