"""A trained model or adapter in the forms that other programs read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from layerif.moe import LoraMoeConfig

_DOWN, _UP = "lora_A.weight", "lora_B.weight"


def write_plain_adapter(source: Path, folder: Path) -> LoraConfig:
    """Writes an adapter as plain LoRA of one rank r and one α, which every engine scales by the same α/r.

    SGLang takes tensors of the rank r alone, vLLM scales by the global α/r, and llama.cpp by α divided by the tensor's
    own rank: with one rank all three agree.

    Args:
        source: the folder of a LoRA with a rank per block, or of a LoRA-MoE of one expert each.
        folder: is there already.

    Returns:
        The configuration of PEFT.
    """
    given = PeftConfig.from_pretrained(str(source))
    weights = load_peft_weights(str(source), device="cpu")
    if isinstance(given, LoraMoeConfig):
        weights = {name.replace("lora_moe_", "lora_"): weight for name, weight in weights.items()}
    assert isinstance(given, LoraConfig | LoraMoeConfig)
    weights = of_one_rank(weights)
    rank = next(weight.shape[0] for name, weight in weights.items() if name.endswith(_DOWN))
    alpha = one_scaling(given) * rank
    targets = given.target_modules
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type] - any number will do
        lora_dropout=given.lora_dropout,
        target_modules=targets if isinstance(targets, str) else sorted(targets or ()),
        exclude_modules=given.exclude_modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=given.base_model_name_or_path,
        revision=given.revision,
        inference_mode=True,
    )
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return config


def one_scaling(config: LoraConfig | LoraMoeConfig) -> float:
    """Gives the α/r that all layers of an adapter have.

    Raises:
        ValueError: they have several.
    """
    scaling = config.lora_alpha / config.r
    if isinstance(config, LoraMoeConfig):
        return scaling
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    for key in {*ranks, *alphas}:
        own = alphas.get(key, config.lora_alpha) / ranks.get(key, config.r)
        if abs(own - scaling) > 1e-6 * scaling:
            raise ValueError(
                f"the adapter has α/r={own:g} for {key!r} and {scaling:g} elsewhere, and engines know one for all; use "
                "--to merged"
            )
    return scaling


def of_one_rank(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pads A (R × d_in) and B (d_out × R) of every layer with zeros to the largest rank, which leaves B·A as it is.

    Args:
        weights: by name, as PEFT saves them.
    """
    rank = max(weight.shape[0] for name, weight in weights.items() if name.endswith(_DOWN))
    found = {}
    for name, weight in weights.items():
        missing = rank - weight.shape[0 if name.endswith(_DOWN) else 1]
        sides = (0, 0, 0, missing) if name.endswith(_DOWN) else (0, missing)
        assert name.endswith((_DOWN, _UP)), name
        found[name] = torch.nn.functional.pad(weight, sides).contiguous()
    return found


def merged(model: Any) -> nn.Module:
    """Merges the adapter of a model into its weights, in place; a model without one stays as it is.

    Raises:
        ValueError: the adapter is on a head that shares its weight with the embedding, which would change, too.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    embedding = model.get_base_model().get_input_embeddings().weight
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.get_base_layer().weight is embedding:
            raise ValueError(
                f"the adapter is on {name}, which shares its weight with the embedding, and merging would change both; "
                "use --to peft"
            )
    return model.merge_and_unload()
