"""Analyses and predictions made up of numbers."""

from __future__ import annotations

import torch

from lq.charts import Predictions
from lq.results.analysis import Analysis, LayerAnalysis


def analysis_of(count: int, name: str = "layer.{}.conv") -> Analysis:
    """So many layers, the middle one the most harmful."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for index in range(count):
        x = torch.rand(8, generator=generator).tolist()
        gain = 15.0 if index == count // 2 else x[0]
        is_add = index % 9 == 8
        layers.append(
            LayerAnalysis(
                name=name.format(index),
                kind="add" if is_add else "conv + batch_norm + relu",
                precision="int8",
                parameters=0 if is_add else int(10 ** (3 + 3 * x[1])),
                weight_sqnr_db=None if is_add else 40 + x[2],
                input_sqnr_db=20 + 20 * x[3],
                output_sqnr_db=25 + x[4],
                cosine=0.99,
                clipped=0.01 * x[5],
                range=(0.0, 4.0),
                observed=(0.0, 4.0 + x[5]),
                only_sqnr_db=45 - gain,
                all_but_sqnr_db=20 + gain,
                float_ms=2 + x[6],
                int8_ms=1 + x[7],
            )
        )
    return Analysis("Network", "x86", 32, 20.0, tuple(layers))


def predictions_of(classes: int, samples: int = 400) -> Predictions:
    """Some samples of which float gets most right and INT8 a few less."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (samples,), generator=generator)
    float_classes = labels.clone()
    float_classes[:40] = torch.randint(classes, (40,), generator=generator)
    int8_classes = float_classes.clone()
    int8_classes[30:70] = (float_classes[30:70] + 1) % classes
    changed = (float_classes != int8_classes).nonzero()[:8, 0]
    images = torch.rand(len(changed), 3, 16, 16, generator=generator)
    return Predictions(labels, float_classes, int8_classes, classes, changed, images, [f"c{i}" for i in range(classes)])
