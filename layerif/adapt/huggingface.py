"""The callback that scores the layers before transformers' `Trainer`, or TRL's `SFTTrainer`, starts to train.

trainer.add_callback(layerif.AllocateCallback(trainer))
trainer.train()
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from layerif.adapt.adapters import Dropout, PlainLora, Scaling, plain_lora
from layerif.allocate.allocation import Allocation
from layerif.allocate.curves import Curves, Knapsack
from layerif.allocate.experts import Experts
from layerif.allocate.rank import Rank
from layerif.api import curves, score
from layerif.checks import Count, called_as_arguments, check_choice, check_fields, check_value, made, shown
from layerif.compat import trainer_collator
from layerif.estimators import Estimator
from layerif.estimators.gain_curve import GainCurve
from layerif.files import read_json, whole
from layerif.models.blocks import Scope, layer_map
from layerif.models.loaded import Loaded
from layerif.moe import LoraMoeConfig
from layerif.moe.lora import modules_of
from layerif.moe.model import linears_of_blocks
from layerif.profile import Profile
from layerif.scores import LayerScores

GAIN_CURVE = "gain_curve"
DECISION = "decision.json"  # beside the adapter of each checkpoint


class AllocateCallback(TrainerCallback):
    """Scores the layers of a trainer's model on the trainer's own rows, and puts an adapter by the scores on it.

    All of that happens when the callback is made, because a trainer that resumes reads its checkpoint, and one that
    starts makes its optimiser, before it calls any callback. Later the callback writes the decision into every
    checkpoint (`decision.json`).

    The rows are read as the trainer reads them: by its collator, without the columns that it removes. The validation
    rows are those of `eval_dataset`, or else train rows that are not among the train samples.

    Args:
        trainer: a `transformers.Trainer` or a trainer derived from it, such as TRL's `SFTTrainer`, with a model that
            has no adapter yet.
        kind: what the budget is spent on: `rank` (PEFT's LoRA) or `experts` (LoRA-MoE).
        budget: as for `Profile.rank` and `Profile.experts`; for `gain_curve` the parameters of the adapter.
        estimator: as for `layerif.score`, or `gain_curve`, which gives every matrix its own number.
        adapter: settings of the adapter: `scaling` (α/r) and `lora_dropout` of a LoRA, those of `LoraMoeConfig` for
            experts.
        allocator: settings of what spends the scores or curves, `layerif.allocate.rank.Rank`,
            `layerif.allocate.experts.Experts` or `layerif.allocate.curves.Knapsack`.
        target_modules: names of the linear layers that get an adapter; None: every linear layer of the blocks.
        scope: as for `layerif.score`.
        num_train: the train samples, chosen by `seed`.
        num_validation: the validation samples.
        max_length: in tokens; longer rows are cut. None: as long as the trainer's rows.
        batch_size: the rows that the model sees at once while it is scored.
        memory_gb: as for `layerif.score`.
        seed: chooses the rows, and the first weights of the adapter; None: the trainer's.
        store: as for `layerif.score`.
        resume_from_checkpoint: as for `train`, and to be given to both: the adapter is then that of the checkpoint, and
            nothing is measured.

    Attributes:
        profile: the scores; None for `gain_curve`, and after a resume.
        curves: the curves of `gain_curve`; None elsewhere.
        allocation: the rank, or the experts, of every block or matrix.

    Raises:
        ValueError: names the part of the trainer, the row or the setting that cannot be used, and says what can.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        kind: Literal["rank", "experts"] = "rank",
        budget: int | None = None,
        estimator: str | Estimator = "datainf",
        adapter: Mapping[str, Any] | None = None,
        allocator: Mapping[str, Any] | None = None,
        target_modules: Sequence[str] | None = None,
        scope: Scope = "attention",
        num_train: int = 300,
        num_validation: int = 50,
        max_length: int | None = None,
        batch_size: int = 8,
        memory_gb: float | None = None,
        seed: int | None = None,
        store: str | Path | None = None,
        resume_from_checkpoint: str | bool | None = None,
    ) -> None:
        check_choice("kind", kind, ("rank", "experts"))
        check_value("num_train", num_train, Count)
        check_value("num_validation", num_validation, Count)
        _check_trainer(trainer)
        seed = int(trainer.args.seed) if seed is None else seed
        self.profile: Profile | None = None
        self.curves: Curves | None = None
        self.allocation: Allocation | None = None
        model: Any = trainer.model
        if resume_from_checkpoint:
            config = self._resumed(trainer, resume_from_checkpoint)
        else:
            spent, settings = dict(allocator or {}), dict(adapter or {})
            _preview(model, kind, estimator, budget, spent, settings, target_modules, scope)
            train, validation = _rows(trainer, num_train, num_validation, seed)
            measured: dict[str, Any] = {
                "max_length": max_length or max(len(row["input_ids"]) for row in (*train, *validation)),
                "batch_size": batch_size,
                "memory_gb": memory_gb,
                "seed": seed,
                "store": store,
                "progress": not trainer.args.disable_tqdm,
            }
            if estimator == GAIN_CURVE:
                wanted = {"rows": validation, "kind": kind, "target_modules": target_modules}
                self.curves = curves(model, None, train, **wanted, **_rank_of_experts(kind, settings), **measured)
                self.allocation = self.curves.allocate(budget, **spent)
            else:
                self.profile = score(model, None, train, validation, estimator=estimator, scope=scope, **measured)
                for doubt in self.profile.warnings:
                    warnings.warn(f"the scores of the layers: {doubt}", RuntimeWarning, stacklevel=2)
                spend = self.profile.rank if kind == "rank" else self.profile.experts
                self.allocation = spend(budget, **spent)
            config = _config_of(model, self.allocation, target_modules, settings)
        _put_on(trainer, config, seed)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and self.allocation is not None:
            content: dict[str, Any] = {"allocation": self.allocation.to_dict()}
            if self.profile is not None:
                content |= {"scores": self.profile.scores.to_dict(), "reliability": self.profile.reliability}
            with whole(folder / DECISION) as unfinished:
                unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _resumed(self, trainer: Trainer, given: str | bool) -> PeftConfig:
        folder = get_last_checkpoint(str(trainer.args.output_dir)) if given is True else str(given)
        if folder is None or not Path(folder, "adapter_config.json").is_file():
            raise ValueError(
                f"resume_from_checkpoint={given!r}: there is no checkpoint with an adapter (adapter_config.json) in "
                f"{folder or trainer.args.output_dir!r}; give the folder of one, or leave resume_from_checkpoint out"
            )
        if (decision := Path(folder, DECISION)).is_file():
            content: Any = read_json(decision, what="decision")
            self.allocation = Allocation.from_dict(content["allocation"])
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        return config


def _check_trainer(trainer: Any) -> None:
    """Refuses a trainer whose model can get no adapter now."""
    if not isinstance(trainer, Trainer):
        raise ValueError(
            f"trainer is a {type(trainer).__name__}; give a transformers.Trainer or one derived from it, such as TRL's "
            "SFTTrainer (Lightning has layerif.adapt.callback.InfluenceCallback)"
        )
    if trainer.model_init is not None:
        raise ValueError("the trainer makes its model anew by model_init, without the adapter; give it a model instead")
    if isinstance(trainer.model, PeftModel) or getattr(trainer.model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the trainer's model has an adapter already, and the callback is to choose it; make the trainer with the "
            "bare model, without peft_config (a quantised one needs its adapter before: score it with layerif.score, "
            "and give the trainer get_peft_model(model, profile.lora_config()))"
        )
    if trainer.optimizer is not None:
        raise ValueError(
            "the trainer has an optimiser already, which knows no parameter of the adapter; leave optimizers out, or "
            "make the callback before the first train()"
        )


@called_as_arguments("method", ("target_modules",))
def _preview(
    model: Any,
    kind: Literal["rank", "experts"],
    estimator: Any,
    budget: int | None,
    spent: Mapping[str, Any],
    settings: Mapping[str, Any],
    target_modules: Sequence[str] | None,
    scope: Scope,
) -> None:
    """Refuses settings, a budget that cannot be spent, and an adapter that does not fit, before any pass over the rows.

    An allocation of equal scores, or equal curves, shows what the adapter will be like.
    """
    _refuse_decided("adapter", settings)
    _refuse_decided("allocator", spent)
    made(_OfLora if kind == "rank" else LoraMoeConfig, "adapter", **settings)
    if isinstance(target_modules, str) or not all(isinstance(each, str) for each in target_modules or ()):
        raise ValueError(
            f"target_modules={shown(target_modules)} is not allowed; allowed: a list of names of linear layers, as "
            "['q_proj', 'v_proj'], or None for all of the blocks"
        )
    every = Loaded(model).layers()
    every.only(target_modules, setting="target_modules")
    if estimator == GAIN_CURVE:
        made(Knapsack, "allocator", budget=budget, **spent)
        wanted = GainCurve(kind=kind, target_modules=target_modules, **_rank_of_experts(kind, settings))
        allocation = wanted.equal(every).allocate(budget, **spent)
    else:
        allocator: Any = made(Rank if kind == "rank" else Experts, "allocator", budget=budget, **spent)
        layers = layer_map(model, scope=scope, skip_unsupported=True)
        names = layers.each_matrix.names if getattr(allocator, "takes_matrices", False) else layers.names
        allocation = allocator(LayerScores(names, (1.0,) * len(names), "undertrained", "equal", "none"), layers)
    skeleton = _without_weights(model)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # the adapter itself gives them later
        get_peft_model(skeleton, _config_of(skeleton, allocation, target_modules, settings))


# Settings that the callback decides itself, or takes as arguments.
_DECIDED = {
    "adapter": {
        "target_modules": "it is an argument of its own: give target_modules=…",
        "exclude_modules": "the layers without an adapter follow from the allocation: give target_modules=…",
        "num_experts": "the scores decide it: give kind='experts' and budget=…",
        "task_type": "it is CAUSAL_LM: leave it out",
    },
    "allocator": {
        "budget": "it is an argument of its own: give budget=…",
        "target": "ranks and experts have no mean level: give budget=…",
    },
}


def _refuse_decided(called: str, given: Mapping[str, Any]) -> None:
    for name, why in _DECIDED[called].items():
        if name in given:
            raise ValueError(f"{called} holds {name}={shown(given[name])}, which is not allowed there; {why}")


def _rank_of_experts(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the rank of an expert that gain curves are priced with, which must be that of the adapter."""
    return {"r": settings["r"]} if kind == "experts" and "r" in settings else {}


def _without_weights(model: Any) -> Any:
    """Copies a model onto the meta device, without a copy of its weights."""
    own = (*model.parameters(), *model.buffers())
    empty = (torch.empty_like(each, device="meta") for each in own)
    memo: dict[int, Any] = {
        id(each): torch.nn.Parameter(other, requires_grad=False) if isinstance(each, torch.nn.Parameter) else other
        for each, other in zip(own, empty, strict=True)
    }
    return copy.deepcopy(model, memo)


def _put_on(trainer: Trainer, config: Any, seed: int) -> None:
    """Puts the adapter on the trainer's model, with the same first weights whatever was measured before."""
    model: Any = trainer.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = adapted


def _config_of(
    model: Any, allocation: Allocation, target_modules: Sequence[str] | None, settings: Mapping[str, Any]
) -> PeftConfig:
    """Configures an adapter by an allocation; a block or matrix that got nothing has no adapter."""
    counts = allocation.by_name()
    if allocation.kind == "rank":
        of_lora = vars(made(_OfLora, "adapter", **settings))
        return plain_lora(model, counts, target_modules=target_modules, **of_lora)
    return made(
        LoraMoeConfig,
        "adapter",
        num_experts={unit: count for unit, count in counts.items() if count},
        target_modules=list(target_modules or linears_of_blocks(model)),
        exclude_modules=modules_of([unit for unit, count in counts.items() if not count]),
        task_type="CAUSAL_LM",
        **settings,
    )


@dataclass(frozen=True, kw_only=True)
class _OfLora:
    """The settings of a LoRA beside its ranks, with the ranges and values that `method=lora` has."""

    scaling: Scaling = PlainLora.scaling
    lora_dropout: Dropout = PlainLora.lora_dropout

    def __post_init__(self) -> None:
        check_fields(self, "adapter")


def _rows(trainer: Trainer, num_train: int, num_validation: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Gives the train and validation samples as token ids with labels."""
    held_out: Any = trainer.eval_dataset
    if held_out is None:
        both = _chosen(trainer.train_dataset, "train_dataset", num_train + num_validation, seed)
        if len(both) < 2:
            raise ValueError("train_dataset has fewer than 2 rows, and there is no eval_dataset; give more rows")
        num_held_out = min(num_validation, len(both) // 2)
        # The choice is in a random order, so that its end is a random part of it.
        train, validation = both[:-num_held_out], both[-num_held_out:]
    else:
        train = _chosen(trainer.train_dataset, "train_dataset", num_train, seed)
        if isinstance(held_out, dict):
            raise ValueError(
                f"eval_dataset holds {len(held_out)} data sets ({', '.join(map(str, held_out))}); layers are scored "
                "for one: make the callback while trainer.eval_dataset is the one, and set the others afterwards"
            )
        validation = _chosen(held_out, "eval_dataset", num_validation, seed)
    collate = trainer_collator(trainer)
    return _read(collate, train, "train_dataset"), _read(collate, validation, "eval_dataset")


def _chosen(dataset: Any, name: str, number: int, seed: int) -> list[Any]:
    """Takes rows in a random order; the first ones of a data set that is only read from its beginning."""
    if dataset is None:
        raise ValueError(f"the trainer has no {name}; layers are scored on its rows, so give it one")
    if not hasattr(dataset, "__len__"):
        return list(islice(dataset, number))
    order = list(range(len(dataset)))
    Random(f"{seed} {name}").shuffle(order)
    return [dataset[index] for index in order[:number]]


def _read(collate: Any, rows: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """Reads rows as the trainer does, one by one."""
    found = []
    for number, row in enumerate(rows):
        batch = dict(collate([row]))
        if unknown := sorted({*batch} - {"input_ids", "attention_mask", "labels"}):
            raise ValueError(
                f"the trainer's collator gives {', '.join(unknown)} for row {number} of the choice from {name}, and "
                "only input_ids, attention_mask and labels are understood; packed rows hold several texts, so score "
                "the texts themselves with layerif.score, and give the trainer the adapted model"
            )
        if missing := sorted({"input_ids", "labels"} - {*batch}):
            raise ValueError(
                f"the trainer's collator gives no {' and no '.join(missing)} for rows of {name}; use one that does, as "
                "transformers' DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        ids, labels = (torch.as_tensor(batch[part])[0] for part in ("input_ids", "labels"))
        mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids)[None]))[0].bool()
        found.append({"input_ids": ids[mask].tolist(), "labels": labels[mask].tolist()})
    return found
