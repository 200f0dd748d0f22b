"""The front door: scores and pruning for a model in memory, without a configuration.

Nothing is written unless a store is given, and the model comes back as it was, except from `prune`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerif.allocate import Allocation, Curves
from layerif.allocate.allocation import COUNTS
from layerif.allocate.sparsity import TargetSparsity
from layerif.attribution.rows import OverLayers, RowInfluence, row_influence
from layerif.checks import Count, called_as_arguments, check_choice, check_value
from layerif.data.batches import LossOn, encode
from layerif.data.given import (
    GivenRows,
    check_apart,
    check_ids,
    check_tokenizer,
    examples_of,
)
from layerif.data.render import Template
from layerif.data.rows import AnyExample, TextExample, TokenExample
from layerif.data.task import Splits
from layerif.data.tokens import bos_of, token_ids
from layerif.data.windows import Bos, windows_of
from layerif.estimators import Estimator, estimator_of_scores
from layerif.estimators._base import CurveEstimator, InfluenceEstimator, check_whole_influence, name_of
from layerif.estimators.gain_curve import GainCurve, GainForm
from layerif.estimators.loss_curve import LossCurve
from layerif.in_memory import check_samples, num_embeddings, scorer_in_memory, store_at
from layerif.layers import MatrixOrBlock
from layerif.models.blocks import Scope, bare, blocks, context_length, device_of
from layerif.models.loaded import Loaded
from layerif.models.loss import Loss, NamedLoss
from layerif.models.stored import expert_tensors
from layerif.moe.lora import lora_targets
from layerif.probe.curves.measure import CurveForm
from layerif.probe.curves.request import hash_of_windows, model_hash
from layerif.probe.measurements import Measurements
from layerif.probe.settings import Probe
from layerif.profile import Profile
from layerif.progress import displayed
from layerif.progress import progress as shown_as_done
from layerif.pruning import Pruner, pruner_called
from layerif.pruning.source import check_source
from layerif.pruning.targets import targets
from layerif.pruning.walk import Walk

# The settings of the probe that are arguments here.
_PROBE = ("scope", "num_train", "num_validation", "max_length", "batch_size", "template", "loss_on", "memory_gb")


@called_as_arguments("probe", _PROBE)
def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    train: GivenRows,
    validation: GivenRows,
    *,
    estimator: str | Estimator = "datainf",
    scope: Scope = "attention",
    num_train: int | None = None,
    num_validation: int | None = None,
    max_length: int = 128,
    batch_size: int = 8,
    template: Template = "plain",
    loss: Loss | None = None,
    loss_on: LossOn | None = None,
    memory_gb: float | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    progress: bool = True,
) -> Profile:
    """Scores every decoder block of a loaded model for some rows, in one gradient pass.

    Rows are texts, or mappings with the columns of `layerif.data.rows` (`text`, `prompt` and `completion`, `messages`,
    `input_ids` and `labels`), or ready batches of `input_ids`, `attention_mask` and `labels`, as a DataLoader gives.

    Args:
        model: a causal language model of transformers, on any device, bare or wrapped by PEFT. It comes back as it was.
        tokenizer: the tokenizer of the model; None where all rows are token ids.
        train: the rows that the model learns from, or would.
        validation: the rows that it should do well on; none of them may be among `train`.
        estimator: the name of a file in `layerif/estimators`, or an estimator with settings of its own, as
            `DataInf(damping=0.01)`.
        scope: the matrices of a block that are measured: attention, mlp or all.
        num_train: use so many train rows, chosen by `seed`; None takes all.
        num_validation: use so many validation rows; None takes all.
        max_length: in tokens; longer rows are cut and counted.
        batch_size: the rows that the model sees at once; no result depends on it.
        template: the text around a `prompt`: plain, alpaca or chat.
        loss: `(model, batch) -> losses` of each sample (B), in place of the mean loss over tokens. A store keeps what
            is measured with it only if it is named, see `layerif.loss`.
        loss_on: the tokens that the loss counts, all or output; None: what the kind of row says.
        memory_gb: the memory to use beside the model and one batch; None: half of what is free (85 % on a GPU).
        seed: chooses the rows.
        store: a folder that keeps the measurement for the next call; None writes nothing.
        progress: show a bar.

    Raises:
        ValueError: names the row, setting or part of the model that cannot be used, and says what can.
    """
    scorer = scorer_in_memory(
        model,
        tokenizer,
        train,
        validation,
        estimator=estimator_of_scores(estimator),
        loss=loss,
        seed=seed,
        store=store,
        scope=scope,
        num_train=num_train,
        num_validation=num_validation,
        max_length=max_length,
        template=template,
        loss_on=loss_on,
        batch_size=batch_size,
        memory_gb=memory_gb,
    )
    with displayed("bar" if progress else "none"):
        scored, evidence = scorer.scored()
    assert scored.scores is not None
    return Profile(
        scores=scored.scores,
        layers=scorer.layers(),
        reliability=scored.reliability,
        num_samples=scored.num_samples,
        num_truncated=scored.num_truncated,
        max_length=max_length,
        notes=scored.notes,
        target_modules=tuple(lora_targets(bare(model))),
        expert_tensors=tuple(expert_tensors(bare(model))),
        seed=seed,
        estimator=scorer.estimator,  # type: ignore[arg-type]
        evidence=evidence,
    )


@called_as_arguments("probe", _PROBE)
def rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    train: GivenRows,
    validation: GivenRows,
    *,
    estimator: str | InfluenceEstimator = "datainf",
    over_layers: OverLayers = "sum",
    scope: Scope = "attention",
    num_train: int | None = None,
    num_validation: int | None = None,
    max_length: int = 128,
    batch_size: int = 8,
    template: Template = "plain",
    loss: Loss | None = None,
    loss_on: LossOn | None = None,
    memory_gb: float | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    progress: bool = True,
) -> RowInfluence:
    """Measures the influence of every train row on every validation row, in one gradient pass.

    Args:
        model: as for `score`.
        tokenizer: as for `score`.
        train: the rows whose influence is asked for; they are numbered, `train 0` and so on.
        validation: the rows whose loss they move; none of them may be among `train`.
        estimator: the name of an estimator of influence, or one with settings of its own, as `Exact(damping=0.01)`.
        over_layers: makes one order of all layers: sum, mean_rank or vote.
        scope: as for `score`, like all that follow.
        num_train: use so many train rows, chosen by `seed`; None takes all.
        num_validation: use so many validation rows; None takes all.
        max_length: in tokens; longer rows are cut.
        batch_size: the rows that the model sees at once; no result depends on it.
        template: the text around a `prompt`.
        loss: a loss of one's own, in place of the mean loss over tokens.
        loss_on: the tokens that the loss counts, all or output.
        memory_gb: the memory to use beside the model and one batch.
        seed: chooses the rows.
        store: a folder that keeps the measurement for the next call; None writes nothing.
        progress: show a bar.

    Raises:
        ValueError: names the row, setting or part of the model that cannot be used, and says what can.
    """
    check_value("over_layers", over_layers, OverLayers)
    chosen = estimator_of_scores(estimator)
    if not isinstance(chosen, InfluenceEstimator):
        raise ValueError(
            f"the estimator {type(chosen).__name__} tells no influence of single rows; use datainf, exact, lissa, "
            "grad_dot, cosine, kfac, ekfac or shampoo"
        )
    check_whole_influence(chosen)
    scorer = scorer_in_memory(
        model,
        tokenizer,
        train,
        validation,
        estimator=chosen,
        loss=loss,
        seed=seed,
        store=store,
        scope=scope,
        num_train=num_train,
        num_validation=num_validation,
        max_length=max_length,
        template=template,
        loss_on=loss_on,
        batch_size=batch_size,
        memory_gb=memory_gb,
    )
    with displayed("bar" if progress else "none"):
        scored, evidence = scorer.scored(needs=chosen.needs_of_rows)
    return row_influence(
        scorer, evidence, scorer.model.load, over_layers=over_layers, template=template, notes=scored.notes
    )


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    allocation_or_target: Allocation | Mapping[str, float] | float,
    *,
    calibration: GivenRows = (),
    pruner: str | Pruner = "wanda",
    num_windows: int | None = None,
    window: int = 256,
    batch_size: int = 4,
    seed: int = 0,
    bos: Bos = "tokenizer",
    progress: bool = True,
) -> PreTrainedModel:
    """Removes weights from the blocks of a loaded model, in place, and returns it.

    Args:
        model: a causal language model of transformers without an adapter, on any device.
        tokenizer: the tokenizer of the model; None where all rows are token ids.
        allocation_or_target: an allocation of sparsity (`Profile.sparsity`), sparsities by block or matrix, or one
            fraction for every matrix.
        calibration: rows as for `score`, laid end to end and cut into windows; magnitude without swaps needs none.
        pruner: magnitude, wanda or sparsegpt, or a pruner with settings of its own, as `Wanda(n=2, m=4)`
            or `Wanda(swaps=True)`.
        num_windows: use so many windows, chosen by `seed`; None takes all.
        window: the tokens of a window.
        batch_size: the windows that the model sees at once.
        seed: chooses the windows.
        bos: the windows that begin with BOS, which counts as one of the `window` tokens: each one where the tokenizer
            adds BOS to a text (tokenizer), the first of the text alone (first), or none. Rows that are not texts keep
            the BOS that each of them begins with.
        progress: show a bar.

    Raises:
        ValueError: names the row, setting, block or matrix that cannot be used, and says what can. The weights are as
            they were if it was raised before the first block was pruned, and a block is pruned whole or not at all.
    """
    loaded = Loaded(model)
    loaded.check()
    loaded.check_finite()
    check_tokenizer(tokenizer)
    check_value("batch_size", batch_size, Count)
    if loaded.adapter:
        raise ValueError("the model has an adapter of PEFT; merge it first: model = model.merge_and_unload()")
    chosen = pruner_called(pruner) if isinstance(pruner, str) else pruner
    aimed = targets(model, _sparsities(allocation_or_target, model), chosen)
    batches: Sequence[Tensor] = ()
    if chosen.needs_inputs:
        batches = _windows(model, tokenizer, calibration, num_windows, window, batch_size, seed, bos)
    _check_source(allocation_or_target, model, chosen, batches)
    walk = Walk(model, chosen, aimed, batches, None, device_of(model), "cpu")
    with displayed("bar" if progress else "none"):
        for index in shown_as_done(range(len(walk.blocks)), "pruning"):
            walk(index)
    return model


@called_as_arguments("probe", ("max_length", "batch_size", "memory_gb"))
def curves(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: GivenRows,
    *,
    kind: Literal["sparsity", "rank", "experts"] = "sparsity",
    pruner: str | Pruner = "wanda",
    rows: GivenRows | None = None,
    form: CurveForm | GainForm | None = None,
    granularity: MatrixOrBlock = "matrix",
    tokens: float = 0.45,
    r: int | None = None,
    r_max: int | None = None,
    target_modules: Sequence[str] | None = None,
    num_windows: int | None = None,
    window: int = 256,
    batch_size: int = 4,
    seed: int = 0,
    bos: Bos = "tokenizer",
    max_length: int = 128,
    memory_gb: float | None = None,
    store: str | Path | None = None,
    progress: bool = True,
) -> Curves:
    """Prices every sparsity of every matrix of a loaded model, or says what every rank gains, in one gradient pass.

    `curves(…).allocate(0.6)` gives the allocation of least predicted loss, which `prune` takes with the same pruner and
    the same calibration rows. `curves(…, kind="rank").allocate(budget)` spends parameters of an adapter on ranks.

    Args:
        model: a causal language model of transformers without an adapter, on any device. It comes back as it was.
        tokenizer: the tokenizer of the model; None where all rows are token ids.
        texts: the calibration rows, as `calibration` of `prune`: the pruner takes its statistics of their windows. For
            ranks and experts the rows that the adapter learns from.
        kind: what a level is.
        pruner: whose masks are priced: magnitude, wanda or sparsegpt, or a pruner with settings of its own.
        rows: the rows whose loss is watched, as for `score`; None: the windows of `texts`. Ranks and experts need them.
        form: `exact`, or `diagonal`, which costs less; for ranks and experts `first_order` or `preconditioned`. None:
            the first of them.
        granularity: a curve per matrix or per block.
        tokens: the share of the positions that is looked at, chosen by `seed`.
        num_windows: as for `prune`; give the same to both, and of the next four, too.
        window: the tokens of a window.
        batch_size: the windows that the model sees at once.
        r: the rank of an expert; None: 8.
        r_max: the highest rank of a matrix; None: as many as its rank, and 128 at most.
        target_modules: names of the linear layers that get an adapter; None: every linear layer of the blocks.
        seed: chooses windows and positions.
        bos: the windows that begin with BOS.
        max_length: of `rows`, in tokens.
        memory_gb: the memory to use beside the model and one batch; None: half of what is free (85 % on a GPU).
        store: a folder that keeps the curves for the next call; None writes nothing.
        progress: show a bar.

    Raises:
        ValueError: names the row, setting or matrix that cannot be used, and says what can.
    """
    check_choice("kind", kind, ("sparsity", *COUNTS))
    loaded = Loaded(model, is_hashed=True)
    loaded.check()
    check_tokenizer(tokenizer)
    check_value("batch_size", batch_size, Count)
    is_gain = kind in COUNTS
    of_sparsity = {
        "pruner": pruner != "wanda",
        "tokens": tokens != 0.45,
        "num_windows": num_windows,
        "window": window != 256,
    }
    of_gains = {"r": r, "r_max": r_max, "target_modules": target_modules}
    for name, is_given in (of_sparsity if is_gain else of_gains).items():
        if is_given:
            other = "sparsity" if is_gain else "rank"
            raise ValueError(f"{name} has no meaning for curves of kind={kind!r}; leave it out, or use kind={other!r}")
    if is_gain and rows is None:
        raise ValueError(f"kind={kind!r} needs the rows whose loss is watched, apart from those of texts; give rows=…")
    watched = () if rows is None else examples_of(rows, "rows")
    learned = examples_of(texts, "texts") if is_gain else ()
    if is_gain:
        check_apart(learned, watched)
    train, validation = (learned, watched) if is_gain else (watched, ())
    measurements = Measurements(
        model=loaded,
        tokenizer=tokenizer,
        splits=Splits(train=train, validation=validation, test=()),
        probe=Probe(
            num_train=max(len(train), 1),
            num_validation=max(len(validation), 1),
            max_length=max_length,
            batch_size=batch_size,
            memory_gb=memory_gb,
        ),
        store=store_at(store),
        seed=seed,
        device=device_of(model),
    )
    estimator: CurveEstimator
    if is_gain:
        settings: Any = {"kind": kind, "form": form or "first_order", "granularity": granularity, "seed": seed}
        estimator = GainCurve(r=r, r_max=r_max, target_modules=target_modules, **settings)
        request = estimator.needs
    else:
        chosen = pruner_called(pruner) if isinstance(pruner, str) else pruner
        exact: Any = form or "exact"
        estimator = LossCurve(pruner=chosen, form=exact, granularity=granularity, tokens=tokens, seed=seed)
        request = replace(
            estimator.needs,
            calibration=_GivenWindows(_windows(model, tokenizer, texts, num_windows, window, batch_size, seed, bos)),
            loss_texts={"windows": 1.0} if rows is None else {"task": 1.0},
        )
    request.check_weights(measurements, name_of(estimator))
    request.check(measurements)
    for part, samples in zip(("train", "validation"), measurements.samples(), strict=True):
        check_samples(measurements, part, samples)
    with displayed("bar" if progress else "none"):
        evidence: Any = request.take(measurements, loaded.load)[0]
        found = estimator.curves(evidence)
    assert isinstance(found, Curves)
    return found


def loss(name: str, *, version: int) -> Any:
    """Names a loss of one's own, so that a store keeps what is measured with it: `loss("mine", version=1)(function)`.

    Args:
        name: tells it from other losses.
        version: to raise whenever the function gives other values.
    """
    return lambda function: NamedLoss(name, version, function)


@dataclass(frozen=True)
class _GivenWindows:
    """Windows that are cut already, in the form in which a measurement asks for them."""

    given: Sequence[Tensor]

    def batches(self, tokenizer: Any, max_positions: int | None = None) -> list[Tensor]:
        return list(self.given)


def _windows(
    model: nn.Module,
    tokenizer: Any,
    rows: GivenRows,
    num_windows: int | None,
    window: int,
    batch_size: int,
    seed: int,
    bos: Bos,
) -> Sequence[Tensor]:
    """Cuts rows into calibration windows, as token ids (B×T each)."""
    check_value("bos", bos, Bos)
    ids = _calibration_ids(examples_of(rows, "calibration"), tokenizer, bos)
    lead = bos_of(tokenizer) if tokenizer is not None and bos == "tokenizer" else ()
    longest = context_length(model)
    if longest is not None and window > longest:
        raise ValueError(
            f"window={window} is too long: the model reads at most {longest} tokens; use window<={longest}"
        )
    windows = windows_of(ids, num_windows, window, seed=seed, what="the calibration rows", bos=lead)
    check_ids(max(max(each) for each in windows), "the calibration rows", num_embeddings(model))
    return torch.tensor(windows).split(batch_size)


def _check_source(given: Any, model: nn.Module, pruner: Pruner, windows: Sequence[Tensor]) -> None:
    """Refuses an allocation by curves of another model, pruner or calibration text."""
    if isinstance(given, Allocation) and given.source:
        here = {
            "model": model_hash(Loaded(model, is_hashed=True)),
            "pruner": pruner.called,
            "calibration": hash_of_windows(windows) if pruner.needs_inputs else "none",
        }
        check_source(given.source, here)


def _sparsities(given: Allocation | Mapping[str, float] | float, model: nn.Module) -> Mapping[str, float]:
    if isinstance(given, Allocation):
        if given.kind != "sparsity":
            raise ValueError(
                f"the allocation is of {given.kind}; pruning needs one of sparsity, as profile.sparsity(0.5)"
            )
        return given.by_name()
    if isinstance(given, Mapping):
        return given
    check_value("target", given, TargetSparsity)
    return dict.fromkeys(blocks(model), given)


def _calibration_ids(examples: Sequence[AnyExample], tokenizer: Any, bos: Bos) -> tuple[int, ...]:
    """Lays rows end to end; texts are joined by blank lines, as those of a calibration file are."""
    if tokenizer is not None and all(isinstance(each, TextExample) for each in examples):
        joined = "\n\n".join(each.text for each in examples if isinstance(each, TextExample))
        return token_ids(tokenizer, [joined], special=bos != "none")[0]
    has_eos = tokenizer is not None and tokenizer.eos_token_id is not None
    eos = has_eos and any(not isinstance(each, TokenExample) for each in examples)
    encodings = encode(examples, tokenizer, template="plain", max_length=None, loss_on="all", eos=eos)
    return tuple(token for sample in encodings for token in sample.input_ids)
