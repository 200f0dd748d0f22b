"""The check that an allocation is spent where it belongs.

Curves are of one model, one pruner and one calibration text. Spent elsewhere they can do great harm: magnitude pruning
by the curves of Wanda's masks cost a factor of six in perplexity in a trial.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_ADVICE = {
    "model": "measure them again for this one",
    "pruner": "use estimator.masks=null, or the pruner that the curves are of",
    "calibration": "use the same calibration windows for curves and pruning, or measure the curves again",
}


def check_source(source: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuses an allocation of curves that are of another model, pruner or calibration text than those it is spent on.

    SparseGPT may spend the curves of Wanda's masks, and a pruner with swaps those of its masks before them. Another
    loss text is allowed, and the record names it.

    Args:
        source: of the allocation; empty where it fits anywhere.
        here: the model, the pruner and the calibration text where it is spent, as `LossCurves.source` gives them; what
            plays no part is left out.

    Raises:
        ValueError: names the part that differs.
    """
    for part, advice in _ADVICE.items():
        was, now = source.get(part, ""), here.get(part, "none")
        if was in ("", now) or now == "none" or was == "none":
            continue
        if part == "model" and was.split()[0] != now.split()[0]:
            continue  # one is in memory and one in a folder: their hashes cannot be compared
        if part == "pruner" and _without_swaps(now) == was:
            continue
        if part == "pruner" and _kind(was) == "wanda" and _kind(now) == "sparsegpt" and _group(was) == _group(now):
            continue
        shown = f", {was}, than this one, {now}" if part == "pruner" else ""
        text = " text" if part == "calibration" else ""
        raise ValueError(f"the allocation was made by curves of another {part}{text}{shown}; {advice}")


def _kind(pruner: str) -> str:
    return pruner.partition("(")[0]


def _group(pruner: str) -> str:
    inside = pruner.partition("(")[2].rstrip(")").split(", ")
    return next((each for each in inside if each.startswith("m=")), "")


def _without_swaps(pruner: str) -> str:
    return re.sub(r",? ?swaps=True, most_swaps=\d+", "", pruner).replace("(, ", "(")
