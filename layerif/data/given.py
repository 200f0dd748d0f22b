"""The rows that a caller hands over: texts, mappings, or ready batches, turned into examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerif.data.rows import AnyExample, example_of

GivenRows = Iterable[str | Mapping[str, Any]]


def examples_of(rows: GivenRows, part: str) -> tuple[AnyExample, ...]:
    """Turns rows, or ready batches of them, into examples that are numbered from 0.

    Raises:
        ValueError: there is no row, or one cannot be used; names its place.
    """
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
        if getattr(ids, "ndim", 1) == 2:
            yield from _rows_of_batch(item, part)  # type: ignore[arg-type]
        else:
            yield item


def _rows_of_batch(batch: Mapping[str, Tensor], part: str) -> Iterator[dict[str, Tensor]]:
    """Takes a padded batch apart."""
    if unknown := sorted({*batch} - {"input_ids", "attention_mask", "labels"}):
        raise ValueError(f"a batch of {part} holds {', '.join(unknown)}; allowed: input_ids, attention_mask and labels")
    ids = batch["input_ids"]
    mask, labels = batch.get("attention_mask", torch.ones_like(ids)), batch.get("labels", ids)
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
