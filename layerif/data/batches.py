"""Examples become token tensors: the text around a prompt, the end of the prompt, and batches of samples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from layerif.data.render import Example, Template
from layerif.data.rows import IGNORED, AnyExample, ChatExample, CompletionExample, TextExample, TokenExample
from layerif.data.tokens import num_shared, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PaddingSide = Literal["left", "right"]
LossOn = Literal["all", "output"]

_MARKS = re.compile(r"{%[-+]?\s*generation")

# By template: the text around the instruction, and the text before the output. `chat` is the tokenizer's own.
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
        counted: for each token, whether the loss counts it; None: all from `loss_from` on.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    loss_from: int = 0
    is_truncated: bool = False
    counted: tuple[bool, ...] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> tuple[int, ...]:
        """The token ids, with -100 in place of those that the loss does not count."""
        if self.counted is None:
            return (IGNORED,) * min(self.loss_from, len(self)) + self.input_ids[self.loss_from :]
        return tuple(id if is_in else IGNORED for id, is_in in zip(self.input_ids, self.counted, strict=True))


class Encodings(tuple[Encoded, ...]):
    """The samples of one data set, in its order."""

    @property
    def num_truncated(self) -> int:
        """The number of samples that were longer than the limit and lost their end."""
        return sum(sample.is_truncated for sample in self)


def prompt_text(
    example: Example | CompletionExample, template: Template, tokenizer: PreTrainedTokenizerBase | None = None
) -> str:
    """Returns the text that a model reads before it answers.

    Args:
        example: a question, or a prompt with its completion.
        template: the text around it; `plain` leaves a prompt as it is.
        tokenizer: whose chat template is meant; only for `template=chat`.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    instruction = example.instruction if isinstance(example, Example) else example.prompt
    if template == "chat":
        return chat_text(tokenizer, [{"role": "user", "content": instruction}], example.id)
    return _TEMPLATES[template][0].replace("{instruction}", instruction)


def output_text(output: str, template: Template) -> str:
    """Returns the output of a question as it follows the prompt."""
    return _TEMPLATES.get(template, ("", ""))[1] + output


def shown_text(example: AnyExample, template: Template, tokenizer: Any) -> str:
    """Returns an example as a model reads it, for people to look at."""
    if isinstance(example, Example | CompletionExample):
        output = output_text(example.output, template) if isinstance(example, Example) else example.output
        return prompt_text(example, template, tokenizer) + output
    if isinstance(example, TextExample):
        return example.text
    return tokenizer.decode(encode([example], tokenizer, template=template, max_length=None, eos=False)[0].input_ids)


def check_vocabulary(examples: Sequence[AnyExample], num_embeddings: int) -> None:
    """Refuses token ids that the model has no embedding for.

    Raises:
        ValueError: names the example.
    """
    for example in examples:
        if isinstance(example, TokenExample) and max(example.input_ids) >= num_embeddings:
            raise ValueError(
                f"{example.id}: the token id {max(example.input_ids)} is beyond the vocabulary; the model has "
                f"embeddings for the ids below {num_embeddings}, so give ids of the tokenizer that it was trained with"
            )


def chat_text(tokenizer: Any, messages: Sequence[Any], id: str, *, is_asked: bool = True) -> str:
    """Returns messages in the tokenizer's chat template; if `is_asked`, up to where the assistant begins to answer."""
    with _naming_the_template(tokenizer, id):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=is_asked)


def encode(
    examples: Sequence[AnyExample],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    template: Template,
    max_length: int | None,
    loss_on: LossOn | None = None,
    eos: bool,
    at_most: int | None = None,
) -> Encodings:
    """Turns every example into token ids, in the order of the examples.

    A text is tokenised as a whole, prompt and right output together. BOS is there if the tokenizer adds it by itself,
    or if the chat template holds it, and the loss never counts it as a first token. The prompt ends where the ids of
    the whole text begin to differ from those of the prompt alone.

    Args:
        examples: the examples.
        tokenizer: the tokenizer of the model; None where all examples are token ids.
        template: the text around each instruction and prompt; texts and conversations are not changed by it.
        max_length: the most tokens of a sample; a longer one loses its end and is marked. None sets no limit.
        loss_on: the tokens that the loss counts, all or those of the output. None: what the kind of example says, see
            `layerif.data.rows`; all of a question's.
        eos: append the end-of-text token, before samples are cut; not to conversations, which their template ends, nor
            to token ids.
        at_most: the most tokens that the caller accepts; what comes of a longer sample only tells that it is longer.

    Raises:
        ValueError: a sample has no token left to learn, or the tokenizer has no end-of-text token or chat template.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length} leaves no token to predict; use 2 or more")
    worded = [each for each in examples if not isinstance(each, TokenExample)]
    if worded and tokenizer is None:
        raise ValueError(f"example {worded[0].id} is a text, and there is no tokenizer; give one, or rows of input_ids")
    if eos and worded and getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError(
            "the tokenizer has no end-of-text token to append; give its tokenizer_config.json an eos_token"
        )
    texts = [each for each in worded if not isinstance(each, ChatExample)]
    needed = max_length if at_most is None else at_most
    of_texts = iter(_texts(texts, tokenizer, template, needed))
    samples = []
    for example in examples:
        if isinstance(example, TokenExample):
            given = tuple(label != IGNORED for label in example.labels)
            marked = None if all(given) or loss_on == "all" else given
            spelt = _Spelt(example.input_ids, 0 if marked is None else given.index(True) if any(given) else 0, marked)
        elif isinstance(example, ChatExample):
            spelt = _conversation(example, tokenizer, loss_on, needed)
        else:
            prompt_length, ids = next(of_texts)
            end: Any = (tokenizer.eos_token_id,) if eos and tokenizer is not None else ()
            spelt = _Spelt(ids + end, prompt_length, None)
        is_refused = at_most is not None and len(spelt.ids) > at_most
        samples.append(Encoded(spelt.ids, 0) if is_refused else _cut(example, spelt, max_length, loss_on))
    return Encodings(samples)


@dataclass(frozen=True)
class _Spelt:
    """All token ids of an example, how many of them are its prompt, and which of them are marked as counting."""

    ids: tuple[int, ...]
    prompt_length: int
    counted: tuple[bool, ...] | None


def _texts(
    examples: Sequence[Example | TextExample | CompletionExample],
    tokenizer: Any,
    template: Template,
    max_length: int | None,
) -> list[tuple[int, tuple[int, ...]]]:
    """Gives the length of the prompt, and the ids of prompt and output, of each example."""
    pairs, special = [], []
    for example in examples:
        is_text = isinstance(example, TextExample)
        prompt = "" if is_text else prompt_text(example, template, tokenizer)
        output = example.text if is_text else example.output
        pairs.append((prompt, prompt + (output_text(output, template) if isinstance(example, Example) else output)))
        special.append(is_text or template != "chat")  # a chat template spells BOS itself

    def ids_of(texts: Sequence[str]) -> list[tuple[int, ...]]:
        chosen = {flag: [text for text, each in zip(texts, special, strict=True) if each == flag] for flag in special}
        spelt = {flag: iter(token_ids(tokenizer, of, max_length, special=flag)) for flag, of in chosen.items()}
        return [next(spelt[flag]) for flag in special]

    prompts, wholes = (ids_of([pair[which] for pair in pairs]) for which in (0, 1))
    return [(num_shared(prompt, whole), whole) for prompt, whole in zip(prompts, wholes, strict=True)]


def _conversation(example: ChatExample, tokenizer: Any, loss_on: LossOn | None, at_most: int | None) -> _Spelt:
    """Spells a conversation by the tokenizer's chat template.

    Where the template marks what the assistant says, that counts. Where it does not, everything does, unless the prompt
    is known or `loss_on=output` asks for the last message. Marks need the whole conversation, however long.
    """
    messages = list(example.messages)
    with _naming_the_template(tokenizer, example.id):
        # A tokenizer may have several templates by name; this gives the one that it uses.
        marks = _MARKS.search(tokenizer.get_chat_template()) is not None
    if example.num_prompt is None and loss_on != "all" and marks:
        with _naming_the_template(tokenizer, example.id):
            found = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        ids, counted = tuple(found["input_ids"]), tuple(map(bool, found["assistant_masks"]))
        return _Spelt(ids, counted.index(True) if any(counted) else len(ids), counted)
    text = chat_text(tokenizer, messages, example.id, is_asked=False)
    asked = messages[: example.num_prompt if example.num_prompt is not None else -1]
    if not asked or (example.num_prompt is None and loss_on != "output"):
        return _Spelt(token_ids(tokenizer, [text], at_most, special=False)[0], 0, None)
    texts = [chat_text(tokenizer, asked, example.id), text]
    prompt, ids = token_ids(tokenizer, texts, at_most, special=False)
    return _Spelt(ids, num_shared(prompt, ids), None)


def _cut(example: AnyExample, spelt: _Spelt, max_length: int | None, loss_on: LossOn | None) -> Encoded:
    """Cuts a sample at `max_length`, and refuses one without a token to learn."""
    kept = spelt.ids[:max_length]
    is_output = loss_on == "output" or (
        loss_on is None
        and (isinstance(example, CompletionExample) or (isinstance(example, ChatExample) and bool(example.num_prompt)))
    )
    if isinstance(example, TextExample):
        is_output = False
    counted = None if spelt.counted is None else spelt.counted[:max_length]
    loss_from = spelt.prompt_length if is_output and counted is None else 0
    if counted is None and is_output and len(kept) <= spelt.prompt_length:
        is_cut = max_length is not None and spelt.prompt_length == max_length + 1  # see `token_ids`
        many = f"more than {max_length}" if is_cut else spelt.prompt_length
        raise ValueError(
            f"example {example.id}: its prompt of {many} tokens fills max_length={max_length}, "
            f"so no token of the output is left to learn; use max_length>={spelt.prompt_length + 1} or loss_on=all"
        )
    sample = Encoded(
        input_ids=kept,
        prompt_length=min(spelt.prompt_length, len(kept)),
        loss_from=loss_from,
        is_truncated=len(kept) < len(spelt.ids),
        counted=counted,
    )
    if all(label == IGNORED for label in sample.labels[1:]):
        why = "it has one token" if len(kept) < 2 else f"none of its {len(kept)} tokens counts in the loss"
        raise ValueError(
            f"example {example.id} has no token to predict: {why}; give it a longer text or other labels, raise "
            "max_length, or leave the row out"
        )
    return sample


@contextmanager
def _naming_the_template(tokenizer: Any, id: str) -> Iterator[None]:
    """Refuses a tokenizer without a chat template, and names the row that a template refuses."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"example {id} needs a chat template, and the tokenizer has none; set tokenizer.chat_template, or give "
            "rows of text or of prompt and completion"
        )
    try:
        yield
    except Exception as error:  # a template is a small program, so it may fail in any way that Python can
        raise ValueError(f"the chat template cannot spell example {id}: {type(error).__name__}: {error}") from error


def padding_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Returns the padding token, or the end-of-text token: masks come from lengths, so any would do.

    Raises:
        ValueError: the tokenizer has neither.
    """
    if tokenizer is None:
        return 0
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
        labels[row, start : start + len(sample)] = torch.tensor(sample.labels)
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
