"""`method=adalora`: fine-tune PEFT's AdaLoRA, which chooses the rank of every matrix while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerif.adapt.adalora import AdaLoraAdapter
from layerif.app.methods._finetune import FineTune
from layerif.app.setup import Setup


@dataclass(frozen=True, kw_only=True)
class AdaLora(FineTune, AdaLoraAdapter):
    """Fine-tunes PEFT's AdaLoRA, which chooses the rank of every matrix while it trains."""

    name: ClassVar[str] = "adalora"
    takes_parts: ClassVar[bool] = False

    def check(self, setup: Setup) -> None:
        if setup.fit.keep == "best" or setup.fit.patience is not None:
            given = "fit.keep=best" if setup.fit.keep == "best" else f"fit.patience={setup.fit.patience}"
            raise ValueError(
                f"method=adalora takes ranks away until late in the training, and {given} could keep weights from "
                "before that; use fit.keep=last and fit.patience=null"
            )
        if setup.decider.estimator.needs.is_measured and setup.decider.allocator.spends != "nothing":
            raise ValueError(
                "method=adalora finds ranks by itself and looks at no scores; use estimator=uniform, which measures "
                "nothing"
            )
        super().check(setup)
