"""The loss of every token under the model as it is, from one forward pass: for rows and tokens to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from layerif.data.batches import Encoded, batches
from layerif.models.blocks import device_of
from layerif.models.contexts import evaluating, full_precision
from layerif.models.loss import token_losses
from layerif.probe.measurements import Load, Measurements, hash_of
from layerif.probe.store import MeasurementKind
from layerif.progress import progress
from layerif.versions import VERSIONS

TOKEN_LOSSES: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("token_losses", "forward passes")


def stored_token_losses(measurements: Measurements, load: Load, samples: Sequence[Encoded]) -> list[Tensor]:
    """Gives `losses_of_tokens` of these samples, from the store if it has them.

    Args:
        measurements: the model, the store and the size of a batch.
        load: gives the model on its device, and is called only if something is measured.
        samples: the samples.
    """
    lengths = [len(sample) - 1 for sample in samples]

    def measure() -> dict[str, Tensor]:
        model = measurements.merged(load)
        found = losses_of_tokens(model, samples, measurements.pad_id, batch_size=measurements.probe.batch_size)
        return {"losses": torch.cat(found)}

    tensors, _, _ = measurements.by_the_first(
        TOKEN_LOSSES,
        measure,
        token_losses=VERSIONS["token_losses"],
        loss=VERSIONS["loss"],
        samples=hash_of([sample.input_ids for sample in samples]),
    )
    return list(tensors["losses"].split(lengths))


def losses_of_tokens(model: nn.Module, samples: Sequence[Encoded], pad_id: int, *, batch_size: int = 8) -> list[Tensor]:
    """Computes the next-token loss of every token but the first, whether or not training would count it.

    Args:
        model: a causal language model; it is left as it was.
        samples: at least two tokens each.
        pad_id: the token that fills shorter samples.
        batch_size: the samples that the model sees at once.

    Returns:
        −ln p of each token given those before it, for each sample (tokens − 1, float64), in nats.

    Raises:
        ValueError: names the sample in which a loss is not finite.
    """
    whole = [Encoded(sample.input_ids, 0) for sample in samples]
    found: dict[int, Tensor] = {}
    device = device_of(model)
    with evaluating(model), torch.no_grad(), full_precision():
        for indices, batch in progress(list(batches(whole, batch_size, pad_id)), "rows"):
            losses_BT, _ = token_losses(model, {name: each.to(device) for name, each in batch.items()})
            for index, losses_T in zip(indices, losses_BT.double().cpu(), strict=True):
                found[index] = losses_T[: len(whole[index]) - 1].clone()
                if not bool(found[index].isfinite().all()):
                    raise ValueError(
                        f"the loss of sample {index} is not finite; look at that row, or load the model in float32 "
                        "(model.dtype=float32)"
                    )
    return [found[index] for index in range(len(whole))]
