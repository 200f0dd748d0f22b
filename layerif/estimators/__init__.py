"""Estimators turn evidence about a model into one score per layer. Each one is one file.

Every estimator is a frozen keyword-only dataclass whose fields are its configuration. It names the evidence that it
needs by a request (`layerif/probe/request.py`) and scores it:

| needs                          | evidence passed to `score`                       | estimators                       |
|--------------------------------|--------------------------------------------------|----------------------------------|
| `Grams()`                      | `LayerGrams` of one probe                        | datainf, exact, lissa, grad_dot, |
|                                |                                                  | cosine, grad_norm, fisher_trace, |
|                                |                                                  | quadratic                        |
| `CheckpointPasses(folders)`    | `CheckpointGrams`, a probe at every checkpoint   | tracin                           |
| `Curvature(damping, …)`        | `LayerInfluences`, measured under its damping    | ekfac                            |
| `Spectra()`                    | `LayerSpectra` of the weights alone              | alpha                            |
| `Activations(epsilon)`         | `LayerActivations` of one forward pass           | outlier, dlp, block_influence,   |
|                                |                                                  | avss, linear_probe, cca          |
| `Removal(sparsity, mask)`      | `LayerRemovals`: errors that a mask makes        | lsa                              |
| `Gates(num_steps, …)`          | `LayerGates`, learned on a trained adapter       | ila                              |
| `Nothing(files)`               | `LayerMap` of the model; no pass over data       | uniform, random, file            |

`reversed` wraps any other estimator and needs what that one needs.

Influence estimators derive from `_base.GramEstimator` and give the `influence` of one matrix. Aggregation, granularity
and normalisation come from there, and the damping comes from `_base.DampedEstimator`. Grams remember the influence that
an estimator found on them, so that settings that differ in aggregation, normalisation or allocation alone are solved
once.

To add an estimator, write `layerif/estimators/x.py` (the formula as a pure function of tensors, and the dataclass) and
`conf/estimator/x.yaml` (`_target_` and every field). Nothing is registered anywhere; the law tests find it by its file.
To add a kind of evidence, write `layerif/probe/x.py` with its request, a type in `layerif/evidence.py` and a version in
`layerif/versions.py`. A file here whose name begins with an underscore is not an estimator.
"""

from __future__ import annotations

from typing import Any, Protocol

from layerif.probe.request import Request
from layerif.scores import LayerScores


class Estimator(Protocol):
    """The interface of an estimator."""

    @property
    def needs(self) -> Request:
        """The request for the evidence that `score` is given."""
        ...

    def score(self, evidence: Any, /) -> LayerScores:
        """Scores every layer."""
        ...
