"""From examples to token tensors: what stands around a prompt, where it ends, and how samples share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerif.data.render import Example, Template

PaddingSide = Literal["left", "right"]


# template -> (what stands around the instruction, what stands before the output)
_TEMPLATES: dict[str, tuple[str, str]] = {
    "plain": ("{instruction}", " "),
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
        "",
    ),
}


@dataclass(frozen=True)
class Encoded:
    """One sample. The first `prompt_length` tokens are the prompt; the loss counts tokens from `loss_from` on."""

    input_ids: tuple[int, ...]
    prompt_length: int
    loss_from: int = 0
    is_truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


class Encodings(tuple[Encoded, ...]):
    """The samples of one data set, in its order."""

    @property
    def num_truncated(self) -> int:
        """How many samples were longer than the limit and lost their end."""
        return sum(sample.is_truncated for sample in self)


def prompt_text(example: Example, template: Template) -> str:
    """All that a model sees before it answers."""
    return _TEMPLATES[template][0].replace("{instruction}", example.instruction)


def output_text(output: str, template: Template) -> str:
    """An output as it follows the prompt."""
    return _TEMPLATES[template][1] + output


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template,
    max_length: int | None,
    loss_on: Literal["all", "output"] = "all",
    eos: bool,
) -> Encodings:
    """Prompt and right output of every example as token ids, in the examples' order.

    The text is tokenised whole; BOS is there if the tokenizer puts it there by itself, and never counts. The prompt
    ends where the ids of the prompt alone and of the whole text part.
    max_length: longer samples lose their end and are marked (None: no limit); eos: append the end-of-text token first.
    Raises ValueError where truncation leaves nothing to learn.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length} leaves no token to predict; use 2 or more")
    if eos and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token to append; give it one, or set eos=false")
    end: Any = (tokenizer.eos_token_id,) if eos else ()
    prompts = [prompt_text(example, template) for example in examples]
    texts = [p + output_text(e.output, template) for p, e in zip(prompts, examples, strict=True)]
    samples = []
    for example, prompt, ids in zip(examples, token_ids(tokenizer, prompts), token_ids(tokenizer, texts), strict=True):
        prompt_length = num_shared(prompt, ids)
        whole = ids + end
        kept = whole[:max_length]
        if loss_on == "output" and len(kept) <= prompt_length:
            raise ValueError(
                f"example {example.id}: its prompt of {prompt_length} tokens fills max_length={max_length}, "
                f"so no token of the output is left to learn; use max_length>={prompt_length + 1} or loss_on=all"
            )
        samples.append(
            Encoded(
                input_ids=kept,
                prompt_length=min(prompt_length, len(kept)),
                loss_from=prompt_length if loss_on == "output" else 0,
                is_truncated=len(kept) < len(whole),
            )
        )
    return Encodings(samples)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Ids of each text, with BOS if the tokenizer adds it, and never an EOS of its own accord."""
    if not texts:
        return []
    rows: Any = tokenizer(list(texts), padding=False, truncation=False, return_attention_mask=False)["input_ids"]
    eos = tokenizer.eos_token_id
    return [tuple(ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids) for ids in rows]


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two texts have in common from the start."""
    return next(
        (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or the end-of-text token: masks come from lengths, so the two may be one."""
    found: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise ValueError("the tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token")
    return found


def collate(encodings: Sequence[Encoded], pad_id: int, side: PaddingSide = "right") -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (samples × longest); labels are -100 where nothing counts.

    side: where the padding goes; a sample's loss is the same on either.
    """
    shape = len(encodings), max(map(len, encodings))
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, sample in enumerate(encodings):
        start = shape[1] - len(sample) if side == "left" else 0
        ids = torch.tensor(sample.input_ids)
        input_ids[row, start : start + len(sample)] = ids
        attention_mask[row, start : start + len(sample)] = 1
        labels[row, start + sample.loss_from : start + len(sample)] = ids[sample.loss_from :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def batches(
    encodings: Sequence[Encoded], batch_size: int, pad_id: int, side: PaddingSide = "right"
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of samples of similar length, longest first (memory runs out at once or not at all).

    Each comes with the positions of its samples in `encodings`, to put results back into their order.
    """
    order = sorted(range(len(encodings)), key=lambda index: (-len(encodings[index]), index))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, collate([encodings[index] for index in indices], pad_id, side)


IGNORED = -100
