"""The influence of train rows on rows that come later: a query is measured alone, and all else is in an index.

The index holds a projected gradient of every train row (`layerif.probe.gradients`). Its products with the gradients of
a query are Grams of the two, one matrix at a time, so that thousands of rows need no more memory than the index and one
matrix: an estimator that reads the diagonal of K alone has no K made, one that reads its columns gets them in blocks,
and the others get K whole.

Letters in shape suffixes: N train rows, M rows of the query, R numbers that are left of a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from layerif.attribution.rows import OverLayers, RowInfluence, shown_rows
from layerif.data.batches import shown_text
from layerif.data.render import Example, Template, folded
from layerif.data.rows import AnyExample, ChatExample, example_of, kind_of
from layerif.data.source import Row, json_object
from layerif.data.task import Reader, Splits
from layerif.estimators._base import GramEstimator, by_block
from layerif.evidence import CrossGram, LayerGradients, MatrixGram
from layerif.probe.gradients import is_exact, projected_gradients, projection_size, read_index
from layerif.probe.grams.request import Grams
from layerif.probe.measurements import Load, Measurements
from layerif.stats import known_mean, spearman

BLOCK = 1024  # columns of K that are made at a time


def read_query(path: Path, reader: Reader) -> tuple[AnyExample, ...]:
    """Reads the rows of a query.

    Args:
        path: of a .jsonl file with a row in each line, or of any other file, which is one text. A row has the columns
            of `layerif.data.rows`, or those of the task.
        reader: of the task.

    Raises:
        ValueError: the file cannot be read, or names the row that cannot be used.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"method.query={str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}; give the path of "
            "a .jsonl file with rows, or of a file with one text"
        ) from error
    if path.suffix != ".jsonl":
        return (example_of(content.strip(), id="query", where=str(path)),)
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"method.query={str(path)!r} holds no row; give one JSON object per line")
    rows = [Row(f"{path}:{number}", json_object(line, f"{path}:{number}")) for number, line in lines]
    return tuple(_example(row, f"query {number}", reader) for number, row in enumerate(rows))


def _example(row: Row, id: str, reader: Reader) -> AnyExample:
    # The task's own columns come first, so that a row of the task is known as the row that it is.
    try:
        read = reader.read(row, default_id=id)
    except ValueError as error:
        try:
            kind = kind_of(row.fields, row.where)
        except ValueError:
            raise error from None  # it says which of the task's columns is missing
        return example_of(row.fields, id=id, where=row.where, kind=kind)
    if read is None:
        raise ValueError(f"{row.where} is left out by task.keep; use rows that the task keeps")
    return replace(read.example, id=id)


def check_unseen_query(
    query: Sequence[AnyExample], test: Sequence[AnyExample], template: Template, tokenizer: Any
) -> None:
    """Refuses a query that is an evaluated row: a row that is evaluated is never scored.

    Raises:
        ValueError: names the rows.
    """
    evaluated = {text: example.id for example in test for text in _texts_of(example, template, tokenizer)}
    for example in query:
        for text in _texts_of(example, template, tokenizer):
            if text in evaluated:
                raise ValueError(
                    f"{example.id} of method.query is the evaluated row {evaluated[text]}; a row that is evaluated is "
                    "never scored, so use other rows"
                )


def _texts_of(example: AnyExample, template: Template, tokenizer: Any) -> set[str]:
    """Gives all texts that an example is known by, folded, so that a question in another form is found."""
    found = {example.question, folded(shown_text(example, template, tokenizer))}
    if isinstance(example, ChatExample):
        found |= {folded(str(message["content"])) for message in example.messages if message["role"] == "user"}
    if isinstance(example, Example):
        found |= {folded(example.instruction), folded(f"{example.instruction} {example.output}")}
    return found


def of_query(measurements: Measurements, query: Sequence[AnyExample]) -> Measurements:
    """Gives measurements with the rows of a query in place of the validation rows, and the train rows as chosen."""
    splits = Splits(train=tuple(measurements.chosen("train")), validation=tuple(query), test=())
    probe = replace(measurements.probe, num_train=len(splits.train), num_validation=len(query))
    return replace(measurements, splits=splits, probe=probe)


def query_influence(
    measurements: Measurements,
    estimator: GramEstimator,
    load: Load,
    *,
    index: Path | None,
    index_gb: float,
    over_layers: OverLayers,
    template: Template,
) -> RowInfluence:
    """Measures the influence of train rows on the rows of a query.

    Args:
        measurements: of the train rows and the query, see `of_query`.
        estimator: needs the Grams of one model.
        load: gives the model.
        index: the file of an index; None: that of these rows in the store, which is made where there is none.
        index_gb: the gigabytes of an index that is made; `probe.projection`, where it is set, overrides it.
        over_layers: orders the rows.
        template: the text around a prompt, for people to see.
    """
    probe, model = measurements.probe, load()
    if index is not None:
        train, size, seed = read_index(index, measurements)
    else:
        layers = measurements.measured_layers(model)
        size = probe.projection or projection_size(model, layers, probe.num_train, index_gb)
        seed = probe.projection_seed
        train, _ = projected_gradients(measurements, "train", load, size=size, seed=seed)
    query, _ = projected_gradients(measurements, "validation", load, size=size, seed=seed)
    fidelity, is_whole = None, is_exact(model, train.layers, size)
    notes = [f"an index of {'whole gradients' if is_whole else f'gradients projected to {size} × {size} numbers'}"]
    if scheme := measurements.model.quantisation:
        notes.append(f"gradients of {scheme} weights; not compared with those of the weights before")
    if not is_whole or measurements.is_half_precision:
        if probe.fidelity_samples:
            fidelity = fidelity_of_index(measurements, estimator, train, query, load)
        else:
            notes.append("not compared with exact gradients (probe.fidelity_samples=0)")
    return RowInfluence(
        influences=influence_by_index(estimator, train, query),
        train=shown_rows(measurements.chosen("train"), template, measurements.tokenizer),
        validation=shown_rows(measurements.chosen("validation"), template, measurements.tokenizer),
        source=estimator.source,
        over_layers=over_layers,
        fidelity=fidelity,
        notes=tuple(notes),
        fingerprint=train.fingerprint,
    )


def influence_by_index(
    estimator: GramEstimator, index: LayerGradients, query: LayerGradients, *, block: int = BLOCK
) -> dict[str, Tensor]:
    """Gives I (M×N) of every layer from the gradients of train rows and of a query.

    Args:
        estimator: needs Grams.
        index: the gradients of the N train rows.
        query: those of the M rows of the query, projected alike.
        block: the columns of K that are made at a time.
    """
    layers = index.layers
    units = layers.by_block if estimator.granularity == "block" else {param: (param,) for param in layers.matrices}
    found = {name: _of_unit(name, estimator, index, query, params, block) for name, params in units.items()}
    return found if estimator.granularity == "block" else by_block(found, layers)


def _of_unit(
    name: str,
    estimator: GramEstimator,
    index: LayerGradients,
    query: LayerGradients,
    params: Sequence[str],
    block: int,
) -> Tensor:
    train_NR, query_MR = (_laid_end_to_end(each, params) for each in (index, query))
    num_train, numel = len(train_NR), sum(index.numel[param] for param in params)
    cross_MN, square_N = query_MR @ train_NR.T, train_NR.square().sum(dim=1)
    norms_M = query_MR.norm(dim=1)
    columns = [slice(start, start + block) for start in range(0, num_train, block)]
    if estimator.reads == "whole":
        gram_NN = torch.cat([train_NR @ train_NR[chosen].T for chosen in columns], dim=1)
        return estimator.influences({name: MatrixGram(gram_NN, cross_MN, norms_M, numel)})[name]
    # Every row is the diagonal, without the memory of it: nothing but the diagonal is read.
    gram = MatrixGram(square_N.expand(num_train, num_train), cross_MN, norms_M, numel)
    if estimator.reads == "diagonal":
        return estimator.influence(gram)
    crosses = (
        CrossGram(train_NR @ train_NR[chosen].T, cross_MN[:, chosen], square_N[chosen].sqrt()) for chosen in columns
    )
    return torch.cat([estimator.influence_of(gram, cross) for cross in crosses], dim=1)


def _laid_end_to_end(found: LayerGradients, params: Sequence[str]) -> Tensor:
    """Gives one gradient of all these matrices for each sample (S×R), in float64 as solving asks for."""
    return torch.cat([found.gradients[param] for param in params], dim=1).double()


def fidelity_of_index(
    measurements: Measurements,
    estimator: GramEstimator,
    index: LayerGradients,
    query: LayerGradients,
    load: Load,
) -> dict[str, float] | None:
    """Compares the influences by an index with exact ones, on `probe.fidelity_samples` train rows.

    Args:
        measurements: of the train rows and the query.
        estimator: gives the influence.
        index: the projected gradients of the train rows.
        query: those of the query.
        load: gives the model.

    Returns:
        The rows that were compared (`train`, `validation`), and Spearman's rank correlation over the train rows as a
        mean over the rows of the query (`rows`); None where nothing is ranked.
    """
    probe, asked = measurements.probe, measurements.probe.fidelity_samples
    num_train, num_query = min(probe.num_train, asked), min(probe.num_validation, max(1, asked // 2))
    chosen = sorted(Random(f"{measurements.seed} fidelity").sample(range(probe.num_train), num_train))
    some = Splits(
        train=tuple(measurements.splits.train[row] for row in chosen),
        validation=measurements.splits.validation[:num_query],
        test=(),
    )
    exact = replace(
        measurements,
        splits=some,
        probe=replace(probe, projection=None, num_train=num_train, num_validation=num_query),
    )
    if measurements.is_half_precision and measurements.model.quantisation is None:
        exact = replace(exact, model=measurements.model.in_dtype("float32"))
        load = _loaded(exact)
    reference, _ = Grams().take(exact, load)
    ours = influence_by_index(estimator, index.select(torch.tensor(chosen)), query.select(slice(num_query)))
    ours_MN, theirs_MN = (reduce(add, each.values()) for each in (ours, estimator.by_layer(reference)))
    rho = known_mean(spearman(ours_MN.T.numpy(), theirs_MN.T.numpy()))
    return None if math.isnan(rho) else {"train": num_train, "validation": num_query, "rows": rho}


def _loaded(measurements: Measurements) -> Callable[[], Any]:
    model: Any = measurements.model
    return lambda: model.load().to(measurements.device)
