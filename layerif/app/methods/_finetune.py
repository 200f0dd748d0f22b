"""The work of every method that fine-tunes: decide, train an adapter or layers by the allocation, evaluate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from omegaconf import OmegaConf
from torch import nn

from layerif.adapt.adapters import Adapter
from layerif.adapt.callback import InfluenceCallback
from layerif.adapt.directions import directions_asked, measured_directions
from layerif.adapt.module import AdapterModule
from layerif.adapt.strategy import ShardedBase
from layerif.adapt.train import check_training, train
from layerif.adapt.tuning import Tuning
from layerif.app.methods._rows import as_many_rows, check_selection, filter_tokens, select_rows
from layerif.app.methods._steps import evaluate, recording
from layerif.app.setup import Setup
from layerif.record.record import RunRecord


class FineTune:
    """A method whose settings are those of a kind of fine-tuning. It is combined with a subclass of `Tuning`."""

    evaluates: ClassVar[bool] = True
    further_metrics: ClassVar[tuple[str, ...]] = ()
    selects_rows: ClassVar[bool] = True
    takes_parts: ClassVar[bool] = True
    fine_tunes: ClassVar[bool] = True

    def check(self, setup: Setup) -> None:
        self._check_quantised(setup)
        self._module(setup)
        self._check_parts(setup)
        if self._begins_with_gradient:
            directions_asked(setup.decider, cast(Adapter, self).target_modules).check(setup.decider)
        self._check_expert_rank(setup)
        skeleton, allocation, tuning = setup.model.skeleton(), setup.decider.preview(), cast(Tuning, self)
        tuning.check_fits(skeleton, allocation, free=setup.free_for_training)
        check_selection(setup)
        selected = as_many_rows(setup)
        tuning.check_start(setup.model.skeleton(), allocation, selected.datamodule)
        check_fit(selected)

    def preview(self, setup: Setup) -> dict[str, str]:
        data = setup.datamodule
        cut = f"{data.train.num_truncated} samples cut at {setup.config.data.max_length} tokens"
        rows = setup.selection.expected(setup.pool)
        most = "" if rows == len(data.train) else f"{rows} of "
        return {"fit": f"{most}{len(data.train)} samples in batches of {data.batch_size}, {cut}"}

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        module = self._module(setup)

        def load() -> nn.Module:
            return module.base_model().to(setup.decider.device)

        setup = select_rows(setup, load, record, folder)
        filter_tokens(setup, load, record)
        check_fit(setup)  # once more, now that the rows and tokens are known
        cast(Tuning, self).check_start(setup.model.skeleton(), setup.decider.preview(), setup.datamodule)
        directions = None
        if self._begins_with_gradient:
            directions = partial(measured_directions, setup.decider, cast(Adapter, self).target_modules)
        influence = InfluenceCallback(setup.decider, directions)
        if setup.evaluation.before:
            evaluate(load(), setup, record, "before/")
        with recording(influence, record):
            model = fit(setup, module, influence, record, folder)
        evaluate(model, setup, record)

    def _check_quantised(self, setup: Setup) -> None:
        """Refuses settings that change or read the weights of a quantised base."""
        scheme, found = setup.model.quantisation, None
        if getattr(self, "init", "default") == "lora_ga":
            found = "method.init=lora_ga moves the weights of the base", "method.init=eva or gradient"
        if getattr(self, "keep_zeros", False):
            found = "method.keep_zeros=true keeps zeros of the weights, which rounding moves", "method.keep_zeros=false"
        if scheme and found:
            what, instead = found
            raise ValueError(f"{what}, and the model is quantised ({scheme}); use {instead}, or model.quantised=none")

    def _check_expert_rank(self, setup: Setup) -> None:
        """Refuses gain curves of experts of another rank, whose parameters would not be those of the budget."""
        priced, rank = getattr(setup.decider.estimator, "r", None), getattr(self, "r", None)
        if getattr(setup.decider.estimator, "kind", None) == "experts" and (priced or 8) != rank:
            raise ValueError(
                f"estimator.r={priced} is the rank of an expert in the gain curves, and method.r={rank} that of the "
                "experts that are trained; give both the same, or leave estimator.r out"
            )

    def _check_parts(self, setup: Setup) -> None:
        """Refuses settings that ask for the whole model, where its weights are divided among processes."""
        if not setup.decider.spread:
            return
        if not isinstance(strategy := setup.trainer([], Path()).strategy, ShardedBase):
            raise ValueError(
                f"fine-tuning cannot divide a frozen model by {type(strategy).__name__}; use trainer.strategy=fsdp"
            )
        # Each process would unscale its own gradients and skip its own steps, before gradients are averaged.
        if (precision := str(setup.config.trainer.get("precision"))) in ("16-mixed", "16"):
            raise ValueError(
                f"trainer.precision={precision} scales the loss in every process by itself, so that adapters would "
                "differ with trainer.strategy=fsdp; use trainer.precision=bf16-mixed or 32-true, or "
                "trainer.strategy=ddp"
            )
        asked = {
            f"method.init={getattr(self, 'init', None)}": getattr(self, "init", None) in ("eva", "lora_ga"),
            "evaluation.before=true": setup.evaluation.before,
        }
        for setting in (setting for setting, is_asked in asked.items() if is_asked):
            raise ValueError(
                f"{setting} asks the whole model on one device, and trainer.strategy=fsdp divides it; leave it out, or "
                "use trainer.strategy=ddp"
            )

    @property
    def _begins_with_gradient(self) -> bool:
        return getattr(self, "init", "default") == "gradient"

    def _module(self, setup: Setup) -> AdapterModule:
        model: Any = OmegaConf.to_container(setup.config.model, resolve=True)
        module = AdapterModule(cast(Tuning, self), model)
        module.trusted_targets = tuple(setup.config.get("trusted_targets") or ())
        return module


def check_fit(setup: Setup) -> None:
    """Refuses settings of trainer and data with which `fit` would train nothing, never end, or fail after the scores.

    Raises:
        ValueError: see `layerif.adapt.train.check_training`.
    """
    check_training(setup.trainer([], Path()), setup.datamodule, setup.fit, measure_validation=_asks_for_loss(setup))


def fit(setup: Setup, module: AdapterModule, influence: InfluenceCallback, record: RunRecord, folder: Path) -> Any:
    """Trains with the configuration's trainer and data, see `layerif.adapt.train.train`."""
    return train(
        module,
        setup.datamodule,
        influence,
        setup.fit,
        lambda callbacks: setup.trainer(callbacks, folder),
        record,
        folder,
        measure_validation=_asks_for_loss(setup),
    )


def _asks_for_loss(setup: Setup) -> bool:
    return setup.config.get("objective") == "validation/loss"
