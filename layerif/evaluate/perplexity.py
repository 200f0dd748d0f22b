"""The metric `perplexity`: exp of the mean token loss over windows of a text.

Letters in shape suffixes: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from layerif.data.batches import token_ids
from layerif.data.text import text
from layerif.models.blocks import context_length, device_of
from layerif.models.contexts import evaluating

_LARGEST_LOSS = math.log(sys.float_info.max)


def perplexity(model: nn.Module, ids: Sequence[int], *, window: int, batch_size: int = 1) -> float:
    """exp of the mean next-token loss (nats) over non-overlapping windows of exactly `window` tokens.

    The first token of a window is not predicted; what is left after the last full window is not used. Perplexities of
    different windows are different quantities. Raises ValueError for a window longer than the text or the model's
    context, and for a loss that is not finite.
    """
    check_window(window, len(ids), context_length(model))
    num_windows = len(ids) // window
    windows = torch.tensor(ids[: num_windows * window]).view(num_windows, window)
    total = 0.0
    with evaluating(model), torch.inference_mode():
        for input_BT in tqdm(windows.split(batch_size), desc="windows", disable=None, leave=False):
            input_BT = input_BT.to(device_of(model))
            logits_BTV = model(input_ids=input_BT, use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits_BTV.flatten(0, 1), input_BT[:, 1:].flatten(), reduction="sum")
            total += float(losses)
    mean = total / (num_windows * (window - 1))
    if not mean < _LARGEST_LOSS:
        raise ValueError(
            f"the text has no finite perplexity: its mean token loss is {mean}; weights or activations are not finite "
            "or far too large; look at the weights, or use a wider dtype (model.dtype=float32)"
        )
    return math.exp(mean)


def text_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return token_ids(tokenizer, [text(name, "test")])[0]


def check_window(window: int, num_tokens: int, max_positions: int | None) -> None:
    most = num_tokens if max_positions is None else min(num_tokens, max_positions)
    if window < 2:
        raise ValueError(f"evaluation.window={window} holds no token to predict; use 2 or more")
    if window > most:
        limit = f"the text has {num_tokens} tokens" if most == num_tokens else f"the model reads at most {most} tokens"
        raise ValueError(f"evaluation.window={window} is too long: {limit}; use evaluation.window<={most}")
