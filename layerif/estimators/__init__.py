"""Estimators: from evidence about a model to one score per layer. One file each; a file is all a new one needs.

Every estimator is a frozen keyword-only dataclass whose fields are its configuration, with

    needs: ClassVar[str]                            what evidence the shell has to take
    score(evidence) -> LayerScores                  the same call for every estimator

| needs       | evidence passed to `score`                              | estimators                               |
|-------------|---------------------------------------------------------|------------------------------------------|
| grams       | `LayerGrams` of one probe                               | datainf, exact, lissa, grad_dot, cosine, |
|             |                                                         | grad_norm, fisher_trace                  |
| checkpoints | `CheckpointGrams`, a probe at each of its `checkpoints` | tracin                                   |
| curvature   | `LayerInfluences`, measured under its own damping       | ekfac                                    |
| weights     | `LayerSpectra` of the weights alone                     | alpha                                    |
| activations | `LayerActivations` of one forward pass                  | outlier, dlp, block_influence, avss,     |
|             |                                                         | linear_probe, cca                        |
| training    | `LayerGates` learned on a trained adapter               | ila                                      |
| nothing     | `LayerMap` of the model; no pass over data is made      | uniform, random, file                    |

`reversed` wraps any of them and needs what that one needs.

Influence estimators derive from `gram.GramEstimator` and give one matrix's `influence`; aggregation, granularity and
normalisation come from there, and the damping from `gram.DampedEstimator`. Grams remember what was found on them by an
estimator's fields, so that settings which differ in aggregation, normalisation or allocation alone are solved once.

To add one: write `layerif/estimators/x.py` (the formula as a pure function of tensors, and the dataclass) and
`conf/estimator/x.yaml` (`_target_` and every field). Nothing is registered anywhere; the law tests find it by its file.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from layerif.scores import LayerScores


class Estimator(Protocol):
    """What the shell knows of an estimator."""

    needs: ClassVar[str]

    def score(self, evidence: Any, /) -> LayerScores: ...
