"""Examples become token tensors: the text around a prompt, the end of the prompt, and batches of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from layerif.data.render import Example, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PaddingSide = Literal["left", "right"]

IGNORED = -100  # the label of a token that does not count

# By template: the text around the instruction, and the text before the output.
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
    """A sample as token ids.

    Args:
        input_ids: prompt and output.
        prompt_length: the number of tokens of the prompt, which come first.
        loss_from: the first token that the loss counts.
        is_truncated: the sample was longer than the limit and lost its end.
    """

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
        """The number of samples that were longer than the limit and lost their end."""
        return sum(sample.is_truncated for sample in self)


def prompt_text(example: Example, template: Template) -> str:
    """Returns the text that a model reads before it answers."""
    return _TEMPLATES[template][0].replace("{instruction}", example.instruction)


def output_text(output: str, template: Template) -> str:
    """Returns an output as it follows the prompt."""
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
    """Turns prompt and right output of every example into token ids, in the order of the examples.

    The text is tokenised as a whole. BOS is there if the tokenizer adds it by itself, and the loss never counts it. The
    prompt ends where the ids of the whole text begin to differ from those of the prompt alone.

    Args:
        examples: the examples.
        tokenizer: the tokenizer of the model.
        template: the text around each instruction.
        max_length: the most tokens of a sample; a longer one loses its end and is marked. None sets no limit.
        loss_on: the tokens that the loss counts, all or those of the output.
        eos: append the end-of-text token, before samples are cut.

    Raises:
        ValueError: a cut sample has no token left to learn, or the tokenizer has no end-of-text token.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length} leaves no token to predict; use 2 or more")
    if eos and tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token to append; give its tokenizer_config.json an eos_token"
        )
    end: Any = (tokenizer.eos_token_id,) if eos else ()
    prompts = [prompt_text(example, template) for example in examples]
    texts = [p + output_text(e.output, template) for p, e in zip(prompts, examples, strict=True)]
    samples = []
    prompt_ids, text_ids = (token_ids(tokenizer, each, max_length) for each in (prompts, texts))
    for example, prompt, ids in zip(examples, prompt_ids, text_ids, strict=True):
        prompt_length = num_shared(prompt, ids)
        whole = ids + end
        kept = whole[:max_length]
        if loss_on == "output" and len(kept) <= prompt_length:
            is_cut = max_length is not None and prompt_length == max_length + 1  # see `token_ids`
            many = f"more than {max_length}" if is_cut else prompt_length
            raise ValueError(
                f"example {example.id}: its prompt of {many} tokens fills max_length={max_length}, "
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


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], at_most: int | None = None
) -> list[tuple[int, ...]]:
    """Returns the ids of each text, with BOS if the tokenizer adds it, and without an EOS that it adds by itself.

    Args:
        tokenizer: the tokenizer of the model.
        texts: the texts.
        at_most: the number of ids that the caller can use. A text with many more loses those after the first
            `at_most + 1`, so that a row of many megabytes takes no longer than a page. None keeps all.
    """
    if at_most is None:
        return _token_ids(tokenizer, texts)
    long = _LONG * (at_most + 1)
    short_ones = iter(_token_ids(tokenizer, [text for text in texts if len(text) <= long]))
    return [next(short_ones) if len(text) <= long else _first_ids(tokenizer, text, at_most + 1) for text in texts]


_LONG = 64  # characters for each id that is wanted; an id stands for about four


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[int, ...]]:
    if not texts:
        return []
    rows: Any = tokenizer(list(texts), padding=False, truncation=False, return_attention_mask=False)["input_ids"]
    eos = tokenizer.eos_token_id
    return [tuple(ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids) for ids in rows]


def _first_ids(tokenizer: PreTrainedTokenizerBase, text: str, num: int) -> tuple[int, ...]:
    """Returns the first ids of a text, from starts of it that double in length until two of them agree.

    The end of a start may be cut within a word, which is why one of them says too little.
    """
    length, before = _LONG // 4 * num, ()
    while length < len(text):
        ids = _token_ids(tokenizer, [text[:length]])[0][:num]
        if len(ids) == num and ids == before:
            return ids
        length, before = 2 * length, ids
    return _token_ids(tokenizer, [text])[0]


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Counts the ids that two texts have in common from the start."""
    return next(
        (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the padding token, or the end-of-text token: masks come from lengths, so both may be the same.

    Raises:
        ValueError: the tokenizer has neither.
    """
    found: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise ValueError(
            "the tokenizer has neither a padding nor an end-of-text token; give its tokenizer_config.json a pad_token"
        )
    return found


def collate(encodings: Sequence[Encoded], pad_id: int, side: PaddingSide = "right") -> dict[str, Tensor]:
    """Pads samples to a batch of `input_ids`, `attention_mask` and `labels`, each (samples × longest).

    Labels are -100 where a token does not count. A sample's loss is the same for either `side` of the padding.
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
    """Yields batches of samples of similar length, each with the positions of its samples in `encodings`.

    The longest samples come first, so that memory runs out at once or not at all.
    """
    order = sorted(range(len(encodings)), key=lambda index: (-len(encodings[index]), index))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, collate([encodings[index] for index in indices], pad_id, side)
