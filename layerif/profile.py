"""The profile of a model in memory: its layers' scores, how far to trust them, and what to spend by them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerif.allocate import Allocation
from layerif.allocate.experts import Experts
from layerif.allocate.rank import Rank
from layerif.allocate.sparsity import Sparsity
from layerif.checks import made, require
from layerif.estimators import Estimator
from layerif.estimators._base import GramEstimator
from layerif.estimators._reliability import bootstrap_scores, rank_intervals, ranks
from layerif.evidence import LayerGrams, by_matrix
from layerif.files import whole
from layerif.layers import LayerMap
from layerif.moe import LoraMoeConfig
from layerif.moe.lora import lora_of_ranks
from layerif.scores import LayerScores
from layerif.stats import Estimate, doubts

if TYPE_CHECKING:
    import pandas as pd
    from peft import LoraConfig

_DRAWS = 200
_COLOUR = "#0072b2"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The scores of a model's layers for some rows.

    Attributes:
        scores: one for each block.
        layers: all blocks with all their linear layers, over which allocations are spread.
        reliability: Spearman's rank correlation of the scores of two halves of the samples; None where there is none.
        num_samples: the (train, validation) samples behind the scores.
        num_truncated: the samples that were cut at `max_length`.
        max_length: in tokens.
        notes: remarks on the samples and the measurement.
        target_modules: the names of the linear layers of the blocks, as PEFT takes them.
        expert_tensors: the names of the tensors of fused experts.
        estimator: made the scores.
        evidence: what it scored.
        seed: of the bootstrap.
    """

    scores: LayerScores
    layers: LayerMap
    reliability: float | None
    num_samples: tuple[int, int]
    num_truncated: int
    max_length: int
    notes: tuple[str, ...]
    target_modules: tuple[str, ...]
    expert_tensors: tuple[str, ...]
    seed: int = 0
    estimator: Estimator = field(repr=False)
    evidence: Any = field(repr=False)

    @cached_property
    def rank_intervals(self) -> list[Estimate] | None:
        """The rank of each block, 1 for the highest score, with its interval of 95 % over 200 draws of the samples.

        None where the evidence does not keep the samples apart.
        """
        if not isinstance(self.evidence, LayerGrams) or not isinstance(self.estimator, GramEstimator):
            return None
        if min(self.num_samples) < 2:
            return None
        draws_BL = bootstrap_scores(self.estimator, self.evidence, resamples=_DRAWS, seed=self.seed)
        return rank_intervals(self.scores.values, draws_BL)

    def table(self) -> list[dict[str, Any]]:
        """Gives a row for each block: `block`, `score`, `rank`, and the interval `rank_low` to `rank_high`."""
        intervals = self.rank_intervals
        rows = []
        for index, (block, rank) in enumerate(zip(self.scores.layers, ranks(self.scores.values), strict=True)):
            row = {"block": block, "score": self.scores.values[index], "rank": float(rank)}
            if intervals is not None:
                row |= {"rank_low": float(intervals[index].low), "rank_high": float(intervals[index].high)}
            rows.append(row)
        return rows

    def frame(self) -> pd.DataFrame:
        """Gives `table` as a pandas frame.

        Raises:
            ImportError: pandas is not installed.
        """
        return require("pandas").DataFrame(self.table())

    def plot(self, path: str | Path) -> None:
        """Draws the scores, and the ranks with their intervals, into a file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = require("matplotlib.figure").Figure(figsize=(8.0, 5.0), layout="constrained")
        rows, positions = self.table(), range(len(self.layers.names))
        of_scores, of_ranks = figure.subplots(2, sharex=True)
        of_scores.bar(positions, [row["score"] for row in rows], color=_COLOUR)
        of_scores.set_ylabel(f"score (higher = {self.scores.higher_means})")
        of_ranks.plot(positions, [row["rank"] for row in rows], "o", color=_COLOUR)
        if "rank_low" in rows[0]:
            of_ranks.vlines(
                positions, [row["rank_low"] for row in rows], [row["rank_high"] for row in rows], color=_COLOUR
            )
        of_ranks.invert_yaxis()  # rank 1 is the highest score
        of_ranks.set_ylabel("rank, with 95 % interval")
        of_ranks.set_xlabel("layer (decoder block)")
        of_ranks.xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(path, dpi=120)

    def experts(self, budget: int | None = None, **settings: Any) -> Allocation:
        """Spends the scores on LoRA experts.

        Args:
            budget: the experts of all blocks together; None: 5 per block.
            settings: of `layerif.allocate.experts.Experts`.
        """
        return made(Experts, "experts", budget=budget, **settings)(self.scores, self.layers)

    def rank(self, budget: int | None = None, **settings: Any) -> Allocation:
        """Spends the scores on LoRA ranks.

        Args:
            budget: the ranks of all blocks together; None: 8 per block.
            settings: of `layerif.allocate.rank.Rank`.
        """
        return self._ranks("rank", budget, settings)

    def sparsity(self, target: float, **settings: Any) -> Allocation:
        """Spends the scores on sparsities.

        Args:
            target: the fraction of all weights of the blocks to remove.
            settings: of `layerif.allocate.sparsity.Sparsity`. Smoothing needs 7 blocks, and is left out below that
                unless it is asked for.
        """
        if len(self.layers.names) < 7:
            settings = {"smoothing": False} | settings
        return made(Sparsity, "sparsity", target=target, **settings)(self.scores, self.layers)

    def lora_config(
        self,
        budget: int | None = None,
        *,
        scaling: float = 2.0,
        lora_dropout: float = 0.05,
        target_modules: str | Sequence[str] | None = None,
        experts: bool = False,
        **settings: Any,
    ) -> LoraConfig:
        """Gives PEFT's configuration of a LoRA with a rank by block.

        Args:
            budget: the ranks of all blocks together; None: 8 per block.
            scaling: α/r, the same in every block.
            lora_dropout: dropout on the adapter's input.
            target_modules: names of linear layers, or a text as PEFT takes it (`all-linear`); None: all of the blocks.
            experts: also adapt the fused experts, each with the rank of its block; PEFT then takes no dropout.
            settings: of `layerif.allocate.rank.Rank`.
        """
        if experts and not self.expert_tensors:
            raise ValueError("experts=True adapts fused experts, and this model has none; leave it out")
        if experts and lora_dropout:
            raise ValueError(f"experts=True needs lora_dropout=0, got {lora_dropout}: PEFT has no dropout in experts")
        targets = target_modules or self.target_modules
        if settings.get("matrices") and not isinstance(targets, str):
            settings = {"target_modules": list(targets)} | settings
        ranks = self._ranks("lora_config", budget, settings)
        tensors = self.expert_tensors if experts else ()
        return lora_of_ranks(
            ranks.by_name(), targets, scaling=scaling, lora_dropout=lora_dropout, target_parameters=tensors
        )

    def _ranks(self, called: str, budget: int | None, settings: dict[str, Any]) -> Allocation:
        allocator = made(Rank, called, budget=budget, **settings)
        if not allocator.takes_matrices:
            return allocator(self.scores, self.layers)
        if not self.estimator.needs.keeps_matrices:
            raise ValueError(
                "matrices='score' needs a score for each matrix, and the evidence of this estimator keeps blocks alone "
                "apart; use an estimator on gradients, such as datainf, or matrices='size'"
            )
        return allocator(self.estimator.score(by_matrix(self.evidence)), self.layers)

    def moe_config(self, budget: int | None = None, *, allocator: dict[str, Any] | None = None, **settings: Any) -> Any:
        """Gives the configuration of a mixture of LoRA experts, with a number of experts by block.

        `peft.get_peft_model` takes it.

        Args:
            budget: the experts of all blocks together; None: 5 per block.
            allocator: settings of `layerif.allocate.experts.Experts`.
            settings: of `layerif.moe.LoraMoeConfig`.
        """
        experts = self.experts(budget, **(allocator or {})).by_name()
        return made(LoraMoeConfig, "moe_config", num_experts=experts, task_type="CAUSAL_LM", **settings)

    def save(self, path: str | Path) -> None:
        """Writes the scores as JSON, which `estimator=file` and `layerif.scores.LayerScores.from_dict` read."""
        content = {
            **self.scores.to_dict(),
            "reliability": self.reliability,
            "samples": dict(zip(("train", "validation"), self.num_samples, strict=True)),
            "notes": list(self.notes),
            "numel": asdict(self.layers)["numel"],
        }
        with whole(Path(path)) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @property
    def warnings(self) -> tuple[str, ...]:
        """Says why the scores should not be trusted much; empty where nothing is known against them."""
        return tuple(doubts(self.reliability, self.num_samples))

    def __str__(self) -> str:
        rows = self.table()
        width = max(len(row["block"]) for row in rows)
        lines = [f"{'block':<{width}}  {'score':>10}  rank  95 % interval"]
        for row in rows:
            interval = f"{row['rank_low']:g} to {row['rank_high']:g}" if "rank_low" in row else "–"
            lines.append(f"{row['block']:<{width}}  {row['score']:>10.4g}  {row['rank']:>4g}  {interval}")
        train, validation = self.num_samples
        trust = "none" if self.reliability is None else f"{self.reliability:.2f}"
        cut = f", {self.num_truncated} of them cut at {self.max_length} tokens" if self.num_truncated else ""
        if train:
            lines.append(f"reliability {trust} (rank correlation of two halves); {train} + {validation} samples{cut}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)
