"""What a LoRA-MoE adapter is: one description, saved as `adapter_config.json`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from peft import PeftConfig
from peft.utils import PeftType


@dataclass
class LoraMoeConfig(PeftConfig):
    """Every targeted linear becomes W·x + Σ_e g_e(x)·B_e·A_e·dropout(x)·α/r, g the renormalised top-k of softmax(R·x).

    With one expert there is no router: W·x + B·A·dropout(x)·α/r, plain LoRA.

    r, lora_alpha, lora_dropout: rank of an expert, α, and the rate of the one dropout mask its experts share.
    num_experts: E, one number for all, or a number by
        - full module name (`model.layers.3.mlp.up_proj`),
        - pattern, matched like the keys of PEFT's `rank_pattern` (`q_proj`, `layers.[0-3].mlp.*`; the first wins),
        - block name (`model.layers.3`),
        the more specific before the less. Every targeted module needs a count and every key a module.
    top_k: experts per token; never more than E, so 1 where E = 1.
    balance_coefficient: weight of the load-balancing loss. The training loop adds it,
        `loss + config.balance_coefficient * balance_loss(model)`; a model trained without reading it warns.
    keep_zeros: for a pruned base. One expert: B·A·α/r counts only where W is not zero, so that the merged weight has
        W's zeros and equals the trained model. More experts cannot merge, and leave W as it is.
    target_modules: names or name endings (or one regular expression) of nn.Linear modules; None, or "all-linear", is
        every nn.Linear inside the decoder blocks, which leaves the output head alone.
    exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in PEFT's LoraConfig.

    Raises ValueError for a value out of its range.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    num_experts: int | Mapping[str, int] = 5
    top_k: int = 2
    balance_coefficient: float = 0.0
    keep_zeros: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LORA_MOE")
        _require_count("r", self.r)
        _require_count("top_k", self.top_k)
        if isinstance(self.num_experts, Mapping):
            self.num_experts = dict(self.num_experts)
            if not self.num_experts:
                raise ValueError(
                    "num_experts={} names no layer; give one number for all, or a number by block, module or pattern"
                )
            for key, count in self.num_experts.items():
                _require_count(f"num_experts[{key!r}]", count)
                _require_pattern(key)
        else:
            _require_count("num_experts", self.num_experts)
        _require("lora_alpha", self.lora_alpha, self.lora_alpha > 0, "a number above 0")
        _require("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "a rate of at least 0 and below 1")
        _require("balance_coefficient", self.balance_coefficient, self.balance_coefficient >= 0, "0 or more")
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
        """The most experts any module may get."""
        return max(self.num_experts.values()) if isinstance(self.num_experts, Mapping) else self.num_experts


def _require(name: str, got: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {got!r}")


def _require_count(name: str, got: object) -> None:
    whole = isinstance(got, int) and not isinstance(got, bool)
    _require(name, got, whole and got >= 1, "a whole number of at least 1")  # pyright: ignore[reportOperatorIssue]


def _require_pattern(key: str) -> None:
    try:
        re.compile(key)
    except re.error as error:
        raise ValueError(
            f"num_experts key {key!r} is no valid pattern ({error}); give a block, a module or a regular expression"
        ) from None


def _names(name: str, given: object) -> list[str] | str | None:
    if given is None or isinstance(given, str):
        return given
    names = sorted(set(given))  # pyright: ignore[reportArgumentType]
    _require(name, given, bool(names) and all(isinstance(entry, str) and entry for entry in names), "module names")
    return names
