"""The first weights of an adapter: PEFT's own, or the leading directions of the mean gradient.

B is zero either way, so that the model starts unchanged. Under `gradient` the rows of A are the leading right singular
vectors of each matrix's mean train gradient, as long as PEFT's random rows are on average. The experts of a matrix take
disjoint directions, the first expert the leading ones. Rows beyond the directions that a gradient has stay random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerif.decide import Decider
from layerif.models.blocks import bare
from layerif.probe.gains import Gains
from layerif.probe.measurements import Load

Init = Literal["default", "gradient"]

_LENGTH = math.sqrt(1 / 3)  # the root mean square length of a row of U(−1/√I, 1/√I), PEFT's first A


def directions_asked(decider: Decider, target_modules: list[str] | None) -> Gains:
    """Gives the request for the directions: that of `estimator=gain_curve` where it is the estimator."""
    needs = decider.estimator.needs
    return needs if isinstance(needs, Gains) else Gains(tuple(target_modules or ()) or None, seed=decider.seed)


def measured_directions(decider: Decider, target_modules: list[str] | None, load: Load) -> dict[str, Tensor]:
    """Measures the directions that an adapter begins with, or reads them from the store.

    Args:
        decider: the model, the samples and the store.
        target_modules: names of the linear layers that get an adapter; None: all of the blocks.
        load: gives the model, and is called only if something is measured.

    Returns:
        The leading directions of every linear layer by its name (R×I), without those of no strength.
    """
    gains, _ = directions_asked(decider, target_modules).take(decider, load)
    return {
        param.removesuffix(".weight"): each.rights[each.strengths > 0].float() for param, each in gains.gains.items()
    }


def begin_with(model: nn.Module, directions: Mapping[str, Tensor]) -> None:
    """Sets the rows of A to directions.

    Args:
        model: wrapped by LoRA or LoRA-MoE.
        directions: by the name of the linear layer in the bare model (R×I).
    """
    with torch.no_grad():
        for name, module in bare(model).named_modules():
            found: Any = getattr(module, "lora_A", None) or getattr(module, "lora_moe_A", None)
            if name in directions and found:
                for layer in found.values():
                    rows_RI = directions[name][: len(layer.weight)]
                    layer.weight[: len(rows_RI)] = (_LENGTH * rows_RI).to(layer.weight)
