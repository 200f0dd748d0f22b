"""The settings of a probe: the key `probe` of `conf/config.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from layerif.checks import Count, Seed, Whole, check_fields
from layerif.data.batches import LossOn
from layerif.data.render import Template
from layerif.models.blocks import Parameters, Scope
from layerif.probe.grams.passes import Choice, Offload


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The samples, the parameters and the loss that are measured, and the way of measuring.

    The last four change the cost alone.

    Attributes:
        scope: the matrices of a block that are measured.
        parameters: the weights themselves, or the matrices of a LoRA adapter.
        num_train, num_validation: the number of samples (the paper: 300 and 50).
        max_length: in tokens; longer samples are cut and counted.
        template: `plain` is instruction + " " + output, as for the released scores. None takes `chat` where the task
            does, and `plain` elsewhere.
        loss_on: `all` tokens, as in the paper, or only the `output`. None takes what the kind of rows says: all of a
            question, a text or an unmarked conversation; otherwise the completion, or what is marked.
        skip_unsupported: leave out experts in a layout that is not known, instead of refusing them.
        projection: project gradients to so many dimensions a side; None measures them exactly.
        projection_seed: the seed of the projection.
        fidelity_samples: where scores are not exact (projection, half precision), so many train samples and half as
            many validation samples are measured exactly in float32 as well, to state how well the ranks agree; 0
            compares nothing.
        batch_size: the samples that the model sees at once.
        form: the way of taking inner products, see `layerif.probe.grams.products`.
        memory_gb: the memory of the device that the probe may hold beside the model and one batch; None: half of what
            is free (85 % on a GPU).
        offload: the place for factors that do not fit, see `layerif.probe.grams.passes`; on `disk` an interrupted pass
            resumes from its finished batches.
    """

    scope: Scope = "attention"
    parameters: Parameters = "weights"
    num_train: Count = 300
    num_validation: Count = 50
    max_length: Annotated[int, Ge(2)] = 128
    template: Template | None = None
    loss_on: LossOn | None = None
    skip_unsupported: bool = False
    projection: Count | None = None
    projection_seed: Seed = 0
    fidelity_samples: Whole = 32
    batch_size: Count = 8
    form: Choice = "auto"
    memory_gb: Annotated[float, Gt(0), "null takes half of what is free"] | None = None
    offload: Offload = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "probe")
        if 0 < self.fidelity_samples < 4:
            raise ValueError(f"probe.fidelity_samples={self.fidelity_samples} ranks nothing; use 4 or more, or 0")
