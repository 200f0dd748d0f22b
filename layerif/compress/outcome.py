"""The outcome of a finished run, and the forms of a hand-over that fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerif.checks import check_object
from layerif.files import read_json
from layerif.record.record import RunRecord

EXPORTS = ("merged", "peft", "gguf", "gguf-types", "compressor")
_ADAPTER = "adapter_config.json"
_OF_WHOLE_MODELS = ("full", "prune", "drop")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The things that a run left to hand over.

    Attributes:
        method: of the run, with its recovery.
        model: the folder of the whole model that it left, or on which its adapter stands; None: the run's own model.
        adapter: the folder of its adapter.
        settings: those in the adapter's own file.
        formats: the number format of each quantised matrix, by name.
        quantised: the way in which the base under the adapter was quantised; None where it was not.
    """

    method: str
    model: Path | None = None
    adapter: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    quantised: str | None = None

    @property
    def left(self) -> str:
        """Names what the run left."""
        if self.formats:
            return "number formats for its matrices"
        if self.adapter:
            return "an adapter" if self.model is None else f"an adapter on {self.model.name}/"
        return "nothing to hand over" if self.model is None else f"{self.model.name}/"

    @property
    def is_moe(self) -> bool:
        """Tells if the adapter is a LoRA-MoE, if only of one expert each."""
        return self.settings.get("peft_type") == "LORA_MOE"

    @property
    def has_routers(self) -> bool:
        """Tells if a layer of the adapter has more than one expert."""
        given = self.settings.get("num_experts", 1)
        return self.is_moe and max(given.values() if isinstance(given, Mapping) else [given]) > 1


def outcome_of(record: RunRecord, folder: Path) -> Outcome:
    """Finds what a run left.

    Args:
        record: of the run.
        folder: of the run.
    """
    method, recovery = record.choices.get("method", "unknown"), record.recovery.get("method")
    if record.formats:
        return Outcome(method=method, formats=record.formats)
    called = f"{method} and method.recover={recovery}" if recovery else method
    model, adapter = folder / ("recovered" if recovery == "lora" else "model"), folder / "adapter"
    has_model = (model / "config.json").is_file()
    # A folder may hold what an earlier run of another method left there.
    trains_adapter = recovery == "lora_moe" if recovery else method not in _OF_WHOLE_MODELS
    if trains_adapter and (adapter / _ADAPTER).is_file():
        found = check_object(read_json(adapter / _ADAPTER, what="adapter"), what=f"{adapter / _ADAPTER}")
        on = model if recovery and has_model else None
        from layerif.models.quantised import quantisation_beside  # imports torch, which `--help` must not

        scheme = quantisation_beside(adapter)
        quantised = None if scheme == "none" else scheme
        return Outcome(method=called, model=on, adapter=adapter, settings=found, quantised=quantised)
    return Outcome(method=called, model=model if has_model and not trains_adapter else None)


def refusals(outcome: Outcome) -> dict[str, str]:
    """Says why forms do not fit, by form. Whether a model can be written as GGUF depends on its kind, too."""
    if outcome.has_routers:
        why = "routers mix the experts of its LoRA, and none of vLLM, SGLang and llama.cpp serves that"
        return dict.fromkeys(EXPORTS, why)
    found = {}
    if outcome.formats:
        found["merged"] = "it chose number formats, which plain transformers does not store"
    elif outcome.model is None and outcome.adapter is None:
        found["merged"] = found["gguf"] = "it left neither a model nor an adapter"
    if outcome.adapter is None:
        found["peft"] = "it left no adapter"
    elif outcome.model is not None:
        found["peft"] = "its adapter stands on the model that the run left, which others do not have"
    elif outcome.settings.get("peft_type") == "ADALORA":
        found["peft"] = "AdaLoRA has a value of its own for each rank, which plain LoRA has not"
    elif outcome.settings.get("keep_zeros"):
        found["peft"] = "its adapter leaves the zeros of the weights below it alone, and plain LoRA fills them"
    if outcome.quantised:
        found["merged"] = found["gguf"] = (
            f"its adapter was trained on a quantised base ({outcome.quantised}), which merging would round anew"
        )
    if not outcome.formats:
        found["gguf-types"] = found["compressor"] = "it quantised nothing"
    return found


def check_form(form: str, outcome: Outcome, found: Mapping[str, str]) -> None:
    """Refuses a form that does not fit what a run left.

    Args:
        form: one of `EXPORTS`.
        outcome: what the run left.
        found: the reasons by form, see `refusals`.

    Raises:
        ValueError: gives the reason, and names the forms that fit.
    """
    if form not in found:
        return
    fitting = [other for other in EXPORTS if other not in found]
    if fitting:
        advice = f"use --to {' or --to '.join(fitting)}"
    elif outcome.has_routers:
        advice = "from Python, import layerif.moe, and PEFT loads the run's folder adapter/"
    else:
        advice = "give a run of method=lora, full, prune, drop or quantise that was saved (method.save=true)"
    raise ValueError(
        f"--to {form} does not fit this run of method={outcome.method}, which left {outcome.left}: {found[form]}; "
        f"{advice}"
    )
