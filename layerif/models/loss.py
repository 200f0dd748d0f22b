"""The loss of each sample. Training takes its mean over samples, the probe its sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerif.data.batches import IGNORED


def positions_of(attention_mask: Tensor) -> Tensor:
    """Counts the positions of real tokens alone, so that the side of the padding moves no position (batch × tokens).

    From left-padded ids alone some models would count the padding.
    """
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def per_sample_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Computes each sample's mean next-token cross-entropy over its own labelled tokens.

    The loss of a sample, and so its gradient, does not depend on the other samples of the batch.

    Args:
        model: a causal language model.
        batch: `input_ids`, `attention_mask` and `labels`, each (batch × tokens). Labels are the input ids, or -100
            where a token does not count (padding, and the prompt where only the output is learned).

    Returns:
        The loss (batch,) in nats.

    Raises:
        ValueError: a sample has no labelled token after its first.
    """
    mask = batch["attention_mask"]
    # The labels are shifted and not the logits, because a slice of the logits would copy the largest tensor twice.
    targets = batch["labels"].roll(-1, dims=1)
    targets[:, -1] = IGNORED
    targets = targets.where(mask.bool(), IGNORED)  # behind left padding nothing predicts the first token
    num_counted = (targets != IGNORED).sum(dim=1)
    if bool((num_counted == 0).any()):
        raise ValueError(
            f"sample {int((num_counted == 0).nonzero()[0])} of the batch has no token to predict: "
            "every sample needs at least two tokens, one of them labelled; raise max_length or drop the row"
        )
    positions = positions_of(mask)
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False).logits
    if logits.dtype != torch.float64:  # half precision is too coarse for a loss; double stays for exact references
        logits = logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets).sum(dim=1) / num_counted
