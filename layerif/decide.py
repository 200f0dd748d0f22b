"""The way from samples to an allocation: samples → evidence → scores or curves → allocation. Read this file first.

An estimator says by `needs` which evidence it takes (`layerif/probe/`), and turns it into scores of the layers, or into
curves, which say what the loss pays for each level. An allocator spends one or the other (`layerif/allocate/`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from layerif.allocate import Allocation, Allocator, CurveAllocator, Curves, EitherAllocator, FixedAllocator, Spans
from layerif.allocate.curves import sizes_of
from layerif.estimators import Estimator
from layerif.estimators._base import CurveEstimator, name_of
from layerif.estimators._reliability import fidelity_of, split_half
from layerif.evidence import by_expert, by_matrix
from layerif.files import hash_file
from layerif.layers import LayerMap
from layerif.models.weights import hash_folder
from layerif.probe.measurements import Load, Measurements
from layerif.probe.request import NotCompared, Request
from layerif.record.record import AllocationRecord, DecisionRecord, ScoresRecord
from layerif.scores import LayerScores
from layerif.stats import spearman


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores, with the figures that tell how far to trust them.

    Attributes:
        scores: one for each layer; None where curves are spent, or nothing.
        curves: the price of every level; None where scores are spent, or nothing.
        source: the origin of the scores or curves or, where there are none, of the allocation.
        seconds: for the evidence and the scores, and in a decision for the allocation.
        num_samples: the (train, validation) samples behind the scores.
        rows: the ids of the rows of these samples, by part.
        num_truncated: the samples that were cut at `probe.max_length`.
        reused: True where all evidence was in the store.
        reliability: Spearman's rank correlation of the scores of two disjoint halves of the samples, and in a decision
            by curves that of the allocations by two halves; None where the evidence does not keep the samples apart.
        fidelity: where the Grams are not exact (projection, half precision), the rank correlation of `scores` and
            `influences` with exact ones on some `train` and `validation` samples.
        notes: further remarks for the record.
    """

    scores: LayerScores | None
    source: str
    seconds: dict[str, float]
    num_samples: tuple[int, int] = (0, 0)
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    num_truncated: int = 0
    reused: bool = False
    reliability: float | None = None
    fidelity: dict[str, float] | None = None
    notes: tuple[str, ...] = ()
    curves: Curves | Spans | None = None


@dataclass(frozen=True, kw_only=True)
class Decision(Scored):
    """Scores, and the allocation that they are spent on.

    Attributes:
        allocation: the value of every unit.
    """

    allocation: Allocation

    def record(self) -> DecisionRecord:
        """Turns the decision into the form that `record.json` holds."""
        scores = self.scores
        return DecisionRecord(
            source=self.source,
            allocation=AllocationRecord(**self.allocation.to_dict()),
            scores=scores
            and ScoresRecord(
                layers=list(scores.layers),
                values=list(scores.values),
                higher_means=scores.higher_means,
                intervals=None if scores.intervals is None else list(scores.intervals),
            ),
            curves=None if self.curves is None else _summary(self.curves, self.allocation),
            reliability=self.reliability,
            fidelity=self.fidelity,
            rows={part: list(ids) for part, ids in self.rows.items()},
            samples={} if not any(self.num_samples) else dict(zip(_PARTS, self.num_samples, strict=True)),
        )


_PARTS = ("train", "validation")


def _summary(curves: Curves | Spans, allocation: Allocation) -> dict[str, Any]:
    """Gives the part of curves that a record keeps: the price of each level, and that of the allocation."""
    values = allocation.by_name()
    if isinstance(curves, Spans):
        return curves.summary(values)
    if set(values) <= set(curves.by_block.units):
        curves_of_units = curves.by_block
    else:
        curves_of_units = curves
        if curves.unit == "block":  # swaps of levels move sparsity between matrices, whatever they start from
            values = AllocationRecord(**allocation.to_dict()).by_block()
    prices = dict(zip(curves.units, curves.costs[:, 0].tolist(), strict=True)) if curves.kind == "blocks" else None
    return {
        "kind": curves.kind,
        "sense": curves.sense,
        "unit": curves.unit,
        "levels": list(curves.levels),
        "everywhere": curves.costs.sum(0).tolist(),
        "predicted": curves_of_units.at(values),
        "source": dict(curves.source),
        "fingerprint": curves.fingerprint,
        **({} if prices is None else {"prices": prices}),
        **({"parameters": round(curves_of_units.size_at(values))} if curves.sense == "gain" else {}),
    }


@dataclass(frozen=True, kw_only=True)
class Scorer(Measurements):
    """Measurements with an estimator."""

    estimator: Estimator | CurveEstimator

    @property
    def takes_matrices(self) -> bool:
        """Tells if every matrix is scored by itself, and not every layer."""
        return False

    @property
    def takes_experts(self) -> bool:
        """Tells if every expert is scored by itself, and not every layer."""
        return False

    def check(self) -> None:
        """Refuses what cannot be scored, before any pass over the data."""
        needs = self.estimator.needs
        needs.check_weights(self, name_of(self.estimator))
        needs.check(self)
        if not needs.is_measured and not isinstance(self.estimator, CurveEstimator):
            self.estimator.score(self.layers())

    def scored(self, load: Load | None = None, needs: Request | None = None) -> tuple[Scored, Any]:
        """Takes the evidence and scores every layer.

        Args:
            load: gives the model, and is called only if something is measured. None loads the model here.
            needs: asks for more than the estimator's scores need; None: what they need.

        Returns:
            The scores, and the evidence.
        """
        start = time.perf_counter()
        evidence, reused = (needs or self.estimator.needs).take(self, load or self.model.load)
        if self.takes_matrices:
            evidence = by_matrix(evidence)
        elif self.takes_experts and not isinstance(self.estimator, CurveEstimator):
            evidence = by_expert(evidence)
        measured = time.perf_counter()
        scores = curves = None
        if isinstance(self.estimator, CurveEstimator):
            curves, source = self.estimator.curves(evidence), self.estimator.source
        else:
            scores = self.estimator.score(evidence)
            source = scores.source
        found = Scored(
            scores=scores,
            curves=curves,
            source=source,
            seconds={"evidence": measured - start, "score": time.perf_counter() - measured},
            reused=reused,
            notes=(*self.estimator.needs.notes(evidence), *self._notes_on_matrices()),
        )
        return (self._with_trust(found, evidence) if self.estimator.needs.parts else found), evidence

    def _notes_on_matrices(self) -> tuple[str, ...]:
        """Says which matrices the evidence lacks, because they are not linear layers."""
        needs = self.estimator.needs
        if not needs.is_measured or self.probe.parameters == "lora":
            return ()
        note = self.model.left_out(self.probe.scope if len(needs.parts) == 2 else "all")
        return () if note is None else (note,)

    def _with_trust(self, decision: Scored, evidence: Any) -> Scored:
        """Adds the samples behind the scores, and the figures and notes on how far to trust them."""
        parts = self.estimator.needs.parts
        train, validation = self.samples()
        num_samples = len(train), (len(validation) if "validation" in parts else 0)
        fidelity, why_not = self._fidelity(evidence)
        return replace(
            decision,
            num_samples=num_samples,
            rows={part: tuple(example.id for example in self.chosen(part)) for part in parts},
            num_truncated=train.num_truncated + (validation.num_truncated if "validation" in parts else 0),
            reliability=None if decision.scores is None else self._reliability(evidence, num_samples),
            fidelity=fidelity,
            notes=(*decision.notes, *why_not, *self._notes_on_samples(num_samples)),
        )

    def _reliability(self, evidence: Any, num_samples: tuple[int, int]) -> float | None:
        assert not isinstance(self.estimator, CurveEstimator)
        return split_half(self.estimator, evidence) if min(num_samples) > 1 else None

    def _fidelity(self, evidence: Any) -> tuple[dict[str, float] | None, tuple[str, ...]]:
        """Compares evidence that is not exact with exact evidence, or gives a note that says why it does not."""
        needs = self.estimator.needs
        approximations = needs.approximations(self)
        if not approximations:
            return None, ()
        try:
            if self.probe.fidelity_samples == 0:
                raise NotCompared("probe.fidelity_samples=0")
            some, reference = needs.with_exact(self, evidence)
            if self.takes_matrices or self.takes_experts:
                reference = by_matrix(reference) if self.takes_matrices else by_expert(reference)
        except NotCompared as why:
            probed = f"probed in {' and '.join(approximations)}"
            return None, (f"{probed}; not compared with exact float32 ({why})",)
        assert not isinstance(self.estimator, CurveEstimator)
        num_validation, num_train = next(iter(reference.grams.values())).val_train.shape
        return {"train": num_train, "validation": num_validation, **fidelity_of(self.estimator, some, reference)}, ()

    def _notes_on_samples(self, num_samples: tuple[int, int]) -> tuple[str, ...]:
        notes = []
        for part, num in zip(("train", "validation"), num_samples, strict=True):
            asked = getattr(self.probe, f"num_{part}")
            if 0 < num < asked:
                notes.append(f"num_{part}={asked} asked for, and there are {num} {part} rows")
            if num == 1:
                notes.append(f"one {part} sample ranks nothing reliably: give more {part} rows")
        return tuple(notes)


@dataclass(frozen=True, kw_only=True)
class Decider(Scorer):
    """Measurements with an estimator and an allocator. Calling it decides.

    Attributes:
        allocator: spends scores, curves or nothing.
        skip: the matrices that get nothing, and that budgets do not count, see `layerif.layers.is_named`.
    """

    allocator: Allocator | CurveAllocator | EitherAllocator | FixedAllocator
    skip: tuple[str, ...] = ()

    @property
    def takes_matrices(self) -> bool:
        return getattr(self.allocator, "takes_matrices", False)

    @property
    def takes_experts(self) -> bool:
        return getattr(self.allocator, "takes_experts", False)

    def units(self) -> LayerMap:
        """Gives the layers that the allocation is spread over."""
        return self.layers().without(self.skip)

    @property
    def reads_windows(self) -> bool:
        """Tells if the evidence that is spent comes from calibration windows."""
        return self.allocator.spends != "nothing" and self.estimator.needs.reads_windows

    def __call__(self, load: Load | None = None) -> Decision:
        """Takes the evidence, turns it into scores or curves, and spends these.

        Args:
            load: gives the model, and is called only if something is measured. None loads the model here.
        """
        start = time.perf_counter()
        allocation = self.preview()
        previewed = time.perf_counter() - start
        if self.allocator.spends == "nothing":
            return Decision(
                scores=None, allocation=allocation, source=self.allocator.source, seconds={"allocate": previewed}
            )
        found, _ = self.scored(load)
        start = time.perf_counter()
        if found.curves is not None:
            allocation = self._spent(found.curves)
            found = replace(found, reliability=_agreement_of_halves(self._spent, found.curves))
        else:
            assert found.scores is not None
            scores = (
                found.scores
                if self.takes_matrices or self.takes_experts
                else _without_skipped(found.scores, self.units())
            )
            allocation = self._spent(scores)
        seconds = {**found.seconds, "allocate": time.perf_counter() - start}
        seconds["evidence"] += previewed
        return Decision(**{**vars(found), "seconds": seconds, "allocation": allocation})

    def preview(self) -> Allocation:
        """Allocates equal scores or curves, so that an impossible request is refused before any pass over the data."""
        self._check_pair()
        self.check()
        layers = self.units()
        if isinstance(self.estimator, CurveEstimator) and self.allocator.spends != "nothing":
            return self._spent(self.estimator.equal(layers))
        shown, names = name_of(self.estimator), layers.names
        if self.takes_matrices:
            names = self._scored_matrices()
        if self.takes_experts:
            names = self._scored_experts()
        return self._spent(LayerScores(names, (1.0,) * len(names), "undertrained", shown, "none"))

    def _scored_matrices(self) -> tuple[str, ...]:
        """Names the matrices that get a score of their own.

        Raises:
            ValueError: the evidence of the estimator does not keep matrices apart.
        """
        needs = self.estimator.needs
        if not needs.keeps_matrices:
            raise ValueError(
                f"allocator.matrices=score needs a score for each matrix, and the evidence of estimator="
                f"{name_of(self.estimator)} keeps blocks alone apart; use an estimator on gradients, such as datainf, "
                "or allocator.matrices=size"
            )
        skeleton: Any = getattr(self.model, "skeleton", self.model.load)
        is_of_gradients = len(needs.parts) == 2
        return (self.measured_layers(skeleton()) if is_of_gradients else self.layers()).each_matrix.names

    def _scored_experts(self) -> tuple[str, ...]:
        """Names the experts that get a score of their own.

        Raises:
            ValueError: the model has none, or the estimator does not measure each.
        """
        needs, names = self.estimator.needs, sizes_of(self.layers(), "expert")[0]
        if not needs.is_measured or needs.keeps_experts:
            return names
        if not needs.keeps_matrices:
            raise ValueError(
                f"allocator.unit=expert needs a score for each expert, and the evidence of estimator="
                f"{name_of(self.estimator)} keeps blocks alone apart; use estimator=expert_output or skip_curve, or an "
                "estimator on gradients, such as datainf"
            )
        skeleton: Any = getattr(self.model, "skeleton", self.model.load)
        if len(needs.parts) == 2 and self.measured_layers(skeleton()).each_expert.names != names:
            raise ValueError(
                f"probe.scope={self.probe.scope} measures no experts, and allocator.unit=expert spends their scores; "
                "use probe.scope=mlp"
            )
        return names

    def _spent(self, given: LayerScores | Curves | Spans) -> Allocation:
        """Calls the allocator with what it takes."""
        allocator: Any = self.allocator
        return allocator(given) if allocator.spends == "curves" else allocator(given, self.units())

    def _check_pair(self) -> None:
        """Refuses an allocator that cannot spend what the estimator gives."""
        gives = "curves" if isinstance(self.estimator, CurveEstimator) else "scores"
        if self.estimator.needs.keeps_experts and not self.takes_experts and self.allocator.spends != "nothing":
            raise ValueError(
                f"estimator={name_of(self.estimator)} scores experts, and this allocator spends no scores of them; use "
                "method=drop allocator.unit=expert"
            )
        if self.allocator.spends in (gives, "either", "nothing"):
            return
        fitting = "an allocator of scores (experts, rank, sparsity, bits, blocks, layers)"
        if isinstance(self.estimator, CurveEstimator):
            fitting = "allocator=blocks" if self.estimator.kind == "blocks" else "allocator=knapsack"
        others = (
            "an estimator of scores, such as datainf"
            if gives == "curves"
            else "an estimator of curves (loss_curve, bits_curve, gain_curve)"
        )
        raise ValueError(
            f"estimator={name_of(self.estimator)} gives {gives}, and this allocator spends {self.allocator.spends}; "
            f"use {fitting}, or {others}"
        )

    def inputs(self) -> dict[str, str]:
        """Hashes every file and folder that the estimator's request and the allocator name."""
        paths = [*self.estimator.needs.paths]
        if self.allocator.spends == "nothing":
            paths += self.allocator.paths
        return {path: hash_folder(Path(path)) if Path(path).is_dir() else hash_file(Path(path)) for path in paths}


def _agreement_of_halves(spent: Callable[[Any], Allocation], curves: Curves | Spans) -> float | None:
    """Compares the allocations by two halves of the samples; None where one of them is even."""
    if curves.halves is None:
        return None
    first, second = (spent(half).values for half in curves.halves)
    return None if len({*first}) == 1 or len({*second}) == 1 else spearman(first, second)


def _without_skipped(scores: LayerScores, layers: LayerMap) -> LayerScores:
    """Leaves out the scores of blocks of which every matrix is skipped."""
    if len(layers.names) == len(scores.layers):
        return scores
    kept = {name: value for name, value in scores.by_name().items() if name in layers.names}
    return replace(scores, layers=tuple(kept), values=tuple(kept.values()))
