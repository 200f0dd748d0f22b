"""The one loss: training takes its mean over samples, the probe its sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSION = 1  # part of every cache key: raise it when the meaning of the loss changes

IGNORED = -100


def per_sample_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean next-token cross-entropy (nats) of each sample over its own labelled tokens: (batch,).

    batch: `input_ids`, `attention_mask`, `labels`, each (batch × tokens); labels are the input ids, or
    -100 where a token does not count (padding, and the prompt when only the output is learned). A sample's
    loss, and so its gradient, does not depend on which samples share its batch.
    Raises ValueError for a sample without a single labelled token after its first.
    """
    mask = batch["attention_mask"]
    targets = batch["labels"][:, 1:]
    counted = (targets != IGNORED) & mask[:, :-1].bool()  # behind left padding nothing predicts the first token
    num_counted = counted.sum(dim=1)
    if bool((num_counted == 0).any()):
        raise ValueError(
            f"sample {int((num_counted == 0).nonzero()[0])} of the batch has no token to predict: "
            "every sample needs at least two tokens, one of them labelled; raise max_length or drop the row"
        )
    # Positions count real tokens only, so that the side of the padding moves neither rotary nor learned positions.
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False).logits
    # Only counted positions enter the softmax: padding costs nothing over a large vocabulary.
    rows = counted.nonzero(as_tuple=True)[0]
    counted_logits = logits[:, :-1][counted]
    if counted_logits.dtype != torch.float64:  # half precision loses the loss; double is kept for exact references
        counted_logits = counted_logits.float()
    losses = F.cross_entropy(counted_logits, targets[counted], reduction="none")
    return losses.new_zeros(len(targets)).index_add(0, rows, losses) / num_counted
