"""The error that removing weights makes in the output of each matrix: the evidence of `estimator=lsa`.

Letters in shape suffixes: B batch, T tokens, V the real tokens of a batch (no padding), I inputs and O outputs of a
linear layer. Sums are taken over real tokens alone, so that batch size and padding change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerif.data.batches import Encodings, batches
from layerif.evidence import LayerRemovals
from layerif.layers import LayerMap
from layerif.models.blocks import device_of, linear_at, weight_of
from layerif.models.contexts import evaluating, full_precision
from layerif.models.hooks import hooked
from layerif.models.stored import AnyLinear
from layerif.probe.activations import Activations, read_batch, real_inputs
from layerif.probe.measurements import Load, Measurements, hash_of
from layerif.probe.request import Part, Request
from layerif.probe.store import MeasurementKind
from layerif.progress import progress
from layerif.versions import VERSIONS

Mask = Callable[[Tensor, Tensor, float], Tensor]

REMOVALS: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("removals", "removal passes")


@dataclass(frozen=True)
class Removal(Request):
    """A request for the errors that Wanda's mask makes on the train samples.

    The mask needs the norms of the inputs. They are those of `Activations`, whose pass comes first unless the store has
    it.

    Attributes:
        sparsity: the share of each matrix' weights that its mask removes.
        mask: Wanda's: takes a weight (O×I), the squared norms of its inputs (I) and the sparsity.
    """

    keeps_matrices: ClassVar[bool] = True
    parts: ClassVar[tuple[Part, ...]] = ("train",)

    sparsity: float
    mask: Mask

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerRemovals, bool]:
        layers, samples = measurements.layers(), measurements.samples()[0]
        load = cache(load)
        seen, knew_inputs = Activations().take(measurements, load)
        tensors, key, reused = measurements.by_the_first(
            REMOVALS,
            lambda: removal_errors(
                measurements.merged(load),
                layers,
                samples,
                seen.input_square_norms,
                sparsity=self.sparsity,
                mask=self.mask,
                batch_size=measurements.probe.batch_size,
                pad_id=measurements.pad_id,
            ),
            removals=VERSIONS["removals"],
            activations=VERSIONS["activations"],
            sparsity=self.sparsity,
            samples=hash_of([sample.input_ids for sample in samples]),
        )
        errors = {param: float(tensors[param]) for param in layers.matrices}
        return LayerRemovals(layers, errors, key), reused and knew_inputs


def removal_errors(
    model: nn.Module,
    layers: LayerMap,
    samples: Encodings,
    input_square_norms: Mapping[str, Tensor],
    *,
    sparsity: float,
    mask: Mask,
    batch_size: int = 8,
    pad_id: int = 0,
) -> dict[str, Tensor]:
    """Computes ‖X Δᵀ‖² of each matrix on its dense inputs X, with Δ the weights that Wanda's mask removes.

    That is Σ over rows and pairs (j, k) of the row's removed weights of w_j w_k H_jk with H = XᵀX, which is not formed.
    Every sample runs forward once. The masks take a byte for each weight beside the model.

    Args:
        model: a causal language model; it is left as it was.
        layers: the blocks and matrices.
        samples: the samples.
        input_square_norms: by parameter name, Σ over the tokens of x_j² (I), for the masks.
        sparsity: the share of each matrix' weights that its mask removes.
        mask: see `Removal`.
        batch_size: the samples that the model sees at once.
        pad_id: the token that fills shorter samples.

    Returns:
        The error of each matrix by parameter name (float64).

    Raises:
        ValueError: a linear layer does not see every token once.
    """
    device = device_of(model)
    sums = {param: torch.zeros((), dtype=torch.float64, device=device) for param in layers.matrices}
    with evaluating(model), torch.no_grad(), full_precision():
        kept = {}
        for param in layers.matrices:
            weight = weight_of(model, param)
            kept[param] = ~mask(weight, input_square_norms[param].to(weight.device), sparsity)
        for _, batch in progress(list(batches(samples, batch_size, pad_id)), "removals"):
            mask_BT = batch["attention_mask"].bool().to(device)
            linears = {param: linear_at(model, param) for param in layers.matrices}
            hooks = [(each, _adding(sums, param, each, kept[param], mask_BT)) for param, each in linears.items()]
            with hooked(hooks):
                read_batch(model, batch["input_ids"].to(device), mask_BT)
    return {param: error.cpu() for param, error in sums.items()}


def _adding(
    sums: Mapping[str, Tensor], param: str, linear: AnyLinear, kept_OI: Tensor, mask_BT: Tensor
) -> Callable[..., None]:
    """Makes the hook that adds the error of one matrix on one batch."""

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        input_VI = real_inputs(param, args, mask_BT)
        removed_OI = linear.weight.masked_fill(kept_OI, 0).to(input_VI.dtype)
        sums[param].add_((input_VI @ removed_OI.T).square().sum(dtype=torch.float64))

    return look
