"""A report in words: the page `diagnose.md`, the lines on the console, and the headline figures of the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from layerif.diagnose.conclusions import with_interval
from layerif.record.text import inert


def report_markdown(report: Mapping[str, Any]) -> str:
    """Writes the whole report, conclusions first.

    Args:
        report: the content of `diagnose.json`.
    """
    sections = [_conclusions, _instrument, _gradients, _solver, _stability, _agreement, _leave_out, _mislabel]
    return inert("\n\n".join(["# Can these scores be trusted?", *(section(report) for section in sections)]) + "\n")


def report_summary(report: Mapping[str, Any]) -> str:
    """Writes the conclusions in a few lines for the console."""
    found = report["conclusions"]
    width = max(len(each["verdict"]) for each in found)
    return "\n".join(
        f"  {each['verdict']:<{width}}  {each['claim']}\n  {'':<{width}}    {each['because']}" for each in found
    )


def headline_metrics(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of the user's own estimator, by metric, without those that are undetermined."""
    own, left_out = report["estimator"], report["leave_out"]
    mine = report["mislabel"]["estimators"][own]
    found: dict[str, Any] = {
        "convex_lds": report["instrument"]["lds"]["exact"],
        "common_gradient": report["gradients"]["common"]["value"],
        "dead_matrices": len(report["gradients"]["dead"]),
        "rank_stability": report["stability"]["samples"]["value"],
        "rank_stability_low": report["stability"]["samples"]["low"],
        "rank_stability_high": report["stability"]["samples"]["high"],
        "lds": left_out["lds"][own]["value"],
        "lds_low": left_out["lds"][own]["low"],
        "lds_high": left_out["lds"][own]["high"],
        "seed_agreement": left_out["seed_agreement"],
        "lds_of_mean": left_out["lds_of_mean"][own]["value"],
        "mislabel_auc": mine["auc"]["value"],
        "mislabel_auc_low": mine["auc"]["low"],
        "mislabel_auc_high": mine["auc"]["high"],
        "mislabel_found": mine["found"],
    }
    counts = [each["verdict"] for each in report["conclusions"]]
    found |= {verdict.replace(" ", "_"): counts.count(verdict) for verdict in sorted(set(counts))}
    return {name: value for name, value in found.items() if value is not None}


def _conclusions(report: Mapping[str, Any]) -> str:
    samples = " and ".join(f"{num} {part}" for part, num in report["samples"].items())
    rows = [(each["verdict"], each["claim"], each["because"]) for each in report["conclusions"]]
    return (
        f"{report['source']} over {len(report['layers'])} layers, from {samples} rows. No evaluated row was looked at. "
        "A claim is supported if the whole 95 % interval of its figure lies on the claim's side of the bar, and not "
        "supported if the whole interval lies on the other side. Otherwise there is not enough evidence. A claim whose "
        "figure has no interval is only about what was measured, and compares the figure itself. No interval covers "
        "other seeds.\n\n" + _table(("verdict", "claim", "because"), rows)
    )


def _instrument(report: Mapping[str, Any]) -> str:
    rows = [(name, f"{value:.4f}") for name, value in report["instrument"]["lds"].items()]
    return (
        "## Instrument check\n\nL2-regularised logistic regression is retrained to its optimum with rows left out, in "
        "float64. Theory is exact here, so anything far below 1 would be a defect of this program.\n\n"
        + _table(("influence by", "LDS"), rows)
    )


def _gradients(report: Mapping[str, Any]) -> str:
    found = report["gradients"]
    norms = found["train_norms"]
    low, high = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
    lines = [
        f"Root mean square norms range from {norms[low]:.3g} ({low}) to {norms[high]:.3g} ({high}).",
        f"Dead: {', '.join(found['dead']) or 'none'}. Not finite: none.",  # the run stops at a gradient that is not
    ]
    if found["length"] is not None:
        lines.append(
            f"The mean training gradient has {found['length']:.2f} of a single gradient's length; at an optimum, "
            f"sampling alone would leave about {found['chance']:.2f}. The share of the squared length that "
            f"all samples have in common is {with_interval(found['common'], 3)}; it would be 0 at an optimum, and 1 if "
            "every sample pulled the same way."
        )
    return "## Gradients\n\n" + "\n".join(lines)


def _solver(report: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            f"{each['residual_median']:.1e} / {each['residual_max']:.1e}",
            f"{each['off_median']:.2g} / {each['off_max']:.2g}",
            each["worst"],
            f"{each['condition_max']:.1e}",
            f"{each['rounding_max']:.2g}",
            f"{each['step'][0]:.2g} to {each['step'][1]:.2g}" if each["step"] else "–",
        )
        for name, each in report["solver"]["estimators"].items()
    ]
    head = ("estimator", "residual median / max", "off exact median / max", "worst matrix")
    return (
        "## Solvers\n\nThe residual is ‖I·(K/N + λ) + C‖/‖C‖ of each matrix. Off exact is ‖I − I_exact‖/‖I_exact‖ at "
        "the same damping. Rounding is the most negative eigenvalue of a Gram, which is float32 noise, over the "
        "damping.\n\n" + _table((*head, "condition", "rounding", "step"), rows)
    )


def _stability(report: Mapping[str, Any]) -> str:
    found = report["stability"]
    rows = [
        (layer, f"{score:.3g}", f"{rank['value']:g}", f"{rank['low']:g} to {rank['high']:g}")
        for layer, score, rank in zip(report["layers"], found["scores"], found["ranks"], strict=True)
    ]
    halves = [value for value in found["halves"] if value is not None]
    lines = ["No two halves could be compared."]
    if halves:
        lines = [
            f"The scores of disjoint random halves of the samples agree by Spearman {with_interval(found['half'])} on "
            f"average ({min(halves):.2f} to {max(halves):.2f} over {len(halves)} splits); the interval is from a "
            f"jackknife over samples. Two samples as large as the whole would agree by "
            f"{with_interval(found['samples'])}, stepped up by Spearman–Brown, 2r/(1 + r)."
        ]
    pairs = [
        (pair["first"], pair["second"], _number(pair["spearman"]), _number(pair["kendall"]))
        for pair in (*found["damping"], *found["seeds"])
    ]
    return "\n\n".join(
        [
            "## Ranks of the layers",
            "\n".join(lines),
            _table(("scores at", "and at", "Spearman", "Kendall"), pairs)
            if pairs
            else "There is nothing else to compare.",
            "The seeds are those of the trained adapters, which are scored on their LoRA matrices. Rank 1 is the "
            "highest score. The last column holds 95 % of the ranks under bootstrap draws of the samples, for each "
            "layer by itself:",
            _table(("layer", "score", "rank", "95 % of draws"), rows),
        ]
    )


def _agreement(report: Mapping[str, Any]) -> str:
    names, matrix = report["agreement"]["names"], report["agreement"]["spearman"]
    chosen = [index for index, name in enumerate(names) if name.endswith(f" {report['aggregation']}")]
    rows = [(names[i], *(_number(matrix[i][j]) for j in chosen)) for i in chosen]
    return (
        "## Agreement of estimators\n\nThe table shows Spearman of the layer scores under aggregation "
        f"`{report['aggregation']}`; the other aggregations are in agreement.png and diagnose.json.\n\n"
        + _table(("", *(names[j] for j in chosen)), rows)
    )


def _leave_out(report: Mapping[str, Any]) -> str:
    found = report["leave_out"]
    rows = [
        (
            name,
            with_interval(lds),
            ", ".join(_number(value) for value in found["lds_by_seed"][name]),
            with_interval(found["lds_of_mean"][name]),
            with_interval(found["beyond_grad_dot"][name]) if name != "grad_dot" else "–",
            with_interval(found["beyond_bm25"][name]) if name != "bm25" else "–",
        )
        for name, lds in sorted(found["lds"].items(), key=lambda item: -(item[1]["value"] or -1.0))
    ]
    trained = ", ".join(f"{loss:.3f}" for loss in found["loss"]["trained"])
    common = ", ".join(_number(each["value"]) for each in found["common"])
    over_seeds = f" and {found['sd_over_seeds']:.3f} over seeds" if found["sd_over_seeds"] is not None else ""
    limit = ""
    if found["seed_agreement"] is not None:
        limit = (
            f" The actual changes of two seeds agree by {found['seed_agreement']:.2f}; the predictions are compared "
            "with the mean over seeds, which is more reliable than that."
        )
    return (
        "## Predicted and actual loss change\n\n"
        f"Plain LoRA was trained on {found['num_train']} training rows, and again without each of "
        f"{found['num_subsets']} random sets of {found['left_out']} rows, with {found['num_seeds']} seeds. A seed has "
        "one start and one order of the rows, and there is no dropout. The loss of "
        f"{found['num_validation']} validation rows was watched: {found['loss']['untrained']:.3f} untrained, {trained} "
        "trained (one figure a seed). The LDS is Spearman of predicted and actual change over the sets, averaged over "
        "the validation rows and taken on the means over seeds; its interval covers other sets and rows, not other "
        "seeds. The column of the mean shows the same for the mean loss of all rows. Only the order counts, because "
        "the damping sets the scale of an influence.\n\n"
        + _table(("estimator", "LDS", "seed by seed", "of the mean", "above grad_dot", "above bm25"), rows)
        + "\n\n`bm25` (the words of the rows) and `hidden_cosine` (hidden states of the untrained model before its "
        "head, averaged over tokens) use no gradient: a row that resembles a validation row counts as helpful. EK-FAC "
        f"and Shampoo take the labels of the rows, and the damping {found['damping']['ekfac']:g}.\n\n"
        f"The standard deviation of a row's loss is {found['sd_over_sets']:.3f} over sets{over_seeds}, in nats.{limit} "
        f"The common share of the gradients at the adapters is {common}.\n\n{_removed(found)}"
    )


def _removed(found: Mapping[str, Any]) -> str:
    removed = found["removed"]
    rows = [
        (
            name,
            f"{each['change']:+.3f}",
            with_interval(each["beyond_random"], 3),
            f"{each['above']} of {found['num_subsets']}",
        )
        for name, each in sorted(removed["by"].items(), key=lambda item: -item[1]["change"])
    ]
    rows.append(("random sets, their mean", f"{removed['random']:+.3f}", "–", "–"))
    return (
        f"Training once more at every seed without the {removed['size']} rows that each calls the most helpful to all "
        "validation rows together changes their mean loss by (nats; the interval is a bootstrap over validation rows "
        "and random sets):\n\n"
        + _table(("without the top rows of", "change", "above random sets", "larger than"), rows)
    )


def _mislabel(report: Mapping[str, Any]) -> str:
    found = report["mislabel"]
    rows = [
        (
            name,
            f"{each['found']:.0%}",
            with_interval(each["auc"]),
            with_interval(each["beyond_grad_dot"]) if name != "grad_dot" else "–",
        )
        for name, each in sorted(found["estimators"].items(), key=lambda item: -item[1]["auc"]["value"])
    ]
    rows.append(("a random order", f"{found['random']['found']:.0%}", f"{found['random']['auc']:.2f}", "–"))
    by_layer = found["auc_by_layer"]
    best = sorted(by_layer, key=by_layer.__getitem__, reverse=True)[:3]
    named = ", ".join(f"{layer} ({by_layer[layer]:.2f})" for layer in best)
    return (
        f"## Wrong answers\n\n{found['num_flipped']} of {found['num_train']} training answers were made "
        f"wrong, {found['num_trials']} times; `found` is their share among the {found['num_flipped']} most harmful "
        "rows. Intervals are bootstraps over training and validation rows, and all trials share the draws.\n\n"
        + _table(("estimator", "found", "AUC", "above grad_dot"), rows)
        + f"\n\nThese single layers tell most (AUC of {report['estimator']}; the best of {len(by_layer)} layers looks "
        f"better than it is, because it was picked): {named}."
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
