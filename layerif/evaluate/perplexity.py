"""The metric `perplexity`: exp of the mean token loss over windows of a text.

Letters in shape suffixes: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from layerif.data.text import text
from layerif.data.windows import cut_windows, running_ids
from layerif.evaluate.loss import frequency_losses
from layerif.evaluate.questions import Measured, QuestionSet
from layerif.models.blocks import context_length, device_of
from layerif.models.contexts import evaluating
from layerif.progress import progress

if TYPE_CHECKING:
    from layerif.evaluate.evaluation import Evaluation

_LARGEST_LOSS = math.log(sys.float_info.max)


def check(settings: Evaluation, questions: QuestionSet, max_positions: int | None) -> None:
    """Refuses a window longer than the text or the model's context, and more windows than the text holds."""
    for name in settings.texts:
        ids, bos = running_ids(questions.tokenizer, text(name, "test"), settings.bos)
        check_window(settings.window, len(ids), max_positions)
        available = len(cut_windows(ids, settings.window, bos)) - settings.first_window
        if max(settings.num_windows or 1, 1) > available:
            beyond = f" beyond evaluation.first_window={settings.first_window}" if settings.first_window else ""
            raise ValueError(
                f"evaluation.num_windows={settings.num_windows} asks for more than the text {name!r} holds{beyond}, "
                f"which is {max(available, 0)} windows of {settings.window} tokens; use at most {max(available, 0)}, "
                "or null for all"
            )


def run(settings: Evaluation, questions: QuestionSet, model: nn.Module) -> Measured:
    """Measures the perplexity of each text; its name holds the window, and the text where it is another one."""
    values, context_free = {}, {}
    for of in settings.texts:
        ids, bos = running_ids(questions.tokenizer, text(of, "test"), settings.bos)
        of_text = "" if of == "documentation" else f"{Path(of).stem}/"
        name, number = f"{of_text}perplexity_{settings.window}", settings.num_windows
        which = slice(settings.first_window, None if number is None else settings.first_window + number)
        values[name] = perplexity(
            model, ids, window=settings.window, which=which, bos=bos, batch_size=settings.batch_size
        )
        windows = cut_windows(ids, settings.window, bos)[which]
        by_frequency = frequency_losses([one[num_given(bos) :] for one in windows])
        context_free[name] = math.exp(math.fsum(by_frequency) / len(by_frequency))
    return Measured(values, context_free=context_free)


def perplexity(
    model: nn.Module,
    ids: Sequence[int],
    *,
    window: int,
    which: slice = slice(None),
    bos: Sequence[int] = (),
    batch_size: int = 1,
) -> float:
    """Computes exp of the mean next-token loss (nats) over windows of exactly `window` tokens that do not overlap.

    The first token of a window is not predicted, nor is any of `bos`, and the tokens after the last full window are not
    used. Perplexities of different windows are different quantities.

    Args:
        model: a causal language model.
        ids: the token ids of the text.
        window: the number of tokens in a window, `bos` included.
        which: the windows that are read, in the order of the text.
        bos: the tokens that each window begins with, see `layerif.data.windows.cut_windows`.
        batch_size: the number of windows that the model reads at once.

    Raises:
        ValueError: the window is longer than the text or the model's context, or the loss is not finite.
    """
    check_window(window, len(ids), context_length(model))
    windows = torch.tensor(cut_windows(ids, window, bos)[which])
    given, total = num_given(bos), 0.0
    with evaluating(model), torch.inference_mode():
        for input_BT in progress(windows.split(batch_size), "windows"):
            input_BT = input_BT.to(device_of(model))
            logits_BTV = model(input_ids=input_BT, use_cache=False).logits[:, given - 1 : -1].float()
            losses = F.cross_entropy(logits_BTV.flatten(0, 1), input_BT[:, given:].flatten(), reduction="sum")
            total += float(losses)
    mean = total / windows[:, given:].numel()
    if not mean < _LARGEST_LOSS:
        raise ValueError(
            f"the text has no finite perplexity: its mean token loss is {mean}; weights or activations are not finite "
            "or far too large; look at the weights, or use a wider dtype (model.dtype=float32)"
        )
    return math.exp(mean)


def num_given(bos: Sequence[int]) -> int:
    """Counts the tokens at the start of a window that are not predicted: its first one, or all of `bos`."""
    return max(1, len(bos))


def check_window(window: int, num_tokens: int, max_positions: int | None) -> None:
    """Refuses a window that holds no token to predict, or more tokens than the text or the model."""
    most = num_tokens if max_positions is None else min(num_tokens, max_positions)
    if window < 2:
        raise ValueError(f"evaluation.window={window} has no token to predict; use 2 or more")
    if window > most:
        limit = f"the text has {num_tokens} tokens" if most == num_tokens else f"the model reads at most {most} tokens"
        raise ValueError(f"evaluation.window={window} is too long: {limit}; use evaluation.window<={most}")
