"""What a probe measures, and how: the settings of `conf/config.yaml`, key `probe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerif.models.blocks import Parameters, Scope
from layerif.probe.grams.passes import Choice, Offload


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is measured: which samples, which parameters, under which loss; and how.

    num_train, num_validation: samples (the paper: 300 and 50); max_length: tokens, longer samples are cut and counted.
    template: `plain` is instruction + " " + output, as the released scores. loss_on: `all` tokens (the paper) or
    only the `output`. skip_unsupported: leave out matrices in scope that are no linear layers, instead of refusing.
    projection: project gradients to so many dimensions a side (None: exact), drawn from projection_seed.
    fidelity_samples: where scores are not exact (projection, half precision), so many train samples and half as many
    validation samples are measured exactly in float32 as well, to state how well the ranks agree; 0 measures nothing.

    The rest changes cost alone. form: how inner products are taken, see `layerif.probe.grams.products`. memory_gb: of the
    device, for what the probe holds beside the model and one batch; None: half of what is free (85 % on a GPU).
    offload: where factors wait that do not fit, see `layerif.probe.grams.passes`; on `disk` an interrupted pass resumes from
    its finished batches.
    """

    scope: Scope = "attention"
    parameters: Parameters = "weights"
    num_train: int = 300
    num_validation: int = 50
    max_length: int = 128
    template: Literal["plain", "alpaca"] = "plain"
    loss_on: Literal["all", "output"] = "all"
    skip_unsupported: bool = False
    projection: int | None = None
    projection_seed: int = 0
    fidelity_samples: int = 32
    batch_size: int = 8
    form: Choice = "auto"
    memory_gb: float | None = None
    offload: Offload = "auto"

    def __post_init__(self) -> None:
        least = {"num_train": 1, "num_validation": 1, "batch_size": 1, "max_length": 2, "fidelity_samples": 0}
        for name, smallest in {**least, "projection": 1}.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"probe.{name}={value} must be at least {smallest}")
        if 0 < self.fidelity_samples < 4:
            raise ValueError(f"probe.fidelity_samples={self.fidelity_samples} ranks nothing; use 4 or more, or 0")
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise ValueError(f"probe.memory_gb={self.memory_gb} must be above 0, or null for half of what is free")
