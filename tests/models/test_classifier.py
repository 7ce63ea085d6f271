"""The classifier through real, tiny runs of a Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lq.models import Classifier, build_resnet, lr_factor

BATCH = 8


def network(num_classes: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def images_and_labels(num_classes: int = 4, count: int = 32) -> tuple[Tensor, Tensor]:
    """Images that a channel's brightness tells apart, so that a few steps learn something."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % num_classes
    images = torch.randn(count, 3, 8, 8, generator=generator) * 0.1
    images += F.one_hot(labels % 3, 3)[:, :, None, None]
    return images, labels


def loader(num_classes: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images_and_labels(num_classes)), batch_size=BATCH)


class Curve(Callback):
    """Records the learning rate that each optimizer step used."""

    def __init__(self) -> None:
        self.lrs: list[float] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.lrs.append(optimizer.param_groups[0]["lr"])


def tiny_trainer(tmp_path: Path, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**defaults, **kwargs})


@pytest.mark.parametrize(("num_classes", "top5"), [(4, False), (5, False), (6, True)])
def test_fit_and_test_log_losses_and_accuracies(num_classes: int, top5: bool, tmp_path: Path) -> None:
    classifier = Classifier(network(num_classes), num_classes=num_classes)
    trainer = tiny_trainer(tmp_path)
    trainer.fit(classifier, loader(num_classes), loader(num_classes))
    accuracies = {"acc", "acc5"} if top5 else {"acc"}
    assert set(trainer.callback_metrics) == {"train_loss", "val_loss", *(f"val_{name}" for name in accuracies)}
    (metrics,) = trainer.test(classifier, loader(num_classes), verbose=False)
    assert set(metrics) == {"test_loss", *(f"test_{name}" for name in accuracies)}


def test_metrics_are_those_of_all_images_together(tmp_path: Path) -> None:
    classifier = Classifier(network(6), num_classes=6, label_smoothing=0.1)
    # Batches of different sizes, of which a mean over batches would be another number.
    images, labels = images_and_labels(num_classes=6, count=21)
    (metrics,) = tiny_trainer(tmp_path).test(
        classifier, DataLoader(TensorDataset(images, labels), batch_size=BATCH), verbose=False
    )
    with torch.no_grad():
        logits = classifier.eval()(images)
    top5 = logits.topk(5).indices.eq(labels[:, None]).any(dim=1)
    assert metrics["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["test_acc"] == pytest.approx(logits.argmax(dim=1).eq(labels).float().mean().item())
    assert metrics["test_acc5"] == pytest.approx(top5.float().mean().item())


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.5), ("adamw", 0.05)])
def test_training_learns(optimizer: Any, lr: float, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    classifier = Classifier(network(3), num_classes=3, optimizer=optimizer, lr=lr)
    trainer = tiny_trainer(tmp_path, max_epochs=10)
    trainer.fit(classifier, *[DataLoader(TensorDataset(*images_and_labels(3)), batch_size=BATCH)] * 2)
    assert trainer.callback_metrics["val_acc"] > 0.9


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "step", "constant"])
def test_learning_rate_follows_the_schedule_per_optimizer_step(schedule: Any, accumulate: int, tmp_path: Path) -> None:
    curve = Curve()
    classifier = Classifier(network(), num_classes=4, lr=0.2, schedule=schedule, warmup=0.25)
    tiny_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=accumulate, callbacks=[curve]).fit(
        classifier, loader(), loader()
    )
    total = 12 // accumulate
    assert curve.lrs == pytest.approx([0.2 * lr_factor(schedule, step, total, 0.25) for step in range(total)])


def test_onecycle_warms_up_by_default_and_the_others_do_not() -> None:
    assert Classifier(network(), num_classes=4, schedule="onecycle").warmup == 0.3
    assert Classifier(network(), num_classes=4, schedule="cosine").warmup == 0


def test_resumed_run_follows_the_curve_of_its_new_length(tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path, max_epochs=1)
    first.fit(Classifier(network(), num_classes=4, schedule="cosine"), loader(), loader())
    first.save_checkpoint(tmp_path / "first.ckpt")

    curve = Curve()
    resumed = tiny_trainer(tmp_path, max_epochs=3, callbacks=[curve])
    resumed.fit(
        Classifier(network(), num_classes=4, schedule="cosine"),
        loader(),
        loader(),
        ckpt_path=str(tmp_path / "first.ckpt"),
    )
    # The scheduler had already prepared the first step, at the end of the first run.
    assert curve.lrs[1:] == pytest.approx([0.1 * lr_factor("cosine", step, 12) for step in range(5, 12)])


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Any:
        while True:
            yield from zip(*images_and_labels(), strict=True)


def test_schedule_that_needs_the_length_of_an_endless_run_says_so(tmp_path: Path) -> None:
    endless = DataLoader(Endless(), batch_size=BATCH)
    classifier = Classifier(network(), num_classes=4, schedule="cosine")
    with pytest.raises(ValueError, match=r"schedule='cosine' needs the number of optimizer steps.*max_steps"):
        tiny_trainer(tmp_path, max_epochs=-1).fit(classifier, endless, loader())

    curve = Curve()
    tiny_trainer(tmp_path, max_epochs=-1, max_steps=5, callbacks=[curve]).fit(classifier, endless, loader())
    assert curve.lrs == pytest.approx([0.1 * lr_factor("cosine", step, 5) for step in range(5)])


class StopAfter(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 3


def test_constant_schedule_runs_without_an_end(tmp_path: Path) -> None:
    curve = Curve()
    trainer = tiny_trainer(tmp_path, max_epochs=-1, callbacks=[curve, StopAfter()])
    trainer.fit(
        Classifier(network(), num_classes=4, schedule="constant"), DataLoader(Endless(), batch_size=BATCH), loader()
    )
    assert curve.lrs == [0.1] * 3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_can_spare_norms_and_biases(optimizer: Any, tmp_path: Path) -> None:
    def decays(decay_norm_and_bias: bool) -> dict[str, float]:
        classifier = Classifier(
            network(), 4, optimizer=optimizer, weight_decay=0.01, decay_norm_and_bias=decay_norm_and_bias
        )
        trainer = tiny_trainer(tmp_path, max_steps=1)
        trainer.fit(classifier, loader(), loader())
        decay = {
            id(parameter): group["weight_decay"]
            for group in trainer.optimizers[0].param_groups
            for parameter in group["params"]
        }
        return {name: decay[id(parameter)] for name, parameter in classifier.named_parameters()}

    matrices = {"model.0.weight", "model.5.weight"}
    assert set(decays(True).values()) == {0.01}
    assert {name for name, decay in decays(False).items() if decay} == matrices
    assert set(decays(False).values()) == {0.01, 0.0}


@pytest.mark.parametrize("labelled", [True, False])
def test_predict_returns_logits_for_batches_with_and_without_labels(labelled: bool, tmp_path: Path) -> None:
    classifier = Classifier(network(), num_classes=4)
    images, labels = images_and_labels()
    batches = [(images, labels)] if labelled else [images]
    predictions = tiny_trainer(tmp_path).predict(classifier, DataLoader(batches, batch_size=None))
    with torch.no_grad():
        torch.testing.assert_close(predictions, [classifier.eval()(images)])


class AuxOutputs(NamedTuple):
    logits: Tensor
    aux2: Tensor | None
    aux1: Tensor | None


class WithAuxiliaryHead(nn.Module):
    """Returns what torchvision's GoogLeNet and Inception v3 do: a tuple in train mode, logits otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.main = network()
        self.aux = network()

    def forward(self, x: Tensor) -> Tensor | AuxOutputs:
        return AuxOutputs(self.main(x), self.aux(x), None) if self.training else self.main(x)


def test_auxiliary_heads_train_with_their_weight(tmp_path: Path) -> None:
    classifier = Classifier(WithAuxiliaryHead(), num_classes=4, aux_weight=0.3, label_smoothing=0.1)
    batch = images_and_labels()
    main, aux, _ = classifier(batch[0])
    expected = F.cross_entropy(main, batch[1], label_smoothing=0.1)
    expected += 0.3 * F.cross_entropy(aux, batch[1], label_smoothing=0.1)
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(classifier, DataLoader([batch], batch_size=None), DataLoader([batch], batch_size=None))
    torch.testing.assert_close(trainer.callback_metrics["train_loss"], expected.detach())


@pytest.mark.parametrize("output", [{"out": torch.zeros(1, 4)}, (), (None, torch.zeros(1, 4))])
def test_output_that_holds_no_logits_is_refused(output: Any, tmp_path: Path) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output

    with pytest.raises(TypeError, match=r"the network returned (dict|tuple); expected logits"):
        tiny_trainer(tmp_path).test(Classifier(Wrong(), num_classes=4), loader())


def test_number_of_classes_must_be_that_of_the_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(8, 4\); expected \(N, 10\), from num_classes=10"):
        tiny_trainer(tmp_path).test(Classifier(network(4), num_classes=10), loader())


class Frozen(nn.Module):
    """A network without parameters, as an INT8 one is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(4, 3 * 8 * 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight)


def test_network_that_is_replaced_after_fit_is_the_one_that_is_tested(tmp_path: Path) -> None:
    classifier = Classifier(network(), num_classes=4)
    trainer = tiny_trainer(tmp_path)
    trainer.fit(classifier, loader(), loader())
    classifier.model = Frozen()
    (metrics,) = trainer.test(classifier, loader(), verbose=False)
    images, labels = images_and_labels()
    accuracy = classifier.model(images).argmax(dim=1).eq(labels).float().mean().item()
    assert metrics["test_acc"] == pytest.approx(accuracy)


def test_checkpoint_loads_without_pickles_and_with_its_hyperparameters(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    classifier = Classifier(network(), num_classes=4, lr=0.3, milestones=[0.2, 0.4])
    trainer.fit(classifier, loader(), loader())
    path = tmp_path / "classifier.ckpt"
    trainer.save_checkpoint(path)

    loaded = Classifier.load_from_checkpoint(path, model=network(), map_location="cpu", weights_only=True)
    assert (loaded.lr, loaded.milestones) == (0.3, (0.2, 0.4))
    assert "model" not in loaded.hparams
    torch.testing.assert_close(loaded.state_dict(), classifier.state_dict())
    assert all(key.startswith("model.") for key in loaded.state_dict())


def test_channels_last_computes_the_same_in_the_other_memory_format() -> None:
    seed_everything(0, verbose=False)
    plain = Classifier(build_resnet("resnet18", 10, stem="cifar"), num_classes=10, channels_last=False).eval()
    weight = plain.model.conv1.weight
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = plain(images)
        assert not weight.is_contiguous(memory_format=torch.channels_last)
        fast = Classifier(plain.model, num_classes=10).eval()
        assert fast.model.conv1.weight is weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fast(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Flatten(), nn.Linear(12, 4)], (2, 12)),
        ([nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()], (2, 3, 8)),
        ([nn.Conv3d(3, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()], (2, 3, 4, 4, 4)),
    ],
)
def test_channels_last_leaves_what_is_not_four_dimensional(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    model = nn.Sequential(*layers)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(Classifier(model, num_classes=4)(x), model(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 0}, r"num_classes=0 must be at least 1"),
        ({"lr": 0.0}, r"lr=0\.0 must be positive and finite"),
        ({"momentum": 1.0}, r"momentum=1\.0 must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0 must be non-negative and finite"),
        ({"optimizer": "lamb"}, r"optimizer='lamb' is not one of sgd, adamw"),
        ({"nesterov": True, "optimizer": "adamw"}, r"nesterov=True must be False without SGD's momentum"),
        ({"nesterov": True, "momentum": 0.0}, r"nesterov=True must be False without SGD's momentum"),
        ({"schedule": "linear"}, r"schedule='linear' is not one of onecycle, cosine, step, constant"),
        ({"warmup": 5}, r"warmup=5 must be None or a fraction of all steps in \[0, 1\)"),
        ({"milestones": (30, 60)}, r"milestones=\(30, 60\) must be fractions of all steps in \(0, 1\)"),
        ({"gamma": 0.0}, r"gamma=0\.0 must be in \(0, 1\]"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0 must be in \[0, 1\)"),
        ({"aux_weight": -0.1}, r"aux_weight=-0\.1 must be non-negative and finite"),
    ],
)
def test_mistake_names_argument_value_and_what_is_allowed(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(**{"model": network(), "num_classes": 4, **kwargs})


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model='resnet18' must be an nn\.Module, for example build_resnet"):
        Classifier("resnet18", num_classes=4)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


@pytest.mark.parametrize("distillation", [0.0, 0.3, 1.0])
def test_distillation_is_the_published_loss(distillation: float) -> None:
    model, teacher = network(), network()
    classifier = Classifier(model, 4, teacher=teacher, distillation=distillation)
    classifier.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    images, labels = images_and_labels()
    loss = classifier.training_step((images, labels), 0)
    with torch.no_grad():
        model.train()
        z, t = (net(images).double().numpy() for net in (copy.deepcopy(model), teacher.eval()))
    hard = -np.log(softmax(z)[np.arange(len(z)), labels]).mean()
    p, q = softmax(t / 2), softmax(z / 2)
    soft = 4 * (p * np.log(p / q)).sum(1).mean()
    assert loss.item() == pytest.approx((1 - distillation) * hard + distillation * soft, rel=1e-4)


def test_the_teacher_is_neither_trained_nor_saved(tmp_path: Path) -> None:
    teacher = network()
    before = copy.deepcopy(teacher.state_dict())
    classifier = Classifier(network(), 4, teacher=teacher)
    trainer = tiny_trainer(tmp_path)
    trainer.fit(classifier, loader(), loader())
    assert not any("teacher" in name for name, _ in classifier.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "run.ckpt", model=network(), weights_only=True)
    assert loaded.state_dict().keys() == Classifier(network(), 4).state_dict().keys()


def test_a_model_is_not_its_own_teacher() -> None:
    model = network()
    with pytest.raises(TypeError, match="an nn.Module other than model"):
        Classifier(model, 4, teacher=model)
