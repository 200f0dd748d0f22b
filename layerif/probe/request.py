"""The form in which an estimator asks for its evidence.

Each kind of evidence is one file in this room. It holds the measurement, as a function of a model and samples, and a
request: a small frozen dataclass that derives from `Request`. An estimator names its request as `needs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from layerif.layers import LayerMap
from layerif.models.blocks import Scope
from layerif.probe.grams.passes import Choice, Matrix, Passes, Workload
from layerif.probe.measurements import Load, Measurements

Part = Literal["train", "validation"]


class NotCompared(Exception):
    """Says why evidence that is not exact is not compared with exact evidence."""


@dataclass(frozen=True)
class Planned:
    """The gradient passes that some evidence takes, for an estimate of their cost (`layerif.probe.plan`).

    Attributes:
        about: the matrices and samples, in words.
        layers: the blocks with the matrices that are measured.
        scope: the matrices of a block that these are taken from, see `layer_map`.
        batch: one of the batches.
        workload: gives the sizes, from the first matrix that reads the same input as each one.
        form: of the products, see `Probe`.
        tile_bytes: the wanted size of a tile.
        title: of the table of operations.
        operations: gives the operations of a matrix in each form, from the sizes.
        chosen: gives the form that a matrix is measured in.
        rehearsal: gives the work on one matrix with a number of samples of random values, and its operations.
        per_weight: gives work that does not grow with the samples, and the number of weights that it is done for; None
            where there is none.
        forward_tokens: the tokens that run forward once more.
        num_models: the models that are measured alike.
    """

    about: str
    layers: LayerMap
    scope: Scope
    batch: Mapping[str, Tensor]
    workload: Callable[[Mapping[str, str]], Workload]
    form: Choice
    tile_bytes: float
    title: str
    operations: Callable[[Workload, Matrix], Mapping[str, float]]
    chosen: Callable[[Workload, Matrix], str]
    rehearsal: Callable[[Passes, int, torch.device], tuple[Callable[[], Any], float]]
    per_weight: Callable[[torch.device], tuple[Callable[[], Any], int]] | None = None
    forward_tokens: int = 0
    num_models: int = 1


class Request(ABC):
    """A request for one kind of evidence.

    Attributes:
        parts: the parts of the task that the evidence is measured on. Evidence of both parts keeps the samples apart
            and has `halves`; evidence of `train` alone cannot be taken apart again.
        is_measured: False where the evidence costs nothing.
        takes_loss: True where the evidence is measured with `Measurements.loss`.
        reads_windows: True where the evidence is measured on calibration windows of a text.
        keeps_experts: True where the evidence is of single experts.
        keeps_matrices: True where the evidence can score every matrix by itself, see `layerif.evidence.by_matrix`.
        needs_dense_weights: True where the measurement changes weights, or takes their gradient, so that a quantised
            model will not do.
    """

    parts: ClassVar[tuple[Part, ...]] = ()
    is_measured: ClassVar[bool] = True
    takes_loss: ClassVar[bool] = False
    reads_windows: ClassVar[bool] = False
    keeps_matrices: ClassVar[bool] = False
    needs_dense_weights: ClassVar[bool] = False
    keeps_experts: ClassVar[bool] = False

    @property
    def paths(self) -> tuple[str, ...]:
        """The files and folders whose content the evidence depends on, besides the model and the rows."""
        return ()

    def check(self, measurements: Measurements) -> None:  # noqa: B027 - most kinds have nothing to refuse
        """Refuses what cannot be measured, before any work.

        Raises:
            ValueError: says which setting is missing or does not fit.
        """

    def check_weights(self, measurements: Measurements, estimator: str) -> None:
        """Refuses a quantised model where the measurement needs weights that are numbers.

        Args:
            measurements: the model, the samples and the store.
            estimator: its name, for the message.
        """
        if self.needs_dense_weights and (scheme := measurements.model.quantisation):
            raise ValueError(
                f"estimator={estimator} changes weights to see what that costs, or takes their gradient, and the model "
                f"is quantised ({scheme}); use model.quantised=none, or an estimator on the gradients of samples, such "
                "as datainf"
            )

    @abstractmethod
    def take(self, measurements: Measurements, load: Load) -> tuple[Any, bool]:
        """Measures the evidence, or reads it from the store.

        Args:
            measurements: the model, the samples and the store.
            load: gives the model on its device. It is called only if something is measured.

        Returns:
            The evidence, and whether the store had all of it.
        """

    def planned(self, measurements: Measurements, skeleton: nn.Module) -> Planned | None:
        """Says which gradient passes the evidence takes; None where their cost is not known beforehand.

        Args:
            measurements: the model, the samples and the store.
            skeleton: the model without its weights.
        """
        return None

    def approximations(self, measurements: Measurements) -> list[str]:
        """Names what makes the evidence differ from exact evidence in float32; empty where nothing does."""
        if not self.parts:
            return []
        found = [measurements.model.dtype] if measurements.is_half_precision else []
        return [*found, *([f"{scheme} weights"] if (scheme := measurements.model.quantisation) else [])]

    def with_exact(self, measurements: Measurements, evidence: Any) -> tuple[Any, Any]:
        """Measures some of the samples exactly.

        Returns:
            The evidence of these samples out of `evidence`, and the exact evidence of the same samples.

        Raises:
            NotCompared: says why this is not possible.
        """
        raise NotCompared("only Grams of one model are")

    def notes(self, evidence: Any) -> tuple[str, ...]:
        """Gives the notes on this evidence for the record."""
        return ()
