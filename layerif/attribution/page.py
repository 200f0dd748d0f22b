"""The influence of rows as one page to read: HTML and CSS without scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from layerif.attribution.rows import VOTES, RowInfluence
from layerif.attribution.tokens import TokenShares
from layerif.checks import how_many

_TEMPLATE = "rows.html.jinja"  # lies beside this file; it escapes texts, which are other people's
_ONE_SIDED = 0.02  # share of rows of the other sign below which influence is called one-sided
_AT_MOST = 100  # validation rows that are shown one by one
_EACH = 3  # rows that are shown of each kind for a validation row
_ORDERS = {
    "sum": "the sum of the influence over the layers",
    "mean_rank": "the mean of their ranks over the layers",
    "vote": f"the number of layers where they are among the most helpful {VOTES:.0%}",
}


@dataclass(frozen=True)
class _Cell:
    """A coloured cell: `strength` is from -1 (most helpful) to 1 (most harmful)."""

    text: str
    strength: float

    @property
    def style(self) -> str:
        kind = "harmful" if self.strength > 0 else "helpful"
        return f"background: color-mix(in srgb, var(--{kind}) {abs(self.strength) * 70:.0f}%, transparent)"


def rows_page(
    found: RowInfluence, *, lines: Sequence[str] = (), shares: TokenShares | None = None, top: int = 10
) -> str:
    """Renders the page.

    Args:
        found: the influence of rows.
        lines: findings that stand first.
        shares: of the tokens of a chosen pair; None: no pair was chosen.
        top: the number of rows in each of the two lists over all validation rows.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lists = {"Most helpful": found.most_helpful(top), "Most harmful": found.most_harmful(top)}
    return environment.get_template(_TEMPLATE).render(
        found=found,
        summary=[*summary_of(found), *lines, *found.notes],
        lists=lists,
        strips={row["row"]: _strip(row, list(found.influences)) for rows in lists.values() for row in rows},
        validation=[
            (row, found.most_helpful(_EACH, row.id), found.most_harmful(_EACH, row.id))
            for row in found.validation[:_AT_MOST]
        ],
        shares=shares,
        tokens=_coloured(shares),
        figure=_figure,
    )


def summary_of(found: RowInfluence) -> list[str]:
    """Writes the lines that the page begins with."""
    mean_N = found.total.mean(dim=0)
    num_harmful = int((mean_N > 0).sum())
    lines = [
        f"{found.source}, over {len(found.influences)} layers: {how_many(len(found.train), 'train row')} on "
        f"{how_many(len(found.validation), 'other row')}.",
        "An influence below zero is helpful: more weight on the train row lowers the loss of the other row. "
        f"{num_harmful} of {len(found.train)} train rows are harmful on average. Rows are ordered by "
        f"{_ORDERS[found.over_layers]}.",
    ]
    if min(num_harmful, len(mean_N) - num_harmful) < _ONE_SIDED * len(mean_N):
        lines.append(
            "Nearly all influence has one sign, as it has where rows share a prompt or the form of an answer, which "
            "every row teaches: only the order tells the rows apart. loss_on=output leaves the prompt out."
        )
    if found.fidelity is not None:
        lines.append(
            f"Gradients are approximate. On {found.fidelity['train']:g} train rows and "
            f"{found.fidelity['validation']:g} rows they were compared with exact ones: the influences rank the train "
            f"rows alike by Spearman {found.fidelity['rows']:.3f}."
        )
    return lines


def _strip(row: Mapping[str, Any], layers: Sequence[str]) -> list[_Cell]:
    """Gives a cell for each layer, coloured by its part of the row's influence."""
    largest = max((abs(row[layer]) for layer in layers), default=0.0) or 1.0
    return [_Cell(f"{layer}: {_figure(row[layer])}", row[layer] / largest) for layer in layers]


def _coloured(shares: TokenShares | None) -> list[_Cell]:
    if shares is None:
        return []
    largest = max(map(abs, shares.shares), default=0.0) or 1.0
    return [_Cell(token, share / largest) for token, share in zip(shares.tokens, shares.shares, strict=True)]


def _figure(value: float | Tensor) -> str:
    return f"{float(value):.3g}"
