"""Texts become token ids, with BOS where the tokenizer adds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONG = 64  # characters for each id that is wanted; an id stands for about four


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], at_most: int | None = None, *, special: bool = True
) -> list[tuple[int, ...]]:
    """Returns the ids of each text, with BOS once if the tokenizer adds it, and without an EOS that it adds by itself.

    A text that spells BOS at its start does not get a second one.

    Args:
        tokenizer: the tokenizer of the model.
        texts: the texts.
        at_most: the number of ids that the caller can use. A text with many more loses those after the first
            `at_most + 1`, so that a row of many megabytes takes no longer than a page. None keeps all.
        special: False leaves out the tokens that the tokenizer would add by itself.
    """
    if at_most is None:
        return _token_ids(tokenizer, texts, special)
    long = _LONG * (at_most + 1)
    short_ones = iter(_token_ids(tokenizer, [text for text in texts if len(text) <= long], special))
    return [
        next(short_ones) if len(text) <= long else _first_ids(tokenizer, text, at_most + 1, special) for text in texts
    ]


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = True) -> list[tuple[int, ...]]:
    if not texts:
        return []
    options: dict[str, Any] = {"padding": False, "truncation": False, "return_attention_mask": False}
    rows: Any = tokenizer(list(texts), add_special_tokens=special, **options)["input_ids"]
    if not special:
        return [tuple(ids) for ids in rows]
    eos, bos = tokenizer.eos_token_id, (getattr(tokenizer, "bos_token_id", None),)
    rows = [tuple(ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids) for ids in rows]
    return [ids[1:] if ids[:2] == bos * 2 and bos_of(tokenizer) == bos else ids for ids in rows]


def _first_ids(tokenizer: PreTrainedTokenizerBase, text: str, num: int, special: bool) -> tuple[int, ...]:
    """Returns the first ids of a text, from starts of it that double in length until two of them agree.

    The end of a start may be cut within a word, which is why one of them says too little.
    """
    length, before = _LONG // 4 * num, ()
    while length < len(text):
        ids = _token_ids(tokenizer, [text[:length]], special)[0][:num]
        if len(ids) == num and ids == before:
            return ids
        length, before = 2 * length, ids
    return _token_ids(tokenizer, [text], special)[0]


def bos_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the tokens that the tokenizer puts before a text by itself: BOS, a few more in some families, or none."""
    whole, plain = (token_ids(tokenizer, ["a"], special=special)[0] for special in (True, False))
    return next((whole[:start] for start in range(len(whole)) if whole[start : start + len(plain)] == plain), ())


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Counts the ids that two texts have in common from the start."""
    return next(
        (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
