"""The influence of every train row on every validation row, layer by layer, with its tables.

Letters in shape suffixes: L layers, N train rows, M validation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from layerif.attribution.tokens import TokenShares, token_shares
from layerif.checks import check_choice, did_you_mean, require
from layerif.data.batches import shown_text
from layerif.data.render import Template
from layerif.data.rows import AnyExample
from layerif.decide import Scorer
from layerif.estimators._base import GramEstimator
from layerif.evidence import LayerGrams
from layerif.files import whole
from layerif.probe.measurements import Load

if TYPE_CHECKING:
    import pandas as pd

OverLayers = Literal["sum", "mean_rank", "vote"]
VOTES = 0.3  # the share of a layer's rows that get a vote


@dataclass(frozen=True)
class ShownRow:
    """A row as people see it: its id, and the text that the model reads."""

    id: str
    text: str


def shown_rows(examples: Sequence[AnyExample], template: Template, tokenizer: Any) -> tuple[ShownRow, ...]:
    """Gives the id and the text of every row; without a tokenizer token ids stay numbers."""
    if tokenizer is None:
        return tuple(ShownRow(each.id, each.question) for each in examples)
    return tuple(ShownRow(each.id, shown_text(each, template, tokenizer)) for each in examples)


def over_layers(influences: Mapping[str, Tensor], how: OverLayers) -> Tensor:
    """Makes one number of the influences of all layers, for each pair of rows; the lowest is the most helpful.

    Args:
        influences: I (M×N) by layer; negative is helpful.
        how: `sum` adds them up. `mean_rank` averages the rank that the train row has in each layer, 1 for the most
            helpful one. `vote` counts, with a minus, the layers where it is among the most helpful 30 % of the rows.

    Returns:
        (M×N) in float64.
    """
    check_choice("over_layers", how, get_args(OverLayers))
    influence_LMN = [influence_MN.double() for influence_MN in influences.values()]
    found_MN = torch.zeros_like(influence_LMN[0])
    for influence_MN in influence_LMN:
        found_MN += _in_one_layer(influence_MN, how)
    return found_MN / len(influence_LMN) if how == "mean_rank" else found_MN


def _in_one_layer(influence_MN: Tensor, how: OverLayers) -> Tensor:
    if how == "sum":
        return influence_MN
    from scipy.stats import rankdata

    if how == "mean_rank":
        return torch.from_numpy(rankdata(influence_MN.numpy(), axis=1))
    num_votes = max(1, round(VOTES * influence_MN.shape[1]))
    chosen = influence_MN.argsort(dim=1, stable=True)[:, :num_votes]
    return torch.zeros_like(influence_MN).scatter_(1, chosen, -1.0)


@dataclass(frozen=True, kw_only=True)
class RowInfluence:
    """The influence of train rows on validation rows; negative is helpful: the row lowers the validation loss.

    Attributes:
        influences: I (M×N) by layer, in float64.
        train: the N train rows.
        validation: the M validation rows, or those of a query.
        source: the estimator with its settings.
        over_layers: orders the rows by the influences of all layers, see `over_layers`.
        flipped: the ids of train rows whose answers were made wrong.
        fidelity: where gradients were projected or in half precision, the rank correlation with exact influences
            (`rows`) on some `train` and `validation` rows; None where they are exact, or nothing was compared.
        notes: remarks on the rows and the measurement.
        fingerprint: of what was measured.
        tokens: splits the influence of a train row on a validation row, given by their positions.
    """

    influences: Mapping[str, Tensor]
    train: tuple[ShownRow, ...]
    validation: tuple[ShownRow, ...]
    source: str
    over_layers: OverLayers = "sum"
    flipped: frozenset[str] = frozenset()
    fidelity: Mapping[str, float] | None = None
    notes: tuple[str, ...] = ()
    fingerprint: str = ""
    tokens: Callable[[int, int], TokenShares] | None = field(default=None, repr=False)

    @cached_property
    def total(self) -> Tensor:
        """I (M×N), summed over all layers."""
        return over_layers(self.influences, "sum")

    @cached_property
    def order(self) -> Tensor:
        """The number that orders the rows (M×N), lowest for the most helpful."""
        return self._by[self.over_layers]

    @cached_property
    def _by(self) -> dict[str, Tensor]:
        return {how: self.total if how == "sum" else over_layers(self.influences, how) for how in get_args(OverLayers)}

    def table(self, validation: str | None = None) -> list[dict[str, Any]]:
        """Gives a dictionary for each train row, in their order.

        Args:
            validation: the id of a validation row; None: the mean over all validation rows.

        Returns:
            `row` (its id), `influence` (over all layers), `mean_rank` and `votes` (see `over_layers`), `flipped` where
            answers were made wrong, the influence in each layer by the layer's name, and `text`.
        """
        return self._rows(range(len(self.train)), validation)

    def frame(self, validation: str | None = None) -> pd.DataFrame:
        """Gives `table` as a pandas frame.

        Raises:
            ImportError: pandas is not installed.
        """
        return require("pandas").DataFrame(self.table(validation))

    def pairs(self) -> pd.DataFrame:
        """Gives a pandas frame with a row for each pair: `validation`, `train`, `influence`, and a column per layer.

        Raises:
            ImportError: pandas is not installed.
        """
        ids = [[row.id for row in rows] for rows in (self.validation, self.train)]
        columns = {"influence": self.total, **self.influences}
        return require("pandas").DataFrame(
            {
                "validation": np.repeat(ids[0], len(ids[1])),
                "train": np.tile(ids[1], len(ids[0])),
                **{name: influence_MN.flatten().numpy() for name, influence_MN in columns.items()},
            }
        )

    def most_helpful(self, k: int = 10, validation: str | None = None) -> list[dict[str, Any]]:
        """Gives the `table` of the k train rows that lower the loss most, the most helpful one first.

        Args:
            k: a number of rows; fewer where there are fewer.
            validation: as for `table`.
        """
        return self._rows(self._ordered(validation)[:k], validation)

    def most_harmful(self, k: int = 10, validation: str | None = None) -> list[dict[str, Any]]:
        """Gives the `table` of the k train rows that raise the loss most, or lower it least, the worst one first.

        Args:
            k: a number of rows; fewer where there are fewer.
            validation: as for `table`.
        """
        return self._rows(self._ordered(validation)[::-1][:k], validation)

    def token_shares(self, train: str, validation: str) -> TokenShares:
        """Splits the influence of a train row on a validation row over the tokens of the train row.

        It takes a gradient pass.

        Args:
            train: the id of the train row.
            validation: the id of the validation row.

        Raises:
            ValueError: there is no such row, or the influence was not measured on Grams of one model.
        """
        if self.tokens is None:
            raise ValueError(
                "the influence of a row splits over its tokens only on the Grams of one model; use estimator=datainf, "
                "exact, lissa, grad_dot or cosine, and validation rows in place of a query"
            )
        return self.tokens(self._position(train, "train"), self._position(validation))

    def save(
        self, path: str | Path, *, lines: Sequence[str] = (), shares: TokenShares | None = None, top: int = 10
    ) -> None:
        """Writes `rows` (the mean over validation rows) and `pairs`, each as CSV and Parquet, and `rows.html`.

        Args:
            path: of the folder, which is made if it is not there.
            lines: findings for the page.
            shares: of the tokens of a pair, for the page.
            top: the rows in each list of the page.

        Raises:
            ImportError: pandas is not installed.
        """
        from layerif.attribution.page import rows_page

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for name, frame in {"rows": self.frame(), "pairs": self.pairs()}.items():
            with whole(folder / f"{name}.parquet") as unfinished:
                frame.to_parquet(unfinished, index=False)
            with whole(folder / f"{name}.csv") as unfinished:
                frame.to_csv(unfinished, index=False)
        with whole(folder / "rows.html") as unfinished:
            unfinished.write_text(rows_page(self, lines=lines, shares=shares, top=top), encoding="utf-8")

    def _rows(self, chosen: Sequence[int], validation: str | None) -> list[dict[str, Any]]:
        """Gives the table of the train rows at these positions."""

        def means(influence_MN: Tensor) -> list[float]:
            return influence_MN[self._chosen(validation)][:, list(chosen)].mean(dim=0).tolist()

        total, rank, vote = (means(self._by[how]) for how in ("sum", "mean_rank", "vote"))
        layers = {name: means(influence_MN) for name, influence_MN in self.influences.items()}
        return [
            {
                "row": self.train[index].id,
                "influence": total[place],
                "mean_rank": rank[place],
                "votes": abs(vote[place]),
                **({"flipped": self.train[index].id in self.flipped} if self.flipped else {}),
                **{name: values[place] for name, values in layers.items()},
                "text": self.train[index].text,
            }
            for place, index in enumerate(chosen)
        ]

    def _chosen(self, validation: str | None) -> slice | list[int]:
        return slice(None) if validation is None else [self._position(validation)]

    def _position(self, id: str, part: Literal["train", "validation"] = "validation") -> int:
        return position_of(id, [row.id for row in getattr(self, part)], part)

    def _ordered(self, validation: str | None) -> list[int]:
        order_N = self.order[self._chosen(validation)].mean(dim=0)
        total_N = self.total[self._chosen(validation)].mean(dim=0)
        return np.lexsort((total_N.numpy(), order_N.numpy())).tolist()  # votes are often equal


def row_influence(
    scorer: Scorer,
    evidence: Any,
    load: Load,
    *,
    over_layers: OverLayers,
    template: Template,
    notes: tuple[str, ...] = (),
) -> RowInfluence:
    """Gives the influence of the rows behind some evidence.

    Args:
        scorer: measured the evidence; its estimator tells influence.
        evidence: what the estimator takes.
        load: gives the model, for the tokens of a pair.
        over_layers: orders the rows.
        template: the text around a prompt, for people to see.
        notes: remarks on the rows and the measurement.
    """
    estimator: Any = scorer.estimator

    def split(train: int, validation: int) -> TokenShares:
        return token_shares(scorer, estimator, evidence, scorer.divided(load), train, validation)

    return RowInfluence(
        influences=estimator.by_layer(evidence),
        train=shown_rows(scorer.chosen("train"), template, scorer.tokenizer),
        validation=shown_rows(scorer.chosen("validation"), template, scorer.tokenizer),
        source=estimator.source,
        over_layers=over_layers,
        notes=notes,
        fingerprint=evidence.fingerprint,
        tokens=split if isinstance(evidence, LayerGrams) and isinstance(estimator, GramEstimator) else None,
    )


def position_of(id: str, ids: Sequence[str], part: str) -> int:
    """Gives the position of a row.

    Args:
        id: of the row.
        ids: of all rows of the part.
        part: train or validation, for the message.

    Raises:
        ValueError: no row has this id.
    """
    if id not in ids:
        raise ValueError(
            f"there is no {part} row {id!r} among the {len(ids)} that are measured{did_you_mean(id, ids)}; use one of "
            f"{', '.join(ids[:3])}, …"
        )
    return ids.index(id)
