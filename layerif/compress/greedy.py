"""The greedy search for units to leave out: the one whose absence raises the measured loss least goes, again and again.

It is the strongest way and the dearest: a forward over all windows for every unit that is left, at every step.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from layerif.compress.drop import without
from layerif.progress import progress
from layerif.pruning.trials import mean_token_loss
from layerif.record.search import read_state, write_state


@dataclass(frozen=True)
class Greedy:
    """The point that a search has reached.

    Attributes:
        dense: the mean token loss of the whole model, in nats.
        dropped: the units in the order in which they went.
        losses: the mean token loss after each of them went.
        tried: the loss of every unit that was tried in the step that is not finished.
        seconds: of all processes that took part.
    """

    dense: float
    dropped: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tried: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def greedy(
    model: nn.Module, units: Sequence[str], number: int, windows: Sequence[Tensor], *, state: Path | None = None
) -> Greedy:
    """Finds units to leave out, one after the other, each by the measured loss without it and those before it.

    Among equal losses the last unit goes. A loss that is not a number counts as infinite.

    Args:
        model: a causal language model, on the device that it works on; it comes back as it was.
        units: the names of blocks, or of the attention and the MLP of blocks.
        number: of the units to leave out.
        windows: token ids (B×T) that the loss is measured on.
        state: a file from which the same call carries on after a kill, to the same result, and a call with a higher
            `number` after the last step; None writes nothing.

    Raises:
        ValueError: there are not so many units to leave out, or no loss of a step is finite.
    """
    if not 0 < number < len(units):
        raise ValueError(f"number={number} is not allowed; allowed: 1 to {len(units) - 1} of {len(units)} units")
    begun = time.perf_counter()
    job = _job(model, units, windows)
    known = None if state is None else read_state(state, job)
    reached = Greedy(mean_token_loss(model, windows)) if known is None else Greedy(**known)
    seconds_before = reached.seconds

    def keep(found: Greedy) -> Greedy:
        found = replace(found, seconds=seconds_before + time.perf_counter() - begun)
        if state is not None:
            write_state(state, job, asdict(found))
        return found

    while len(reached.dropped) < number:
        left = [unit for unit in units if unit not in reached.dropped]
        for unit in progress(left, f"step {len(reached.dropped) + 1} of {number}"):
            if unit in reached.tried:
                continue
            with without(model, [*reached.dropped, unit]):
                loss = mean_token_loss(model, windows)
            tried = {**reached.tried, unit: loss if math.isfinite(loss) else math.inf}
            reached = keep(replace(reached, tried=tried))
        least = min(reached.tried.values())
        if least == math.inf:
            raise ValueError(
                "no unit can go: all losses of this step are infinite or not a number; load the model in a wider dtype "
                "(model.dtype=float32)"
            )
        gone = max((unit for unit in left if reached.tried[unit] == least), key=units.index)
        reached = keep(replace(reached, dropped=[*reached.dropped, gone], losses=[*reached.losses, least], tried={}))
    return replace(reached, dropped=reached.dropped[:number], losses=reached.losses[:number])


def _job(model: nn.Module, units: Sequence[str], windows: Sequence[Tensor]) -> str:
    """Returns a hash of all that a search depends on; two sums of every parameter stand for the model's weights."""
    digest = hashlib.sha256(repr(list(units)).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().double()
        digest.update(f"{name} {values.sum().item()!r} {values.square().sum().item()!r}".encode())
    for ids_BT in windows:
        digest.update(ids_BT.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
