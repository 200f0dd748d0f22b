"""The settings of a LoRA-MoE adapter, saved as `adapter_config.json`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt
from peft import PeftConfig
from peft.utils import PeftType

from layerif.checks import Count, NonNegative, Positive, check_fields, check_value


@dataclass
class LoraMoeConfig(PeftConfig):
    """The settings of a mixture of LoRA experts.

    Every targeted linear layer becomes W·x + Σ_e g_e(x)·B_e·A_e·dropout(x)·α/r, where g is the renormalised top-k of
    softmax(R·x). With one expert there is no router: W·x + B·A·dropout(x)·α/r, plain LoRA.

    Args:
        r: the rank of an expert.
        lora_alpha: α.
        lora_dropout: the rate of the dropout mask, which the experts of a layer share.
        num_experts: E, one number for all layers, or a number by full module name (`model.layers.3.mlp.up_proj`), by
            pattern (`q_proj`, `layers.[0-3].mlp.*`; matched like the keys of PEFT's `rank_pattern`, and the first match
            counts) or by block name (`model.layers.3`). A more specific key has precedence. Every targeted module needs
            a count, and every key needs a module.
        top_k: the number of experts per token; 1 where a layer has only one.
        balance_coefficient: the weight of the load-balancing loss. A training forward with `labels` has it in the
            model's own loss, so `Trainer` and TRL's `SFTTrainer` train it. A loop with a loss of its own adds it,
            `loss + config.balance_coefficient * balance_loss(model)`; a model that is trained without it warns.
        keep_zeros: for a pruned base model with one expert per layer: B·A·α/r counts only where W is not zero, so that
            the merged weight keeps the zeros of W and equals the trained model. Several experts cannot be merged and
            leave W as it is.
        target_modules: names or name endings of nn.Linear modules, or one regular expression; None or "all-linear"
            takes every nn.Linear inside the decoder blocks, which leaves the output head out.
        exclude_modules: as in PEFT's LoraConfig, like the three that follow.
        modules_to_save: as in PEFT's LoraConfig.
        layers_to_transform: as in PEFT's LoraConfig.
        layers_pattern: as in PEFT's LoraConfig.

    Raises:
        ValueError: a value is out of its range.
    """

    r: Count = 8
    lora_alpha: Positive = 16
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.05
    num_experts: int | Mapping[str, int] = 5
    top_k: Count = 2
    balance_coefficient: NonNegative = 0.0
    keep_zeros: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LORA_MOE")
        check_fields(self, "LoraMoeConfig")
        if isinstance(self.num_experts, Mapping):
            self.num_experts = dict(self.num_experts)
            if not self.num_experts:
                raise ValueError(
                    "num_experts={} names no layer; give one number for all, or a number by block, module or pattern"
                )
            for key, count in self.num_experts.items():
                check_value(f"num_experts[{key!r}]", count, Count)
                _require_pattern(key)
        else:
            check_value("num_experts", self.num_experts, Count)
        # Sorted lists, not sets as in PEFT: the saved file is then the same for the same adapter.
        self.target_modules = _names("target_modules", self.target_modules)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} has no effect on target_modules="
                f"{self.target_modules!r}, a regular expression; give a list, or select the layers in the expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect alone; set layers_to_transform as well"
            )
        if self.top_k == 1 and self.balance_coefficient == 0 and self.largest_count > 1:
            warnings.warn(
                "top_k=1 gives the chosen expert the weight 1 whatever its probability, so the router learns nothing; "
                "use top_k=2 or a balance_coefficient above 0",
                stacklevel=2,
            )

    @property
    def largest_count(self) -> int:
        """The most experts that a module can have."""
        return max(self.num_experts.values()) if isinstance(self.num_experts, Mapping) else self.num_experts


def _require_pattern(key: str) -> None:
    try:
        re.compile(key)
    except re.error as error:
        raise ValueError(
            f"num_experts key {key!r} is not a valid pattern ({error}); give a block, a module or a regular expression"
        ) from None


def _names(name: str, given: object) -> list[str] | str | None:
    if given is None or isinstance(given, str):
        return given
    names = sorted(set(given))  # pyright: ignore[reportArgumentType]
    if not names or not all(isinstance(entry, str) and entry for entry in names):
        raise ValueError(f"{name}={given!r} is not allowed; allowed: names of modules, at least one, or null")
    return names
