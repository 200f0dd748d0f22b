"""The loss of each sample. Training takes its mean over samples, the probe its sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerif.data.rows import IGNORED

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


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
    sums_B, counted_B = summed_loss(model, batch)
    return sums_B / counted_B


def summed_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Computes each sample's summed next-token cross-entropy over its labelled tokens, and counts these.

    Args:
        model: a causal language model.
        batch: as for `per_sample_loss`.

    Returns:
        The sums (batch,) in nats, and the numbers of tokens that they count (batch,).

    Raises:
        ValueError: a sample has no labelled token after its first.
    """
    losses_BT, is_counted_BT = token_losses(model, batch)
    return losses_BT.sum(dim=1), is_counted_BT.sum(dim=1)


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Computes the next-token cross-entropy of every labelled token.

    Args:
        model: a causal language model.
        batch: as for `per_sample_loss`.

    Returns:
        The loss (batch × tokens) in nats at the position that predicts the token, which is the one before it, and
        whether a labelled token is predicted there. Elsewhere the loss is 0.

    Raises:
        ValueError: a sample has no labelled token after its first.
    """
    mask = batch["attention_mask"]
    # The labels are shifted and not the logits, because a slice of the logits would copy the largest tensor twice.
    targets = batch["labels"].roll(-1, dims=1)
    targets[:, -1] = IGNORED
    targets = targets.where(mask.bool(), IGNORED)  # behind left padding nothing predicts the first token
    is_empty = (targets == IGNORED).all(dim=1)
    if bool(is_empty.any()):
        raise ValueError(
            f"sample {int(is_empty.nonzero()[0])} of the batch has no token to predict: "
            "every sample needs at least two tokens, one of them labelled; raise max_length or drop the row"
        )
    positions = positions_of(mask)
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False).logits
    if logits.dtype != torch.float64:  # half precision is too coarse for a loss; double stays for exact references
        logits = logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets), targets != IGNORED


@dataclass(frozen=True)
class NamedLoss:
    """A loss of one's own, with the name and version under which the store keeps what is measured with it.

    Args:
        name: tells it from other losses.
        version: to raise whenever the function gives other values.
        function: takes the model and a batch (`input_ids`, `attention_mask` and `labels`, each B×T), and returns the
            loss of each sample (B).
    """

    name: str
    version: int
    function: Loss

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self.function(model, batch)


def checked_loss(loss: Loss, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Calls a loss, and refuses a result that is not one number a sample that depends on the model.

    Raises:
        ValueError: says what the loss gave.
    """
    num_samples = len(batch["input_ids"])
    found = loss(model, batch)
    if not isinstance(found, Tensor) or found.shape != (num_samples,):
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"the loss gave {got} for {num_samples} samples; it must return a tensor of ({num_samples},): the loss "
            "of each sample, with no mean or sum over them"
        )
    if not found.is_floating_point() or not found.requires_grad:
        raise ValueError(
            "the loss gave numbers without a gradient; it must compute them from the model's outputs, without detach, "
            "no_grad or inference_mode"
        )
    return found
