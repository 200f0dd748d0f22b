"""The callback that scores the layers and allocates before fine-tuning or pruning starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from layerif.allocate.allocation import Allocation
from layerif.allocate.curves import Curves
from layerif.decide import Decision
from layerif.scores import LayerScores


class InfluenceCallback(L.Callback):
    """Decides the allocation in `setup`, which Lightning runs before the module's `configure_model`.

    A module that already has an allocation keeps it. A resumed run keeps the decision of its checkpoint: set
    `trainer.ckpt_path` before `fit` rather than passing it (Lightning tells no callback of the argument before it
    restores), and nothing is decided twice.

    Args:
        decide: takes a function that gives the model on the trainer's device, and returns a `Decision`. It asks for the
            model only if the evidence is not in the store. All processes measure together, and the decision of the
            first process counts.
        directions: takes the same function, and measures the directions that the adapter begins with
            (`layerif.adapt.directions`); None where it begins with random ones.
    """

    def __init__(
        self,
        decide: Callable[[Callable[[], nn.Module]], Decision],
        directions: Callable[[Callable[[], nn.Module]], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.decide = decide
        self.directions = directions
        self.decision: Decision | None = None
        self.seconds = 0.0  # that this process spent on deciding

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit" or pl_module.allocation is not None:
            return
        if trainer.ckpt_path is not None:
            saved = torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True)
            pl_module.allocation = Allocation.from_dict(saved["hyper_parameters"]["allocation"])
            return
        start = time.perf_counter()

        def load() -> nn.Module:
            return pl_module.base_model().to(trainer.strategy.root_device)

        decision = self.decide(load)
        if self.directions is not None:
            began = time.perf_counter()
            pl_module.directions = self.directions(load)
            seconds = {**decision.seconds, "directions": time.perf_counter() - began}
            decision = replace(decision, seconds=seconds)
        self.seconds = time.perf_counter() - start
        self.decision = trainer.strategy.broadcast(decision)
        pl_module.allocation = self.decision.allocation

    def state_dict(self) -> dict[str, Any]:
        if self.decision is None:
            return {}
        scores = self.decision.scores.to_dict() if self.decision.scores else None
        curves: Any = self.decision.curves
        kept = None if curves is None else {each.name: getattr(curves, each.name) for each in fields(curves)}
        plain = asdict(replace(self.decision, curves=None))
        return {**plain, "scores": scores, "curves": kept, "allocation": self.decision.allocation.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            scores = LayerScores.from_dict(state_dict["scores"]) if state_dict["scores"] else None
            curves = Curves(**state_dict["curves"]) if state_dict["curves"] else None
            allocation = Allocation.from_dict(state_dict["allocation"])
            self.decision = Decision(**{**state_dict, "scores": scores, "curves": curves, "allocation": allocation})
