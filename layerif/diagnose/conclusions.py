"""The conclusions that the evidence supports, in plain words and by stated rules.

Every claim compares a figure with a stated bar. A claim that reaches beyond what was measured, to other samples or
other sets of rows, uses the figure's 95 % interval. It is `supported` if the whole interval lies on the claim's side of
the bar and `not supported` if the whole interval lies on the other side. If the bar lies inside the interval, or the
figure is undetermined, there is `not enough evidence`. A claim whose figure has no interval is only about what was
measured (these Grams, these samples, these seeds). It says so, and compares the figure itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from layerif.checks import how_many, listed

Verdict = Literal["supported", "not supported", "not enough evidence"]

ALIKE = 0.8  # two rankings of layers count as the same from this Spearman on
SAME_DAMPING = 0.9  # the same for two dampings, which are compared on the same samples
CONVEX = {"true Hessian": 0.99, "exact": 0.95}  # the LDS that theory asks for
RESIDUAL = 1e-6  # relative residual that a solver in float64 must stay below
OFF = 0.1  # an approximation stands for the exact influence below this relative distance
CONVERGED = 0.01  # share of the gradients' squared length that samples may have in common at an optimum


@dataclass(frozen=True)
class Conclusion:
    """A claim, its verdict and the figures behind it."""

    claim: str
    verdict: Verdict
    because: str


def above(bar: float, estimate: Mapping[str, float | None]) -> Verdict:
    """Judges by its interval if a figure is above `bar`."""
    value, low, high = (estimate[end] for end in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "not enough evidence"
    if low > bar:
        return "supported"
    return "not supported" if high <= bar else "not enough evidence"


def with_interval(estimate: Mapping[str, float | None], digits: int = 2) -> str:
    """Spells a figure with its interval, or `undetermined`."""
    if estimate["value"] is None or estimate["low"] is None or estimate["high"] is None:
        return "undetermined"
    value, low, high = (f"{estimate[end]:.{digits}f}" for end in ("value", "low", "high"))
    return f"{value} (95 % interval {low} to {high})"


def conclusions(report: Mapping[str, Any]) -> list[Conclusion]:
    """Draws all conclusions.

    Args:
        report: the sections of a report, as `diagnose.json` holds them.
    """
    rules = (_instrument, _gradients, _optimum, _solvers, _approximation, _samples, _highest, _damping)
    rules += (_seeds, _curvature, _prediction, _average, _noise, _better, _beyond_words, _removed)
    rules += (_mislabel, _mislabel_better)
    return [conclusion for rule in rules if (conclusion := rule(report)) is not None]


def _instrument(report: Mapping[str, Any]) -> Conclusion:
    lds = report["instrument"]["lds"]
    verdict = "supported" if all(lds[name] > bar for name, bar in CONVEX.items()) else "not supported"
    return Conclusion(
        "The instrument is right: where theory is exact, predicted and actual loss change agree.",
        verdict,
        f"logistic regression retrained to its optimum: LDS {lds['true Hessian']:.4f} with the true Hessian (bar "
        f"{CONVEX['true Hessian']}), {lds['exact']:.4f} from gradients alone (bar {CONVEX['exact']})",
    )


def _gradients(report: Mapping[str, Any]) -> Conclusion:
    found = report["gradients"]
    bad = [f"{name} (dead)" for name in found["dead"]]
    # A gradient that is not finite has stopped the run before.
    return Conclusion(
        "On these samples every measured matrix has finite gradients, and none is dead.",
        "not supported" if bad else "supported",
        listed(bad, 6) if bad else f"{len(found['train_norms'])} matrices were examined",
    )


def _optimum(report: Mapping[str, Any]) -> Conclusion:
    found = report["gradients"]
    common = found["common"]
    verdict: Verdict = "not enough evidence"
    if common["high"] is not None:
        verdict = {"supported": "not supported", "not supported": "supported"}.get(  # type: ignore[assignment]
            above(CONVERGED, common), "not enough evidence"
        )
    meaning = {
        "supported": "influence then stands for the effect of a training row, as theory says",
        "not supported": "the scores then tell where training would start to move, not what a converged model owes to "
        "its rows",
    }.get(verdict, "")
    return Conclusion(
        "The model stands at an optimum of the training loss, as influence theory assumes.",
        verdict,
        f"the training gradients have {with_interval(common, 3)} of their squared length in common (bar {CONVERGED}; 0 "
        f"at an optimum)" + (f": {meaning}" if meaning else ""),
    )


def _solvers(report: Mapping[str, Any]) -> Conclusion | None:
    worst = report["solver"]["estimators"].get("exact")
    if worst is None:
        return None
    return Conclusion(
        "The exact solver solves the damped systems of these Grams.",
        "supported" if worst["residual_max"] < RESIDUAL else "not supported",
        f"relative residual at most {worst['residual_max']:.1e} (bar {RESIDUAL:.0e}), condition number up to "
        f"{worst['condition_max']:.1e}; rounding of the Grams is at most {worst['rounding_max']:.2g} of the damping",
    )


def _approximation(report: Mapping[str, Any]) -> Conclusion | None:
    own = report["estimator"]
    found = report["solver"]["estimators"].get(own)
    if found is None or own == "exact":
        return None
    return Conclusion(
        f"On these samples {own} stands for the exact damped influence.",
        "supported" if found["off_max"] < OFF else "not supported",
        f"its influence is off the exact one by {found['off_median']:.2g} times its size in the median matrix and "
        f"{found['off_max']:.2g} times in the worst (bar {OFF}); the loss changes show what that costs",
    )


def _samples(report: Mapping[str, Any]) -> Conclusion:
    found, half = report["stability"]["samples"], report["stability"]["half"]
    return Conclusion(
        "The same number of other samples of the task would rank the layers alike.",
        above(ALIKE, found),
        f"Spearman {with_interval(found)} (bar {ALIKE}), stepped up by Spearman–Brown from disjoint halves, which "
        f"agree by {with_interval(half)}",
    )


def _highest(report: Mapping[str, Any]) -> Conclusion:
    layers, ranks = report["layers"], report["stability"]["ranks"]
    top = min(range(len(layers)), key=lambda l: ranks[l]["value"])
    third = max(1, len(layers) // 3)
    low, high = ranks[top]["low"], ranks[top]["high"]
    verdict: Verdict = "not enough evidence"
    if high is not None:
        verdict = "supported" if high <= third else "not supported" if low > third else "not enough evidence"
    within = sum(rank["high"] is not None and rank["high"] <= third for rank in ranks)
    return Conclusion(
        f"The highest-scored layer, {layers[top]}, is among the top third.",
        verdict,
        f"95 % of the bootstrap draws rank it {low:g} to {high:g} of {len(layers)}; {within} of the {third} layers "
        "in the top third stay there in 95 % of the draws, each taken by itself"
        if high is not None
        else "no rank was determined",
    )


def _damping(report: Mapping[str, Any]) -> Conclusion | None:
    pairs = report["stability"]["damping"]
    if not pairs:
        return None
    worst = min((pair for pair in pairs if pair["spearman"] is not None), key=lambda p: p["spearman"], default=None)
    claim = "On these samples the ranking of layers does not depend on the damping, over two orders of magnitude."
    if worst is None:
        return Conclusion(claim, "not enough evidence", "the scores rank nothing")
    return Conclusion(
        claim,
        "supported" if worst["spearman"] >= SAME_DAMPING else "not supported",
        f"Spearman at least {worst['spearman']:.2f} ({worst['first']} and {worst['second']}; bar {SAME_DAMPING})",
    )


def _seeds(report: Mapping[str, Any]) -> Conclusion | None:
    pairs = [pair["spearman"] for pair in report["stability"]["seeds"] if pair["spearman"] is not None]
    if not pairs:
        return None
    return Conclusion(
        "Any two adapters of these seeds rank the layers alike.",
        "supported" if min(pairs) >= ALIKE else "not supported",
        f"Spearman {min(pairs):.2f} to {max(pairs):.2f} in {how_many(len(pairs), 'pair')} of seeds (bar {ALIKE}), "
        "where scores are taken on the LoRA matrices of each adapter; without an interval over seeds",
    )


def _curvature(report: Mapping[str, Any]) -> Conclusion | None:
    names, matrix = report["agreement"]["names"], report["agreement"]["spearman"]
    own, plain = f"{report['estimator']} {report['aggregation']}", f"grad_dot {report['aggregation']}"
    if own == plain or plain not in names:
        return None
    found = matrix[names.index(own)][names.index(plain)]
    if found is None:
        return None
    return Conclusion(
        f"On these samples {report['estimator']} ranks the layers differently from plain gradient products.",
        "supported" if found < ALIKE else "not supported",
        f"Spearman {found:.2f} with grad_dot (below {ALIKE}: differently)",
    )


def _prediction(report: Mapping[str, Any]) -> Conclusion:
    own, found = report["estimator"], report["leave_out"]
    agree = found["seed_agreement"]
    between = f"; the actual changes of two seeds agree by {agree:.2f}" if agree is not None else ""
    return Conclusion(
        f"Averaged over these seeds, {own} predicts the loss change of single validation rows better than chance.",
        above(0, found["lds"][own]),
        f"LDS {with_interval(found['lds'][own])} over {found['num_subsets']} left-out sets of {found['left_out']} of "
        f"{found['num_train']} rows, {how_many(found['num_seeds'], 'seed')}{between}",
    )


def _average(report: Mapping[str, Any]) -> Conclusion:
    own, found = report["estimator"], report["leave_out"]
    return Conclusion(
        f"Averaged over these seeds, {own} predicts the change of the mean validation loss better than chance.",
        above(0, found["lds_of_mean"][own]),
        f"Spearman over the left-out sets {with_interval(found['lds_of_mean'][own])}",
    )


def _noise(report: Mapping[str, Any]) -> Conclusion | None:
    found = report["leave_out"]
    if found["sd_over_seeds"] is None:
        return None
    return Conclusion(
        "Among these seeds, the choice of rows left out moves a validation loss more than the seed does.",
        "supported" if found["sd_over_sets"] > found["sd_over_seeds"] else "not supported",
        f"standard deviation over sets {found['sd_over_sets']:.3f}, over {how_many(found['num_seeds'], 'seed')} "
        f"{found['sd_over_seeds']:.3f} nats; without an interval over seeds",
    )


def _better(report: Mapping[str, Any]) -> Conclusion | None:
    own, found = report["estimator"], report["leave_out"]
    if own == "grad_dot" or "grad_dot" not in found["lds"]:
        return None
    return Conclusion(
        f"Averaged over these seeds, {own} predicts loss changes better than plain gradient products.",
        above(0, found["beyond_grad_dot"][own]),
        f"its LDS exceeds that of grad_dot by {with_interval(found['beyond_grad_dot'][own])}",
    )


def _beyond_words(report: Mapping[str, Any]) -> Conclusion:
    own, found = report["estimator"], report["leave_out"]
    return Conclusion(
        f"Averaged over these seeds, {own} predicts loss changes better than BM25, which compares words.",
        above(0, found["beyond_bm25"][own]),
        f"its LDS exceeds that of bm25 by {with_interval(found['beyond_bm25'][own])}",
    )


def _removed(report: Mapping[str, Any]) -> Conclusion:
    own, found = report["estimator"], report["leave_out"]["removed"]
    mine = found["by"][own]
    return Conclusion(
        f"Averaged over these seeds, training without the rows that {own} calls most helpful costs more than without "
        "random rows.",
        above(0, mine["beyond_random"]),
        f"without those {found['size']} rows the mean validation loss is {mine['change']:+.3f} nats away from that of "
        f"all rows, {with_interval(mine['beyond_random'], 3)} above the mean of the random sets",
    )


def _mislabel(report: Mapping[str, Any]) -> Conclusion:
    own, found = report["estimator"], report["mislabel"]
    mine = found["estimators"][own]
    return Conclusion(
        f"{own} tells wrong answers from right ones better than chance.",
        above(0.5, mine["auc"]),
        f"AUC {with_interval(mine['auc'])} over {found['num_trials']} trials with {found['num_flipped']} of "
        f"{found['num_train']} answers flipped; {mine['found']:.0%} of them are among the {found['num_flipped']} most "
        f"harmful rows (a random order: {found['random']['found']:.0%})",
    )


def _mislabel_better(report: Mapping[str, Any]) -> Conclusion | None:
    own, found = report["estimator"], report["mislabel"]["estimators"]
    if own == "grad_dot" or "grad_dot" not in found:
        return None
    return Conclusion(
        f"{own} finds wrong answers better than plain gradient products.",
        above(0, found[own]["beyond_grad_dot"]),
        f"its AUC exceeds that of grad_dot by {with_interval(found[own]['beyond_grad_dot'])}",
    )
