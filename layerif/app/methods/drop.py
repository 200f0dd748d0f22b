"""`method=drop`: decide, leave blocks or experts out, keep the smaller model, measure it, and recover it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from layerif.adapt.adapters import LoraMoeAdapter
from layerif.allocate.allocation import Allocation
from layerif.allocate.blocks import Blocks
from layerif.app.methods._finetune import check_fit
from layerif.app.methods._recovery import check_begin, one_expert_each, recover, save_model
from layerif.app.methods._steps import (
    check_bare,
    check_calibration_apart,
    evaluate,
    evaluate_before,
    loader,
    record_decision,
    record_rise,
)
from layerif.app.setup import Setup
from layerif.checks import Count, check_fields, how_many
from layerif.compress.drop import check_droppable, check_ordinary, drop
from layerif.compress.greedy import greedy
from layerif.compress.speed import Speed, folder_bytes, weight_bytes
from layerif.decide import Decision
from layerif.files import write_text
from layerif.layers import is_whole_expert, within_block
from layerif.models.blocks import blocks, context_length, device_of
from layerif.models.contexts import evaluating
from layerif.probe.curves.text import LossText, mean_loss
from layerif.probe.measurements import Load
from layerif.probe.skips import Skips
from layerif.pruning.calibration import Calibration
from layerif.record.record import RunRecord

SEARCH = "greedy.json"  # in the run's folder, which a killed search carries on from
CONTINUED = "continuations.json"  # the dense model's and the smaller one's answers to `prompts`
_FULL_DISK = "free some space and give the same command again, or use method.save=false"
_NEW_TOKENS = 48  # in a continuation


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Leaves out the blocks that the allocation does not keep, or attention and MLP of blocks, or experts.

    A run leaves `model/` for plain transformers, and after a recovery `recovered/`.

    Attributes:
        calibration: the text of estimators that read windows, and of the search.
        search: `greedy` leaves out one unit after the other, each time the one whose absence raises the measured loss
            least, in place of scores; it takes `keep` and `unit` of `allocator=blocks`.
        search_windows: the calibration windows that the search measures the loss on.
        recover: `lora` fine-tunes the smaller model on the task and merges the adapter into a folder `recovered`.
        adapter: settings of that fine-tuning.
        save: leave the smaller model in the run's folder.
        dense: also measure the perplexity of the dense model, where perplexity is measured at all.
        speed: how speed and memory are measured, before and after; None measures neither.
        prompts: texts that the dense model and the smaller one continue, to be looked at.
    """

    name: ClassVar[str] = "drop"
    allocates: ClassVar[Literal["blocks"]] = "blocks"
    evaluates: ClassVar[bool] = True
    further_metrics: ClassVar[tuple[str, ...]] = ("perplexity",)
    selects_rows: ClassVar[bool] = False
    takes_parts: ClassVar[bool] = False

    calibration: Calibration
    search: Literal["none", "greedy"] = "none"
    search_windows: Count = 8
    recover: Literal["none", "lora"] = "none"
    adapter: LoraMoeAdapter | None = None
    save: bool = True
    dense: bool = True
    speed: Speed | None = field(default_factory=Speed)
    prompts: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_fields(self, "method")
        for number, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise ValueError(
                    f"method.prompts.{number} is empty, which nothing can continue; give a text, or leave it out"
                )
        if self.recover == "none":
            return
        if self.adapter is None:
            raise ValueError("method.recover=lora needs method.adapter; give it as conf/method/drop.yaml does")
        check_begin(self.adapter)
        if not self.save:
            raise ValueError("method.recover=lora starts from the saved model; use method.save=true")

    @property
    def fine_tunes(self) -> bool:
        return self.recover != "none"

    def check(self, setup: Setup) -> None:
        check_bare(setup, "dropping blocks")
        decider, skeleton = setup.decider, setup.model.skeleton()
        if self.search == "greedy" and not isinstance(decider.allocator, Blocks):
            raise ValueError(
                "method.search=greedy takes allocator.keep and allocator.unit, and looks at nothing else that an "
                "allocator says; use allocator=blocks"
            )
        if self.search == "greedy" and decider.takes_experts:
            raise ValueError(
                "method.search=greedy would leave out experts without regard to their block; use method.search=none "
                "with estimator=expert_output or skip_curve"
            )
        left_out = _left_out(decider.preview())
        if self.save and (parts := [unit for unit in left_out if _is_part(unit)]):
            raise ValueError(
                f"method.save=true cannot write a model without {parts[0]}, because no configuration can say so; use "
                "method.save=false, or allocator.unit=block"
            )
        check_droppable(skeleton, left_out)
        if self.speed is not None:
            self.speed.check(skeleton)
        if self._reads_windows(setup):
            self._windows(setup)
            check_calibration_apart(setup, self.calibration)
        if self.fine_tunes:
            assert self.adapter is not None
            check_fit(setup)
            drop(skeleton, left_out)
            each = one_expert_each(list(blocks(skeleton)))
            self.adapter.check_fits(skeleton, each, free=setup.free_for_training, where="method.adapter")

    def preview(self, setup: Setup) -> dict[str, str]:
        given = setup.decider.preview()
        said = f"{sum(given.values)} of {len(given.units)} units stay"
        if self._reads_windows(setup):
            num_windows = sum(map(len, self._windows(setup)))
            said += f", {num_windows} calibration windows of {self.calibration.window} tokens"
        return {"drop": said}

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        load = loader(setup)
        model: Any = load()
        evaluate_before(load, setup, record, dense=self.dense)
        decision = self._decided(setup, load, folder)
        record_decision(decision, record)
        watched = self._watched(setup)
        dense_loss = None if watched is None else mean_loss(model, watched)
        continued = {"dense": self._continued(model, setup)}
        self._measure(model, record, "before/", Path(setup.model.location()[0]))
        total = _num_weights(model)
        left_out = _left_out(decision.allocation)
        drop(model, left_out)
        record.parameters = {"total": _num_weights(model), "dropped": total - _num_weights(model)}
        if not any(map(_is_part, left_out)):
            check_ordinary(model)
        if self.save:
            save_model(model, setup, folder / "model", what="smaller", advice=_FULL_DISK)
        self._measure(model, record, "", folder / "model" if self.save else None)
        if watched is not None and dense_loss is not None:
            record_rise(record, dense_loss, mean_loss(model, watched))
        if self.prompts:
            continued["smaller"] = self._continued(model, setup)
            write_text(folder / CONTINUED, json.dumps(continued, indent=1) + "\n")
        evaluate(model, setup, record, "dropped/" if self.fine_tunes else "")
        if self.fine_tunes:
            assert self.adapter is not None
            del model, load
            recover(setup, record, folder, self.adapter, None, advice=_FULL_DISK)

    def _reads_windows(self, setup: Setup) -> bool:
        return self.search == "greedy" or setup.decider.reads_windows

    def _windows(self, setup: Setup) -> list[Any]:
        return self.calibration.batches(setup.tokenizer, context_length(setup.model.skeleton()))

    def _watched(self, setup: Setup) -> LossText | None:
        """Gives the windows whose loss the prices predict; None where no prices in nats are spent."""
        decider, needs = setup.decider, setup.decider.estimator.needs
        is_priced = self.search == "none" and decider.allocator.spends != "nothing"
        return needs.loss_text(decider) if is_priced and isinstance(needs, Skips) else None

    def _decided(self, setup: Setup, load: Load, folder: Path) -> Decision:
        if self.search == "none":
            return setup.decider(load)
        given = setup.decider.preview()
        rows = [row for batch in self._windows(setup) for row in batch.split(1)][: self.search_windows]
        found = greedy(load(), given.units, len(_left_out(given)), rows, state=folder / SEARCH)
        values = tuple(int(unit not in found.dropped) for unit in given.units)
        steps = ", ".join(f"{unit} {loss:.4f}" for unit, loss in zip(found.dropped, found.losses, strict=True))
        return Decision(
            scores=None,
            allocation=replace(given, values=values),
            source=f"greedy(unit={getattr(setup.decider.allocator, 'unit', 'block')}, windows={len(rows)})",
            seconds={"search": found.seconds},
            notes=(
                f"method.search=greedy: loss {found.dense:.4f} nats on {how_many(len(rows), 'window')} of the dense "
                f"model, and after each unit that went: {steps}",
            ),
        )

    def _measure(self, model: nn.Module, record: RunRecord, prefix: str, folder: Path | None) -> None:
        """Puts speed, memory and sizes into the record."""
        found: dict[str, float] = {"weight_bytes": weight_bytes(model)}
        if folder is not None and folder.is_dir():
            found["folder_bytes"] = folder_bytes(folder)
        if self.speed is not None:
            found |= self.speed(model)
        record.metrics |= {f"{prefix}{name}": value for name, value in found.items()}

    def _continued(self, model: Any, setup: Setup) -> dict[str, str]:
        """Continues each prompt greedily."""
        found = {}
        for prompt in self.prompts:
            given = setup.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device_of(model))
            with evaluating(model):
                ids = model.generate(
                    **given, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=setup.decider.pad_id
                )
            found[prompt] = setup.tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        return found


def _is_part(unit: str) -> bool:
    """Tells if a unit is the attention or the MLP of a block."""
    return bool(within_block(unit)) and not is_whole_expert(unit)


def _num_weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _left_out(given: Allocation) -> list[str]:
    """Gives the units that go, and refuses an allocation that keeps all of them or none."""
    found = [unit for unit, stays in given.by_name().items() if not stays]
    if not 0 < len(found) < len(given.units):
        said = "all" if not found else "none"
        raise ValueError(
            f"the allocation keeps {said} of {len(given.units)} units, and method=drop leaves out some; use "
            f"allocator=blocks with allocator.keep from 1 to {len(given.units) - 1}"
        )
    return found
