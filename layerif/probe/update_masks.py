"""SPIDER's mask: the weights that a task needs more than the pretrained model does (Huang et al., 2411.10928).

A mask m holds, for each weight, the share of its update that stays: W ← (1 − m)∘W⁰ + m∘W. `method.protect=spider`
updates weights so, and `estimator=spider` scores layers by the mean of their mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerif.data.batches import batches
from layerif.evidence import LayerMasks
from layerif.layers import LayerMap
from layerif.models.blocks import device_of, linear_at
from layerif.models.contexts import frozen, full_precision
from layerif.models.loss import Loss, per_sample_loss
from layerif.models.stored import Stored, tensor_of
from layerif.probe.measurements import Load, Measurements, hash_of_samples
from layerif.probe.request import Part, Request
from layerif.probe.store import MeasurementKind
from layerif.progress import progress
from layerif.versions import VERSIONS

UPDATE_MASKS: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("update_masks", "mean gradients")


def importance(values: Tensor) -> Tensor:
    """Gives sigmoid((|x| − mean |x|) / std |x|) of every entry of a tensor.

    Args:
        values: weights or gradients, of any shape.

    Returns:
        A number from 0 to 1 for each entry, and 0 for all entries of a tensor of zeros. Where all have one size,
        so that their standard deviation is 0, it is 0.5.
    """
    sizes = values.abs()
    if not bool(sizes.any()):
        return torch.zeros_like(sizes)
    if bool(sizes.min() == sizes.max()):
        return torch.full_like(sizes, 0.5)
    return torch.sigmoid((sizes - sizes.mean()) / sizes.std())


def update_mask(weight: Tensor, gradient: Tensor) -> Tensor:
    """Gives SPIDER's mask of one weight tensor.

    It is I_G/(I_W + I_G) where the importance I_G of the gradient is above I_W of the pretrained weight, and 0
    elsewhere, divided by the mean of its positive entries, and at most 1.

    Args:
        weight: pretrained.
        gradient: summed up over steps, or a mean; only its proportions matter. It has the shape of the weight.

    Returns:
        A number from 0 to 1 for each weight.
    """
    pretrained, task = importance(weight), importance(gradient)
    mask = torch.where(task > pretrained, task / (pretrained + task), 0.0)
    positive = mask > 0
    if not bool(positive.any()):
        return mask
    return (mask / (mask.sum() / positive.sum())).clamp(max=1)


@dataclass(frozen=True)
class UpdateMasks(Request):
    """A request for SPIDER's mask of each matrix, with the mean gradient of the train samples, summed up."""

    needs_dense_weights: ClassVar[bool] = True
    parts: ClassVar[tuple[Part, ...]] = ("train",)
    takes_loss: ClassVar[bool] = True

    def check(self, measurements: Measurements) -> None:
        if measurements.probe.parameters == "lora":
            raise ValueError(
                "estimator=spider compares gradients with pretrained weights, which an adapter's matrices are not; use "
                "probe.parameters=weights"
            )

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerMasks, bool]:
        layers, samples = measurements.layers(), measurements.samples()[0]

        def measure() -> dict[str, Tensor]:
            ready = list(batches(samples, measurements.probe.batch_size, measurements.pad_id))
            return mask_sums(
                measurements.merged(load),
                layers,
                ready,
                names=measurements.names("train"),
                loss=measurements.loss or per_sample_loss,
            )

        tensors, key, reused = measurements.by_the_first(
            UPDATE_MASKS,
            measure,
            update_masks=VERSIONS["update_masks"],
            loss=measurements.loss_name,
            samples=hash_of_samples(samples),
        )
        return LayerMasks(layers, {param: float(tensors[param]) for param in layers.matrices}, key), reused


def mask_sums(
    model: nn.Module,
    layers: LayerMap,
    samples: Sequence[tuple[list[int], Mapping[str, Tensor]]],
    *,
    names: Sequence[str],
    loss: Loss = per_sample_loss,
) -> dict[str, Tensor]:
    """Takes the mean gradient of some samples, and sums up SPIDER's mask that it gives each matrix.

    Args:
        model: a causal language model; it is left as it was.
        layers: the blocks and matrices.
        samples: batches, each with the numbers of its samples.
        names: of the samples, for messages.
        loss: gives the loss of each sample.

    Returns:
        The sum of each matrix' mask by parameter name (float64).

    Raises:
        ValueError: names the sample whose loss is not finite.
    """
    linears = {param: linear_at(model, param) for param in layers.matrices}
    tensors = {id(each): each for each in map(tensor_of, linears.values())}  # experts share one
    device = device_of(model)
    sums: dict[str, Tensor] = {}
    with frozen(model), full_precision(), torch.enable_grad():
        for tensor in tensors.values():
            tensor.requires_grad_()
        try:
            for indices, batch in progress(samples, "gradients"):
                losses: Any = loss(model, {name: each.to(device) for name, each in batch.items()})
                if not bool(losses.isfinite().all()):
                    sample = names[indices[int((~losses.isfinite()).nonzero()[0])]]
                    raise ValueError(
                        f"the loss of {sample} is not finite; look at that row, or load the model in float32 "
                        "(model.dtype=float32)"
                    )
                found = dict(zip(tensors, torch.autograd.grad(losses.sum(), list(tensors.values())), strict=True))
                for param, linear in linears.items():
                    whole = found[id(tensor_of(linear))]
                    gradient = linear.of(whole) if isinstance(linear, Stored) else whole
                    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                    sums[param] = sums[param] + wide if param in sums else wide
        finally:
            for tensor in tensors.values():
                tensor.requires_grad_(False)
    return {
        param: update_mask(linear.weight.detach().to(sums[param].dtype), sums[param]).double().sum().cpu()
        for param, linear in linears.items()
    }
