"""Sparsity per layer, by the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from layerif.allocate._shares import (
    check_feasible,
    checked_scores,
    mean_of,
    oriented_values,
    scaled_to_mean,
    shifted_to_mean,
)
from layerif.allocate.allocation import BUDGET_TOLERANCE, Allocation, checked_sizes
from layerif.checks import check_fields, check_value
from layerif.layers import LayerMap
from layerif.scores import SPREAD_NOISE, LayerScores

Rule = Literal["scaled", "shifted"]
Epsilon = Annotated[float, Ge(0), Le(1), "the paper used 0.1 to 0.5"]
TargetSparsity = Annotated[float, Ge(0), Lt(1)]
# A layer without weights would leave nothing to prune or to recover.
MaxSparsity = Annotated[float, Gt(0), Lt(1), "the default is 0.99"]


def to_sparsity(
    scores: Sequence[float],
    numel: Sequence[int],
    target: float,
    *,
    epsilon: float,
    max_sparsity: float = 0.99,
    rule: Rule = "scaled",
) -> list[float]:
    """Gives sparsities per layer whose mean, weighted by the layers' parameters, is `target`.

    With x the min-max of s (½ for equal scores):

    `scaled`, the paper's: r = (1−ε) + 2εx and ρ_l = c·r_l with one c for all. Where c·r_l exceeds `max_sparsity`, ρ_l
    is `max_sparsity` and the other layers make up for it, still in proportion to r. (Upstream clips without this, and
    misses the target.)

    `shifted`, that of OWL, DLP and LSA: ρ_l = c + 2εx_l with one c for all, which is target + 2ε(x_l − mean x) where
    nothing is clipped. Where ρ_l is clipped to [0, `max_sparsity`], the other layers make up for it by a common c.

    Args:
        scores: s, one per layer; a higher score gets more sparsity.
        numel: the parameters of each layer, the weights of the mean.
        target: the mean sparsity.
        epsilon: ε, from 0 to 1.
        max_sparsity: the most that a layer gets.
        rule: see above.

    Raises:
        ValueError: names the feasible range if no c meets the target.
    """
    values = checked_scores(scores)
    weights = checked_sizes(numel, len(values))
    check_value("allocator.epsilon", epsilon, Epsilon)
    check_value("allocator.max_sparsity", max_sparsity, MaxSparsity)
    check_value("allocator.rule", rule, Rule)
    _check_target(target, max_sparsity)
    if rule == "shifted":
        return shifted_to_mean([2 * epsilon * x for x in _min_max(values)], weights, target, max_sparsity)
    relative = [(1 - epsilon) + 2 * epsilon * x for x in _min_max(values)]
    relative = [r if r > SPREAD_NOISE else 0.0 for r in relative]  # under ε = 1 rounding must not become a share
    found = scaled_to_mean(relative, weights, target, max_sparsity)
    spent = mean_of(found, weights)
    if spent < target - BUDGET_TOLERANCE / 2:  # ε = 1 leaves nothing to scale in the lowest layers
        raise ValueError(
            f"allocator.target={target} cannot be reached with allocator.epsilon={epsilon}: layers of the lowest "
            f"score stay dense; feasible are 0 to {spent:.6f}; lower the target or epsilon"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Spends scores on a sparsity per layer, by `to_sparsity`, weighted by the parameters that the `LayerMap` counts.

    Attributes:
        target: the mean sparsity.
        epsilon: the range of the relative sparsities; the paper used 0.3 for magnitude pruning and 0.1 for Wanda and
            SparseGPT.
        max_sparsity: the most that a layer gets.
        smoothing: smooth the scores over depth first, as the paper does; it needs at least 7 layers.
        rule: `scaled` is the map of the paper and of AlphaPruning, `shifted` that of OWL (epsilon 0.08), DLP (0.15) and
            LSA (0.07); these three do not smooth.
    """

    spends: ClassVar[Literal["scores"]] = "scores"

    target: TargetSparsity = 0.5
    epsilon: Epsilon = 0.1
    max_sparsity: MaxSparsity = 0.99
    smoothing: bool = True
    rule: Rule = "scaled"

    def __post_init__(self) -> None:
        check_fields(self, "allocator")
        _check_target(self.target, self.max_sparsity)

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        values = oriented_values(scores, layers, "sparsity", smoothing=self.smoothing)
        sparsities = to_sparsity(
            values, layers.numel, self.target, epsilon=self.epsilon, max_sparsity=self.max_sparsity, rule=self.rule
        )
        return Allocation(layers.names, "sparsity", tuple(sparsities), self.target, layers.numel)


def _min_max(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    if high - low <= SPREAD_NOISE * high:
        return [0.5] * len(values)
    return [(value - low) / (high - low) for value in values]


def _check_target(target: float, max_sparsity: float) -> None:
    check_value("allocator.target", target, TargetSparsity)
    check_feasible(target, max_sparsity, "allocator.max_sparsity")
