"""What has to wait until the LightningModule has set itself up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lq.callback.averages import copies_the_model
from lq.callback.steps.calls import has_weighted_layers
from lq.callback.steps.evaluation import is_overridden


def waits_for_setup(trainer: Any, pl_module: Any) -> bool:
    """Whether to wait until ``pl_module`` has run a ``setup`` of its own, which may make its data or its layers.

    Not where another callback copies the model before that, and there is all that is needed to prepare it.
    """
    if not is_overridden("setup", pl_module):
        return False
    has_data = trainer.fit_loop._data_source.instance is not pl_module
    return not (copies_the_model(trainer) and has_data and has_weighted_layers(pl_module))


def after_own_setup(pl_module: Any, then: Callable[[], None]) -> None:
    """Call ``then`` when the user's own ``setup`` of ``pl_module`` has run.

    Callbacks are set up before the module, and have no hook between that and the optimizers, which have to find a
    module that is ready to train: one that makes its data sets (or its layers) in ``setup`` cannot be looked at before.
    """
    before = pl_module.__dict__.get("setup")

    def setup(*args: Any, **kwargs: Any) -> None:
        forget()
        pl_module.setup(*args, **kwargs)
        then()

    def forget() -> None:
        del pl_module.__dict__["setup"]
        if before is not None:
            pl_module.__dict__["setup"] = before

    if getattr(before, "__qualname__", "") == setup.__qualname__:
        return  # a run before did not get that far
    pl_module.__dict__["setup"] = setup
