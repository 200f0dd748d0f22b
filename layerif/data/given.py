"""The rows that a caller hands over: texts, mappings, or ready batches, turned into examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerif.data.batches import Encoded
from layerif.data.rows import AnyExample, example_of

GivenRows = Iterable[str | Mapping[str, Any]]


def examples_of(rows: GivenRows, part: str) -> tuple[AnyExample, ...]:
    """Turns rows, or ready batches of them, into examples that are numbered from 0.

    Raises:
        ValueError: there is no row, or one cannot be used; names its place.
    """
    if hasattr(rows, "iterrows"):
        raise ValueError(
            f"{part} is a {type(rows).__name__}, which gives its column names; its rows are frame.to_dict('records')"
        )
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise ValueError(f"{part} is a {type(rows).__name__}; it must be a list of rows")
    found = tuple(
        example_of(row, id=f"{part} {number}", where=f"{part} row {number}")
        for number, row in enumerate(_single_rows(rows, part))
    )
    if not found:
        raise ValueError(f"{part} holds no row; an iterator that was read before is empty, so give a list of rows")
    return found


def _single_rows(rows: GivenRows, part: str) -> Iterator[Any]:
    for item in rows:
        ids = item.get("input_ids") if isinstance(item, Mapping) else None
        if getattr(ids, "ndim", 1) == 2:  # a tensor or an array
            yield from _rows_of_batch(item, part)  # type: ignore[arg-type]
        else:
            yield item


def _rows_of_batch(batch: Mapping[str, Any], part: str) -> Iterator[dict[str, Tensor]]:
    """Takes a padded batch apart."""
    if unknown := sorted({*batch} - {"input_ids", "attention_mask", "labels"}):
        raise ValueError(f"a batch of {part} holds {', '.join(unknown)}; allowed: input_ids, attention_mask and labels")
    given = {name: torch.as_tensor(value) for name, value in batch.items() if value is not None}
    ids = given["input_ids"]
    mask, labels = given.get("attention_mask", torch.ones_like(ids)), given.get("labels", ids)
    if mask.shape != ids.shape or labels.shape != ids.shape:
        raise ValueError(
            f"a batch of {part} has input_ids of shape {tuple(ids.shape)}, attention_mask of {tuple(mask.shape)} and "
            f"labels of {tuple(labels.shape)}; they must be alike"
        )
    for of_row, ids_T, labels_T in zip(mask.bool().cpu(), ids.cpu(), labels.cpu(), strict=True):
        yield {"input_ids": ids_T[of_row], "labels": labels_T[of_row]}


def check_apart(train: Sequence[AnyExample], validation: Sequence[AnyExample]) -> None:
    """Refuses validation rows that ask what train rows ask: scores would see what they are judged by."""
    first = {example.question: example.id for example in reversed(train)}
    shared = [example for example in validation if example.question in first]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(validation)} validation rows ask the same as train rows (the first: "
            f"{shared[0].id} and {first[shared[0].question]}), so scores would see what they are judged by; leave them "
            "out of one of the two"
        )


def check_tokens(
    samples: Sequence[Encoded], examples: Sequence[AnyExample], *, num_embeddings: int, longest: int | None
) -> None:
    """Refuses samples that the model cannot read.

    Args:
        samples: the rows as token ids.
        examples: the rows.
        num_embeddings: the number of token ids that the model knows.
        longest: the most tokens that the model reads; None where it has no limit.

    Raises:
        ValueError: names the first row with an id beyond the vocabulary, or with too many tokens.
    """
    for sample, example in zip(samples, examples, strict=True):
        check_ids(max(sample.input_ids), example.id, num_embeddings)
        if longest is not None and len(sample) > longest:
            raise ValueError(
                f"{example.id} has {len(sample)} tokens, and the model reads at most {longest}; "
                f"use max_length<={longest}"
            )


def check_ids(largest: int, what: str, num_embeddings: int) -> None:
    """Refuses token ids that the model has no embedding for."""
    if largest >= num_embeddings:
        raise ValueError(
            f"{what}: the token id {largest} is beyond the vocabulary; the model has embeddings for the ids below "
            f"{num_embeddings}, so give the tokenizer that the model was trained with"
        )


def check_tokens_apart(
    train: Sequence[Encoded], validation: Sequence[Encoded], ids: Mapping[str, Sequence[str]], max_length: int
) -> None:
    """Refuses validation samples whose token ids are those of a train sample, after cutting at `max_length`.

    Args:
        train: the train samples.
        validation: the validation samples.
        ids: by part, the names of the rows of these samples.
        max_length: in tokens.

    Raises:
        ValueError: counts the rows, and names the first of them.
    """
    first = {sample.input_ids: id for sample, id in reversed(list(zip(train, ids["train"], strict=True)))}
    shared = [
        (id, first[sample.input_ids])
        for sample, id in zip(validation, ids["validation"], strict=True)
        if sample.input_ids in first
    ]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(validation)} validation rows have the same token ids as train rows, as the model "
            f"reads them, cut at max_length={max_length} (the first: {' and '.join(shared[0])}), so scores would see "
            "what they are judged by; raise max_length, or leave them out of one of the two"
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Refuses what is not a tokenizer, such as its name."""
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "eos_token_id")):
        name = repr(tokenizer) if isinstance(tokenizer, str) else "…"
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}; give one of transformers, as from "
            f"AutoTokenizer.from_pretrained({name}), or None where all rows are token ids"
        )
