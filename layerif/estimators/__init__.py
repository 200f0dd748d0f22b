"""Estimators turn evidence about a model into one score per layer. Each one is one file.

Every estimator is a frozen keyword-only dataclass whose fields are its configuration. It names the evidence that it
needs by a request (`layerif/probe/request.py`) and scores it:

| needs                          | evidence passed to `score`                       | estimators                       |
|--------------------------------|--------------------------------------------------|----------------------------------|
| `Grams()`                      | `LayerGrams` of one probe                        | datainf, exact, lissa, grad_dot, |
|                                |                                                  | cosine, grad_norm, fisher_trace, |
|                                |                                                  | quadratic                        |
| `CheckpointPasses(folders)`    | `CheckpointGrams`, a probe at every checkpoint   | tracin                           |
| `Curvature(spectra)`           | `LayerCurvature`, influence at many dampings     | kfac, ekfac, shampoo             |
| `Spectra()`                    | `LayerSpectra` of the weights alone              | alpha                            |
| `Activations(epsilon)`         | `LayerActivations` of one forward pass           | outlier, dlp, block_influence,   |
|                                |                                                  | avss, avss_contrast,             |
|                                |                                                  | linear_probe, cca,               |
|                                |                                                  | cluster_information              |
| `Removal(sparsity, mask)`      | `LayerRemovals`: errors that a mask makes        | lsa                              |
| `UpdateMasks()`                | `LayerMasks`: SPIDER's mask of a mean gradient   | spider                           |
| `Gates(num_steps, …)`          | `LayerGates`, learned on a trained adapter       | ila                              |
| `ExpertOutputs(calibration)`   | `LayerExperts`: what each expert adds            | expert_output                    |
| `Nothing(files)`               | `LayerMap` of the model; no pass over data       | uniform, random, ends, file      |

Estimators of curves give these in place of scores: loss_curve (`LossCurves`), bits_curve (`BitsCurves`), gain_curve
(`Gains`), measured_loss (`LossByBlock`), skip_curve (`Skips`), angular (`SpanAngles`).

`reversed` wraps any other estimator and needs what that one needs.

Influence estimators derive from `_base.GramEstimator` and give the `influence` of one matrix. Aggregation, granularity
and normalisation come from there, and the damping comes from `_base.DampedEstimator`. Those by a curvature that needs
more than Grams derive from `_curvature.CurvatureEstimator`. Grams remember the influence that
an estimator found on them, so that settings that differ in aggregation, normalisation or allocation alone are solved
once.

To add an estimator, write `layerif/estimators/x.py` (the formula as a pure function of tensors, and the dataclass) and
`conf/estimator/x.yaml` (`_target_` and every field). Nothing is registered anywhere; the law tests find it by its file.
To add a kind of evidence, write `layerif/probe/x.py` with its request, a type in `layerif/evidence.py` and a version in
`layerif/versions.py`. A file here whose name begins with an underscore is not an estimator.
"""

from __future__ import annotations

import importlib
from dataclasses import is_dataclass
from typing import Any, Protocol

from layerif.checks import check_choice
from layerif.files import conf_folder
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


def estimator_called(name: str) -> Any:
    """Makes the estimator of a name, with its default settings.

    Raises:
        ValueError: there is no such estimator, or it cannot do without settings.
    """
    check_choice("estimator", name, sorted(file.stem for file in (conf_folder() / "estimator").glob("*.yaml")))
    module = importlib.import_module(f"layerif.estimators.{name}")
    own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    chosen = next(each for each in own if is_dataclass(each) and hasattr(each, "needs"))
    try:
        return chosen()
    except TypeError as error:
        raise ValueError(f"estimator={name!r} needs settings of its own: {error}; give estimator={name}(…)") from error


def estimator_of_scores(given: Any) -> Estimator:
    """Gives the estimator that a name stands for, or the estimator itself.

    Raises:
        ValueError: it is neither, or an estimator of curves.
    """
    if isinstance(given, type) or not (isinstance(given, str) or hasattr(given, "needs")):
        got = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise ValueError(
            f"estimator is {got}; give the name of one, such as 'datainf', or one with settings, such as DataInf()"
        )
    found = estimator_called(given) if isinstance(given, str) else given
    if not hasattr(found, "score"):
        raise ValueError(
            f"the estimator {type(found).__name__} gives curves, not scores; use layerif.curves for a model in memory, "
            "or an estimator of scores, such as datainf"
        )
    return found
