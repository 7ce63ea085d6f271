"""Run by test_launcher in a process of its own; Lightning starts the second one from this same file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from helpers.classifiers import Wrapped, images, loader
from helpers.fits import quantization


def main(folder: Path) -> None:
    seed_everything(0, verbose=False)
    model, callback = Wrapped(), quantization(folder, evaluate=False, calibrator="minmax", export=["pt2"])
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(model, loader(shuffle=True), loader(seed=1))
    torch.save({"logits": model(images(16, seed=1)[0])}, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
