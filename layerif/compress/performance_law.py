"""The Performance Law (Wu and Tang, 2024, arXiv 2408.09895): the MMLU that its fit expects of a dense model's shape.

The fit knows nothing of the weights, of which layers go, or of a recovery. It is about a model that was trained in this
shape from the start, on as many tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerif.checks import Count, Positive, check_arguments
from layerif.models.blocks import blocks

LABEL = "the Performance Law, a fit on ten models (arXiv 2408.09895)"
CHANCE = 0.25  # questions have four options
_MOST_ROWS = 20


@dataclass(frozen=True)
class Fewer:
    """A number of layers with the figures that the law expects of it.

    Attributes:
        layers: the layers that are left.
        parameters: of the whole model with these layers.
        mmlu: the expected accuracy (0–1); `CHANCE` is the least that the law gives.
        change: its difference from the one of all layers.
    """

    layers: int
    parameters: int
    mmlu: float
    change: float


def performance_law(
    layers: Count, *, hidden_size: Count, ffn_size: Count, parameters: Positive, tokens: Positive
) -> float:
    """Gives the MMLU accuracy (0–1) that the law expects of a dense model.

    With N layers, hidden size h, width d of the feed-forward part, S parameters in 1e9 and T training tokens in 1e12:
    u = exp(−((10/d + 20/h)·N)²), T' = min(T, S) and
    MMLU = 13.95018192·ln(uN) + .23072027·ln(uh) − .48523402·ln(u·d) + 5.39801689·ln(uT') + 9.195410648934768 per cent,
    which is 25 where it would be less, and 90 + 10·tanh(.1·MMLU − 9) where it would be more than 90.

    Args:
        layers: N.
        hidden_size: h.
        ffn_size: d.
        parameters: the number of parameters.
        tokens: the number of training tokens.
    """
    given = {"hidden_size": hidden_size, "ffn_size": ffn_size, "parameters": parameters, "tokens": tokens}
    check_arguments(performance_law, "performance_law", layers=layers, **given)
    log_u = -(((10 / ffn_size + 20 / hidden_size) * layers) ** 2)  # ln u: u itself can be too small for a float
    per_cent = (
        13.95018192 * (log_u + math.log(layers))
        + 0.23072027 * (log_u + math.log(hidden_size))
        - 0.48523402 * (log_u + math.log(ffn_size))
        + 5.39801689 * (log_u + math.log(min(tokens / 1e12, parameters / 1e9)))
        + 9.195410648934768
    )
    if per_cent > 90:
        per_cent = 90 + 10 * math.tanh(0.1 * per_cent - 9)
    return max(per_cent / 100, CHANCE)


def fewer_layers(skeleton: nn.Module, tokens: float) -> list[Fewer]:
    """Gives what the law expects of a model with all its layers and with fewer, down to half of them.

    Args:
        skeleton: a causal language model, with weights or without.
        tokens: the number of tokens that it was trained on.

    Raises:
        ValueError: the model has experts; the law's figures for these are others.
    """
    shape, found = _shape(skeleton), blocks(skeleton)
    every = sum(parameter.numel() for parameter in skeleton.parameters())
    of_block = sum(parameter.numel() for block in found.values() for parameter in block.parameters()) / len(found)
    rows: list[Fewer] = []
    for layers in range(len(found), max(len(found) // 2, 1) - 1, -math.ceil(len(found) / 2 / _MOST_ROWS)):
        parameters = round(every - (len(found) - layers) * of_block)
        mmlu = performance_law(layers, parameters=parameters, tokens=tokens, **shape)
        rows.append(Fewer(layers, parameters, mmlu, mmlu - rows[0].mmlu if rows else 0.0))
    return rows


def _shape(skeleton: Any) -> dict[str, int]:
    config = skeleton.config.get_text_config()
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        raise ValueError(
            f"method.training_tokens asks for the Performance Law of dense models, and a {config.model_type} has "
            "experts; leave it null"
        )
    ffn_size = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
    if not isinstance(ffn_size, int):
        raise ValueError(
            "method.training_tokens asks for the Performance Law, which needs one width of all feed-forward parts, and "
            f"the configuration of {config.model_type} gives none (intermediate_size, ffn_dim); leave it null"
        )
    return {"hidden_size": config.hidden_size, "ffn_size": ffn_size}
