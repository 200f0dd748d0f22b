"""What layerif does with every family of models: found by doing it on a tiny random one, and kept in docs/.

`python -m tests.support` writes the table of docs/reference/families.md anew.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

import layerif
from layerif.compress.drop import check_droppable, drop
from layerif.models.blocks import blocks, layer_map
from layerif.models.loss import per_sample_loss
from tests import families
from tests.tiny import FAMILIES, FURTHER, tiny_model, tiny_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "families.md"
NAMES = {
    "llama": "Llama", "mistral": "Mistral", "gemma": "Gemma", "gemma2": "Gemma 2", "gemma3_text": "Gemma 3 (text)",
    "gemma3": "Gemma 3 (text and images)", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi-3", "opt": "OPT",
    "gpt_neox": "GPT-NeoX", "gpt2": "GPT-2", "falcon": "Falcon", "qwen2_vl": "Qwen2-VL", "qwen3_vl": "Qwen3-VL",
    "mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE", "olmoe": "OLMoE", "gpt_oss": "gpt-oss",
    "deepseek_v3": "DeepSeek-V3", "llama4_text": "Llama 4", "qwen3_next": "Qwen3-Next", "jamba": "Jamba",
    "mamba": "Mamba",
}  # fmt: skip
TEXTS = [f"Question {number}: What is the capital of France? Answer: Paris {number * 7}." for number in range(12)]
HEADER = ["family", "scores", "curves", "prune", "rank", "LoRA-MoE", "drop"]


def model_of(family: str) -> Any:
    if family in families.CONFIGS and family != "mixtral":
        return families.model_of(family)
    assert family in FAMILIES | FURTHER
    return families.model_of(family) if family == "mixtral" else tiny_model(family, num_hidden_layers=2)


def row(family: str) -> list[str]:
    """Finds what layerif does with a family, in the order of `HEADER`. Anything but a ValueError is a failure."""
    model, tokenizer = model_of(family), tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        profile = layerif.score(
            model, tokenizer, TEXTS[:3], TEXTS[3:5], scope="all", estimator="grad_dot", max_length=24, progress=False
        )
        assert all(value > 0 for value in profile.scores.values)
        has_experts = bool(profile.layers.each_expert.names)
        each = "yes, each expert" if has_experts else "yes"
        done = [
            each,
            said(lambda: _curves(model, tokenizer, each)),
            said(lambda: _pruned(model, tokenizer, each)),
            said(lambda: _ranks(model, profile, has_experts)),
            said(lambda: _moe(model, profile, has_experts)),
            said(lambda: _drop(model, has_experts)),
        ]
    return [NAMES[family], *done]


def said(work: Callable[[], str]) -> str:
    try:
        return work()
    except ValueError as error:
        return f"refused: {str(error).partition(';')[0]}"


def _curves(model: Any, tokenizer: Any, each: str) -> str:
    found = layerif.curves(model, tokenizer, TEXTS, pruner="magnitude", window=24, num_windows=4, progress=False)
    assert bool((found.costs[:, 1:].sum(0) > 0).all())
    return each


def _pruned(model: Any, tokenizer: Any, each: str) -> str:
    pruned, params = copy.deepcopy(model), layer_map(model, scope="all").matrices
    # Experts that no token of a tiny text reaches would be refused by name.
    layerif.prune(pruned, tokenizer, 0.5, calibration=TEXTS * 8, pruner="wanda", window=48, progress=False)
    numel = sum(layer_map(model, scope="all").numel)
    zeros = sum(int((parameter == 0).sum()) for parameter in pruned.parameters())
    assert abs(zeros - numel / 2) <= len(params)
    return each


def _ranks(model: Any, profile: Any, has_experts: bool) -> str:
    _trains(get_peft_model(copy.deepcopy(model), profile.lora_config(4)), "lora_B")
    if not has_experts:
        return "yes"
    _trains(get_peft_model(copy.deepcopy(model), profile.lora_config(4, experts=True, lora_dropout=0)), "lora_B")
    return "yes, experts if asked for"


def _moe(model: Any, profile: Any, has_experts: bool) -> str:
    _trains(get_peft_model(copy.deepcopy(model), profile.moe_config(4)), "lora_moe_B")
    return "yes, experts left alone" if has_experts else "yes"


def _trains(model: Any, factor: str) -> None:
    """Checks that every adapter has an effect: the second factor, which is zero at first, gets a gradient."""
    ids = torch.arange(3, 99).view(2, 48)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    per_sample_loss(model, batch).sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if f".{factor}." in name}
    assert found
    assert all(each is not None and bool(each.any()) for each in found.values()), found.keys()


def _drop(model: Any, has_experts: bool) -> str:
    first = said(lambda: _dropped(model, [next(iter(blocks(model)))], "blocks"))
    if not has_experts:
        return first
    by_block: dict[str, str] = {}
    for name in layer_map(model, scope="all").each_expert.names:
        by_block.setdefault(name.rpartition(".")[0], name)
    second = said(lambda: _dropped(model, list(by_block.values()), "experts"))
    return f"{first}, {second}" if first == "blocks" else f"{second}, blocks {first}"


def _dropped(model: Any, units: list[str], what: str) -> str:
    smaller = copy.deepcopy(model)
    check_droppable(smaller, units)
    drop(smaller, units)
    with torch.no_grad():
        assert bool(smaller(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all())
    return what


def table_of(page: str) -> dict[str, list[str]]:
    """Reads the rows of the page by family."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {line[0]: line for line in lines}


def main() -> None:
    rows = [HEADER, ["---"] * len(HEADER), *(row(family) for family in NAMES)]
    lines = iter(PAGE.read_text().splitlines())
    kept = [line for line in lines if not line.startswith("|")]
    at = kept.index("<!-- python -m tests.support -->") + 1
    table = ["", *(f"| {' | '.join(cells)} |" for cells in rows), ""]
    after = kept[at:]
    while after and not after[0]:
        after.pop(0)
    PAGE.write_text("\n".join([*kept[:at], *table, *after]) + "\n")


if __name__ == "__main__":
    main()
