"""A model in memory and the rows that a caller hands over, checked and made ready to be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from layerif.data.batches import Encodings
from layerif.data.given import (
    GivenRows,
    check_apart,
    check_tokenizer,
    check_tokens,
    check_tokens_apart,
    examples_of,
)
from layerif.data.task import Splits
from layerif.decide import Scorer
from layerif.estimators import Estimator
from layerif.models.blocks import context_length, device_of
from layerif.models.loaded import Loaded
from layerif.models.loss import Loss, NamedLoss
from layerif.probe.measurements import Measurements
from layerif.probe.settings import Probe
from layerif.probe.store import Store, Unstored


def scorer_in_memory(
    model: nn.Module,
    tokenizer: Any,
    train: GivenRows,
    validation: GivenRows,
    *,
    estimator: Estimator,
    loss: Loss | None,
    seed: int,
    store: str | Path | None,
    num_train: int | None,
    num_validation: int | None,
    **settings: Any,
) -> Scorer:
    """Checks all that `layerif.api.score` is given, before any work.

    Args:
        model: as for `score`.
        tokenizer: as for `score`.
        train: as for `score`.
        validation: as for `score`.
        estimator: needs the evidence.
        loss: a loss of the caller's own.
        seed: chooses the rows.
        store: a folder, or None.
        num_train: use so many train rows; None takes all.
        num_validation: use so many validation rows; None takes all.
        settings: of `Probe`.

    Raises:
        ValueError: names the row, setting or part of the model that cannot be used, and says what can.
    """
    loaded = Loaded(model, is_hashed=store is not None)
    loaded.check()
    check_tokenizer(tokenizer)
    if loss is not None and not callable(loss):
        raise ValueError(
            f"loss is {loss!r}; give a function (model, batch) -> the loss of each sample, or leave it out"
        )
    if loss is not None and not estimator.needs.takes_loss:
        raise ValueError(
            f"the estimator {type(estimator).__name__} measures no loss of yours; use one on Grams, such as datainf, "
            "or leave loss out"
        )
    examples = {"train": examples_of(train, "train"), "validation": examples_of(validation, "validation")}
    check_apart(examples["train"], examples["validation"])
    keeps = loss is None or isinstance(loss, NamedLoss)
    scorer = Scorer(
        model=loaded,
        tokenizer=tokenizer,
        splits=Splits(train=examples["train"], validation=examples["validation"], test=()),
        probe=Probe(
            num_train=len(examples["train"]) if num_train is None else num_train,
            num_validation=len(examples["validation"]) if num_validation is None else num_validation,
            **settings,
        ),
        store=store_at(store if keeps else None),
        seed=seed,
        device=device_of(model),
        loss=loss,
        estimator=estimator,
    )
    scorer.check()
    samples = scorer.samples()
    for part, encodings in zip(examples, samples, strict=True):
        check_samples(scorer, part, encodings)
    ids = {part: [each.id for each in scorer.chosen(part)] for part in examples}
    check_tokens_apart(*samples, ids, scorer.probe.max_length)
    return scorer


def store_at(folder: str | Path | None) -> Store | Unstored:
    """Gives the store in a folder; None gives one that keeps nothing."""
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"store={str(folder)!r} is a file; give a folder, which is made where there is none")
    return Unstored() if folder is None else Store(Path(folder))


def check_samples(measurements: Measurements, part: str, samples: Encodings) -> None:
    """Refuses samples that the model cannot read."""
    model = measurements.model.load()
    chosen, longest = measurements.chosen(part), context_length(model)
    check_tokens(samples, chosen, num_embeddings=num_embeddings(model), longest=longest)


def num_embeddings(model: Any) -> int:
    """Counts the token ids that the model knows."""
    return model.get_input_embeddings().weight.shape[0]
