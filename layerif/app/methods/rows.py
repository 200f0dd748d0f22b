"""`method=rows`: tell which train rows help and which harm the validation rows, or the rows of a query."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from layerif.app.methods import SpendsNothing
from layerif.app.methods._steps import join_processes, loader, record_evidence
from layerif.app.setup import Setup
from layerif.attribution.page import summary_of
from layerif.attribution.query import check_unseen_query, of_query, query_influence, read_query
from layerif.attribution.rows import OverLayers, RowInfluence, position_of, row_influence
from layerif.checks import Count, Positive, Share, check_fields
from layerif.data.batches import check_vocabulary
from layerif.data.rows import AnyExample
from layerif.decide import Decider
from layerif.diagnose.mislabel import auc_draws, detection, flip, harm
from layerif.estimators._base import GramEstimator, InfluenceEstimator, check_whole_influence, name_of
from layerif.probe.gradients import check_index
from layerif.probe.grams.request import Grams
from layerif.record.record import RunRecord
from layerif.stats import percentile

_ON_GRAMS = "use estimator=datainf, exact, lissa, grad_dot or cosine"


@dataclass(frozen=True, kw_only=True)
class Rows(SpendsNothing):
    """Measures the influence of every train row on every validation row, and writes tables and a page.

    No evaluated row is looked at: influence is of the task's train rows, on its validation rows or on a query.

    Attributes:
        over_layers: the order of the rows, see `layerif.attribution.rows.over_layers`.
        top: the rows in each list of the page.
        flipped: the share of the train rows that get a wrong answer, which influence should find; None changes none.
        pair: the ids of a train and of a validation row, whose influence is split over the tokens of the train row.
        query: a file with rows, in place of the validation rows. Its gradients alone are measured; those of the train
            rows come from an index.
        index: the file of the index; None finds it in the store or makes it.
        index_gb: the gigabytes of an index that is made. They set its projection, where `probe.projection` is None.
    """

    name: ClassVar[str] = "rows"
    takes_parts: ClassVar[bool] = True

    over_layers: OverLayers = "sum"
    top: Count = 10
    flipped: Share | None = None
    pair: list[str | int] | None = None
    query: str | None = None
    index: str | None = None
    index_gb: Positive = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "method")

    def check(self, setup: Setup) -> None:
        estimator = setup.decider.estimator
        if not isinstance(estimator, InfluenceEstimator):
            raise ValueError(
                f"method=rows needs the influence of single rows, and estimator={name_of(estimator)} gives none; "
                "use estimator=datainf, exact, lissa, grad_dot, cosine, tracin, kfac, ekfac or shampoo"
            )
        check_whole_influence(estimator)
        if setup.evaluation.before:
            raise ValueError("method=rows never looks at evaluated rows; use evaluation.before=false, or method=none")
        on_grams = isinstance(estimator, GramEstimator) and estimator.needs == Grams()
        if self.query is None and self.index is not None:
            raise ValueError("method.index serves a query; set method.query=/file, or leave the index out")
        for setting in ("flipped", "pair"):
            if self.query is not None and getattr(self, setting) is not None:
                raise ValueError(
                    f"method.query is answered from an index, without method.{setting}, which needs validation rows; "
                    "leave one of them out"
                )
        if self.pair is not None:
            self._check_pair(setup.decider, on_grams)
        if self.flipped is not None:
            self._flipped(setup.decider)
        if self.query is not None:
            if not on_grams:
                raise ValueError(
                    f"method.query needs an estimator on the Grams of one model, got {name_of(estimator)}; {_ON_GRAMS}"
                )
            queried = of_query(setup.decider, self._query(setup))
            queried.samples()  # refuses rows that cannot be read
            if self.index is not None:
                check_index(Path(self.index), queried)

    def preview(self, setup: Setup) -> dict[str, str]:
        if self.query is not None:
            where = self.index or f"the store, of at most {self.index_gb:g} GB"
            return {"query": f"{len(self._query(setup))} rows of {self.query}; the index: {where}"}
        lines = {"pairs": " × ".join(f"{len(part)}" for part in setup.decider.samples()) + " train and validation rows"}
        if self.flipped is not None:
            lines["wrong answers"] = f"{len(self._flipped(setup.decider)[1])} train rows"
        return lines

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        join_processes(setup)
        load = loader(setup)
        found = self._of_query(setup, load, record) if self.query else self._of_validation(setup, load, record)
        start = time.perf_counter()
        shares = None if self.pair is None else found.token_shares(*map(str, self.pair))
        if rank_zero_only.rank > 0:
            return
        lines = self._found_flipped(found, setup, record)
        found.save(folder, lines=lines, shares=shares, top=self.top)
        record.seconds["page"] = time.perf_counter() - start
        record.notes.extend(found.notes)
        record.metrics["harmful"] = float((found.total.mean(dim=0) > 0).double().mean())
        if found.fidelity is not None:
            record.metrics["fidelity"] = found.fidelity["rows"]
        for line in [*summary_of(found), *lines, *(f"note: {note}" for note in record.notes)]:
            print(line)
        print(folder / "rows.html")

    def _of_validation(self, setup: Setup, load: Callable[[], nn.Module], record: RunRecord) -> RowInfluence:
        decider, wrong = setup.decider, frozenset()
        if self.flipped is not None:
            decider, wrong = self._flipped(decider)
        assert isinstance(decider.estimator, InfluenceEstimator)  # `check` refuses others
        scored, evidence = decider.scored(load, decider.estimator.needs_of_rows)
        record_evidence(scored, record)
        notes = ()
        if scored.fidelity and "influences" in scored.fidelity:
            notes = (
                "gradients are approximate: the influences of "
                f"{scored.fidelity['train']:g} + {scored.fidelity['validation']:g} rows agree with exact ones by "
                f"Spearman {scored.fidelity['influences']:.3f}, as a mean over the matrices",
            )
        template = decider.probe.template or "plain"  # that of the text whose gradients were measured
        found = row_influence(decider, evidence, load, over_layers=self.over_layers, template=template, notes=notes)
        return replace(found, flipped=wrong)

    def _of_query(self, setup: Setup, load: Callable[[], nn.Module], record: RunRecord) -> RowInfluence:
        start = time.perf_counter()
        found = query_influence(
            of_query(setup.decider, self._query(setup)),
            setup.decider.estimator,  # type: ignore[arg-type]
            load,
            index=None if self.index is None else Path(self.index),
            index_gb=self.index_gb,
            over_layers=self.over_layers,
            template=setup.decider.probe.template or "plain",
        )
        record.fingerprint, record.seconds["evidence"] = found.fingerprint, time.perf_counter() - start
        return found

    def _query(self, setup: Setup) -> tuple[AnyExample, ...]:
        assert self.query is not None
        query = read_query(Path(self.query), setup.task.reader())
        check_unseen_query(query, setup.splits.test, setup.task.template, setup.tokenizer)
        check_vocabulary(query, setup.model.num_embeddings())
        return query

    def _flipped(self, decider: Decider) -> tuple[Decider, frozenset[str]]:
        """Makes a share of the chosen train rows wrong, and gives the ids of these."""
        assert self.flipped is not None
        examples, is_flipped_N = flip(decider.chosen("train"), self.flipped, seed=decider.seed)
        wrong = frozenset(each.id for each, is_flipped in zip(examples, is_flipped_N, strict=True) if is_flipped)
        return replace(decider, splits=replace(decider.splits, train=tuple(examples))), wrong

    def _found_flipped(self, found: RowInfluence, setup: Setup, record: RunRecord) -> list[str]:
        """Measures how well harm tells the wrong rows from the others, and says it in a line."""
        if not found.flipped:
            return []
        is_flipped_N = np.array([row.id in found.flipped for row in found.train])
        order_MN = found.order.numpy()
        detected = detection(harm(order_MN), is_flipped_N)
        auc = percentile(detected.auc, auc_draws([order_MN], [is_flipped_N], seed=setup.decider.seed))
        figures = {"": auc.value, "_low": auc.low, "_high": auc.high}
        record.metrics |= {f"mislabel_auc{end}": value for end, value in figures.items() if np.isfinite(value)}
        record.metrics["mislabel_found"] = detected.found
        interval = f"95 % interval {auc.low:.2f} to {auc.high:.2f}" if np.isfinite(auc.low) else "without an interval"
        return [
            f"The answers of {len(found.flipped)} of {len(found.train)} train rows were made wrong. Harm tells them "
            f"from the others with an AUC of {detected.auc:.2f} ({interval}, over train and validation rows; 0.5 is "
            f"chance), and {detected.found:.0%} of them are among the {len(found.flipped)} most harmful rows."
        ]

    def _check_pair(self, decider: Decider, on_grams: bool) -> None:
        pair = self.pair or []
        if len(pair) != 2:
            raise ValueError(f"method.pair={pair} must name a train row and a validation row: [ID,ID]")
        for part, id in zip(("train", "validation"), pair, strict=True):
            position_of(str(id), [example.id for example in decider.chosen(part)], part)
        if not on_grams:
            raise ValueError(
                f"method.pair needs an estimator on the Grams of one model, got {name_of(decider.estimator)}; "
                f"{_ON_GRAMS}"
            )
