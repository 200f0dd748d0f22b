"""Token filters: which of the tokens that training counts it learns from (Wu et al., 2501.14315).

Tokens that the model as it is finds unlikely are left out: their label becomes -100, and they are still read. The
perplexity of a token is exp(−ln p) of it given those before it, from one forward pass before training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Literal

from torch import Tensor

from layerif.data.batches import Encoded, Encodings
from layerif.data.rows import IGNORED

TokenFilter = Literal["none", "low_perplexity", "random", "lowest"]


def kept_tokens(losses: Sequence[float], rule: TokenFilter, *, tau: float, random: Random) -> list[bool]:
    """Tells which tokens of a row stay.

    `low_perplexity` leaves out those above `tau`. The controls leave out as many of the same row: `random` draws them,
    and `lowest` takes those of the lowest perplexity, equal ones from the front.

    Args:
        losses: of the tokens that training counts, in nats.
        rule: the filter.
        tau: the highest perplexity that `low_perplexity` keeps.
        random: draws the tokens of `random`.
    """
    is_high = [math.exp(min(loss, 700.0)) > tau for loss in losses]
    if rule == "none":
        return [True] * len(losses)
    if rule == "low_perplexity":
        return [not high for high in is_high]
    order = sorted(range(len(losses)), key=lambda token: (losses[token], token))
    left_out = order[: sum(is_high)] if rule == "lowest" else random.sample(order, sum(is_high))
    return [token not in left_out for token in range(len(losses))]


def filtered(
    samples: Sequence[Encoded], losses: Sequence[Tensor], rule: TokenFilter, *, tau: float, seed: int
) -> Encodings:
    """Leaves tokens out of the loss of every sample. A sample of which none is left is left out itself.

    Args:
        samples: as training reads them.
        losses: of every token of a sample but the first, in nats.
        rule: see `kept_tokens`.
        tau: see `kept_tokens`.
        seed: of the draw; a sample's tokens do not depend on the other samples.

    Raises:
        ValueError: no sample is left.
    """
    found = []
    for sample, of_sample in zip(samples, losses, strict=True):
        first = max(1, sample.prompt_length)  # a prompt is never learned under a filter, as published
        places = [place for place, label in enumerate(sample.labels) if place >= first and label != IGNORED]
        values = of_sample.tolist()
        random = Random(f"{seed} {sample.input_ids}")
        stays = kept_tokens([values[place - 1] for place in places], rule, tau=tau, random=random)
        kept = {place for place, is_in in zip(places, stays, strict=True) if is_in}
        if kept:
            found.append(replace(sample, counted=tuple(place in kept for place in range(len(sample)))))
    if not found:
        raise ValueError(
            f"data.token_filter={rule} leaves no token of {len(samples)} rows to learn: the perplexity of each is "
            f"above data.tau={tau:g}; raise data.tau, or use data.token_filter=none"
        )
    return Encodings(found)


def num_counted(samples: Sequence[Encoded]) -> int:
    """Counts the tokens that the loss counts."""
    return sum(label != IGNORED for sample in samples for label in sample.labels[1:])
