"""The model card of a hand-over: what the record of its run says, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from layerif.checks import is_number
from layerif.record.record import RunRecord
from layerif.record.text import inert, markdown, spelt


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that a run started from.

    Attributes:
        name: on the hub, or of its folder.
        is_on_hub: it can be loaded by its name.
        licence: as its own files name it; None where they do not.
        revision: None where there is none.
    """

    name: str
    is_on_hub: bool
    licence: str | None
    revision: str | None = None

    @property
    def place(self) -> str:
        """Gives what `from_pretrained` takes, for others than the machine of the run."""
        return self.name if self.is_on_hub else "/path/of/the/base/model"


def card(record: RunRecord, base: Base, form: str, *, name: str, remarks: Sequence[str] = ()) -> str:
    """Writes a model card in Markdown from recorded facts alone.

    Args:
        record: of the run.
        base: the model that it started from.
        form: one of `layerif.compress.outcome.EXPORTS`.
        name: the title.
        remarks: sentences on this form.
    """
    header = [f"base_model: {base.name}"] if base.is_on_hub else []
    header += [f"license: {base.licence}"] if base.licence else []
    header += [f"library_name: {_LIBRARIES[form]}"] if form in _LIBRARIES else []
    parts = [
        "\n".join(["---", *header, "---"]) if header else "",
        f"# {name}",
        markdown(pd.DataFrame(_facts(record, base), columns=["", "of the run"])),
        "## Result",
        markdown(pd.DataFrame(intervals(record.metrics), columns=["metric", "value", "95 % interval"])),
        "## How to load it",
        _loading(form, base),
        *remarks,
    ]
    if record.notes:
        parts += ["## Notes of the run", "\n".join(f"- {note}" for note in record.notes)]
    front, *page = parts
    return "\n\n".join(filter(None, [front, *map(_inert, page)])) + "\n"


_LIBRARIES = {"merged": "transformers", "peft": "peft", "gguf": "gguf"}


def _facts(record: RunRecord, base: Base) -> Iterator[tuple[str, str]]:
    """Yields what was done, each with its name."""
    yield "base model", base.name + (f" at {base.revision}" if base.revision else "")
    yield "licence of the base model", base.licence or "unknown"
    yield "method", record.choices.get("method", "unknown")
    decision = record.decision
    if decision is not None:
        is_measured = decision.scores is not None or decision.curves is not None
        groups = ["estimator"] * is_measured + ["allocator"] * (decision.source != "method.allocation")
        yield from ((group, record.choices[group]) for group in groups if group in record.choices)
        yield "decided by", decision.source
        given = decision.allocation
        yield f"budget of {given.kind}", spelt(given.budget)
    if "pruner" in record.choices and record.sparsity:
        yield "pruner", record.choices["pruner"]
    if record.recovery:
        yield "recovered by", str(record.recovery["method"])
    if "task" in record.config:
        yield "task", str(record.config["task"]["name"])
    yield from ((f"parameters, {what}", f"{number:,}") for what, number in record.parameters.items())
    yield "seed", str(record.seed)
    yield from ((package, record.versions[package]) for package in ("layerif",) if package in record.versions)


def intervals(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields each metric that is a number, with its value and its interval where it has one."""
    for name, value in metrics.items():
        metric, _, bound = name.rpartition("_")
        if not is_number(value) or (bound in ("low", "high") and metric in metrics):
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        yield name, spelt(value), "" if low is None or high is None else f"{spelt(low)} to {spelt(high)}"


def _inert(part: str) -> str:
    return part if part.startswith("```") else inert(part)


def _loading(form: str, base: Base) -> str:
    """Gives the code that loads a form; FOLDER is where the card lies."""
    if form == "merged":
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        )
    elif form == "peft":
        code = (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base.place}")\n'
            'model = PeftModel.from_pretrained(base, "FOLDER")'
        )
    elif form == "gguf":
        code = (
            "import torch\n"
            "from transformers import AutoModelForCausalLM, GgufConfig\n\n"
            "model = AutoModelForCausalLM.from_pretrained(\n"
            '    "FOLDER", gguf_file="model.gguf", dtype=torch.float32,\n'
            "    quantization_config=GgufConfig(dequantize=True),\n"
            ")"
        )
    elif form == "gguf-types":
        return (
            "`tensor_types.txt` names a type for each tensor of llama.cpp's own conversion of the base model:\n\n"
            "```sh\nllama-quantize --tensor-type-file tensor_types.txt BASE.gguf OUT.gguf Q8_0\n```"
        )
    else:
        return "`config_groups.json` is a `quantization_config` in the schema of compressed-tensors."
    return f"```python\n{code}\n```"
