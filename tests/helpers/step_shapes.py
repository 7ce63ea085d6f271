"""LightningModules as strangers write them: how their steps call their networks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from helpers.classifiers import Wrapped, images, network


class _Bare(Wrapped):
    """Without a network."""

    def __init__(self) -> None:
        LightningModule.__init__(self)


class RoundCall(_Bare):
    """``self.forward(x)`` in the steps: no hook hears of it."""

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.feature_extractor, self.fc = net[:-1], net[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.feature_extractor(x))

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.forward(batch[0]), batch[1]


class RoundCallInside(Wrapped):
    """``self.model.forward(x)``."""

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.model.forward(batch[0]), batch[1]


class Apart(_Bare):
    """The steps call features and head one after the other; there is no forward."""

    forward = LightningModule.forward

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.features, self.head = net[:-2], net[-1]

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.head(self.features(batch[0]).flatten(1)), batch[1]


class Heads(_Bare):
    """A list of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = network()[:-1]
        self.heads = nn.ModuleList([nn.Linear(16, 4) for _ in range(2)])

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        features = self.backbone(batch[0])
        return torch.stack([head(features) for head in self.heads]).mean(0), batch[1]


class Ensemble(_Bare):
    """Several whole networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = network(), network()

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return self.first(x) + self.second(x.flip(-1)), y


class Twice(Wrapped):
    """The network sees the batch as it is, and then wider data."""

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return self.model(x) + self.model(4 * x), y


class _Net(nn.Module):
    """Features and classifier, which can be called apart."""

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.features, self.classifier = net[:-2], net[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class GoesRound(_Bare):
    """Validation calls the parts of what training calls as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net.classifier(self.net.features(x).flatten(1))
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())


class _WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixels)
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = F.cross_entropy(logits, labels)
        return out


class LossInside(_Bare):
    """The forward takes the labels and computes the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _WithLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.model(x, labels=y)["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        out = self.model(pixels=x, labels=y)
        self.log("val_loss", out["loss"])
        self.log("val_acc", (out["logits"].argmax(1) == y).float().mean())


class CalledGraph(_Bare):
    """A submodule of a name that has another meaning elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.graph, self.report = net[:-1], net[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.report(self.graph(x))


class FirstArgument(Wrapped):
    """A hook reads ``args[0]``."""

    def __init__(self) -> None:
        super().__init__()
        self.model.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


class Distilled(_Bare):
    """A teacher that only training calls."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = network().requires_grad_(False), network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            target = self.teacher(x).softmax(1)
        logits = self.student(x)
        return F.cross_entropy(logits, y) + 0.01 * F.kl_div(logits.log_softmax(1), target, reduction="batchmean")

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.student(batch[0]), batch[1]


class Averaged(Wrapped):
    """Validation uses an average of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.model)

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            pairs = zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=False)
            for mean, value in pairs:
                mean.copy_(value if not value.is_floating_point() else 0.5 * mean + 0.5 * value)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.training else self.average(x)


class AveragedByTorch(Averaged):
    """The average is ``torch.optim.swa_utils.AveragedModel``."""

    def __init__(self) -> None:
        Wrapped.__init__(self)
        self.average = AveragedModel(self.model, use_buffers=True)  # type: ignore[assignment]

    def on_train_batch_end(self, *args: Any) -> None:
        self.average.update_parameters(self.model)  # type: ignore[attr-defined]


class MeanTeacher(Averaged):
    """Training asks the average as well, which validation uses."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            taught = self.average(batch[0]).softmax(1)
        logits = self.model(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(logits.softmax(1), taught)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.01)


class FrozenTeacher(MeanTeacher):
    """Likewise, and its parameters require no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.average.requires_grad_(False)


class SmallSteps(Wrapped):
    """``training_step(batch)`` without the number of the batch."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        logits, y = self.logits(batch)
        return F.cross_entropy(logits, y)


class DataInSetup(Wrapped):
    """Data sets are made in ``setup``."""

    def __init__(self) -> None:
        super().__init__()
        self.train_set: Any = None
        self.val_set: Any = None

    def setup(self, stage: str) -> None:
        self.train_set = TensorDataset(*images(64))
        self.val_set = TensorDataset(*images(64, seed=1))

    def train_dataloader(self) -> Any:
        return DataLoader(self.train_set, batch_size=16, shuffle=len(self.train_set) > 0)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val_set, batch_size=32)


class NetworkInSetup(DataInSetup):
    """So is the network."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not hasattr(self, "model"):
            self.model = network()
