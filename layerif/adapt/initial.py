"""The first weights of a LoRA that PEFT takes from train rows: EVA and LoRA-GA.

EVA (Paischer et al., 2024) sets A to the main directions of each matrix's inputs, and moves ranks to the matrices whose
inputs they explain best. LoRA-GA (Wang et al., 2024) sets A and B to directions of the mean gradient, and takes B·A out
of the matrix, so that the model starts unchanged. Both are PEFT's own code; a run adds what it needs to resume and to
be written for an untouched base.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    get_eva_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import save_file
from torch import Tensor, nn

from layerif.adapt.sizes import Capacity, Shapes, adapted_shapes, capacity_of, names_of
from layerif.data.batches import Encoded
from layerif.data.rows import IGNORED
from layerif.models.blocks import device_of
from layerif.models.loss import per_sample_loss, positions_of
from layerif.moe.lora import lora_targets

Initial = Literal["default", "gradient", "eva", "lora_ga"]
Batch = Mapping[str, Tensor]

GRADIENT_ROWS = 128  # train rows behind LoRA-GA's mean gradient; all where there are fewer
EVA_TOKENS = 8192  # a batch's tokens: directions settle after few large batches, and after two if there is one
_MOST_BATCHES = 1000
_PASSES = 4  # EVA's, to move ranks and keep the number of parameters
_NEAR = 0.0025  # a share of the parameters: a redistribution that comes so near to their number is taken at once
_NAME = "default"  # the name of PEFT's adapter
_TAKEN_OUT = "taken_out."  # prefix of the first weights in a checkpoint, where the base is without them


def check_initial(
    init: Initial, rho: float, shapes: Shapes, capacities: Mapping[str, Capacity], rows: Sequence[Encoded]
) -> None:
    """Refuses ranks that the directions or the train rows do not suffice for, before any work.

    Args:
        init: the kind of first weights.
        rho: EVA's highest rank of a matrix, as a multiple of the one that the allocation gives it.
        shapes: of the layers with an adapter.
        capacities: the rank by block or matrix.
        rows: the train rows.

    Raises:
        ValueError: names the layer or the setting.
    """
    if init not in ("eva", "lora_ga"):
        return
    most = 0
    for block, layers in shapes.items():
        for name, sides in layers.items():
            rank = capacity_of(capacities, block, name).rank
            needed = _num_directions(init, rho, rank)
            most = max(most, needed)
            if needed > min(sides):
                what = f"method.rho={rho:g}" if init == "eva" else "method.init=lora_ga, which takes two for each rank,"
                raise ValueError(
                    f"a rank of {rank} with {what} asks for {needed} directions of "
                    f"{block}.{name}, which has {min(sides)}; lower allocator.budget"
                    f"{' or method.rho' * (init == 'eva')}, or use method.init=default"
                )
    counted, least = _counted(rows), 2 * most
    if init == "eva" and counted < least:
        raise ValueError(
            f"method.init=eva needs {least} tokens that the loss counts, and the {len(rows)} train rows "
            f"have {counted}; lower allocator.budget or method.rho, or use data.loss_on=all"
        )


def start_eva(model: Any, rows: Sequence[Encoded], collate: Callable[[Sequence[Any]], Batch], *, rho: float) -> None:
    """Sets every A to the main directions of its matrix's inputs, with ranks that explain most, by PEFT's EVA.

    PEFT keeps the sum of the ranks. A rank of another shape has another size, so the sum is changed until the
    parameters are as many as before, as nearly as a few passes find it.

    Args:
        model: a PEFT model with plain LoRA; it is changed in its place.
        rows: train rows in the order that they are read.
        collate: turns some of them into a batch.
        rho: the highest rank of a matrix, as a multiple of its own.
    """
    config, layers = model.peft_config[_NAME], dict(lora_layers(model))
    wanted = sum(layer.r[_NAME] * _size(layer) for layer in layers.values())
    num_ranks, found = sum(layer.r[_NAME] for layer in layers.values()), {}
    with _as_eva(config, rho), _quiet():
        for _ in range(_PASSES):
            tried = copy.copy(config)
            tried.rank_pattern = _changed(layers, num_ranks)
            # PEFT would wait for ever for a batch with as many tokens as directions.
            batches = _with_tokens(rows, collate, round(rho * max(tried.rank_pattern.values())))
            directions = get_eva_state_dict(
                model, batches, tried, forward_fn=_Forward(), gather_distributed_inputs=False, show_progress_bar=False
            )
            size = sum(len(of) * _size(layers[name]) for name, of in directions.items())
            found[abs(size / wanted - 1)] = directions
            if min(found) < _NEAR:
                break
            num_ranks = round(num_ranks * wanted / size)
        initialize_lora_eva_weights(model, eva_state_dict=dict(found[min(found)]))


def start_lora_ga(model: Any, configured: Callable[[nn.Module], LoraConfig], batches: Sequence[Batch]) -> Any:
    """Sets every A and B to directions of the mean gradient, by PEFT's LoRA-GA with its own settings.

    Args:
        model: a PEFT model with plain LoRA; it is taken apart.
        configured: gives the configuration of that LoRA for the bare base.
        batches: train rows.

    Returns:
        The model with the new first weights, and the base without them.
    """
    base = model.unload()
    config = configured(base)
    with_gradients = copy.copy(config)
    with_gradients.lora_ga_config = LoraGAConfig()

    def look() -> None:
        for batch in batches:
            per_sample_loss(base, {name: each.to(device_of(base)) for name, each in batch.items()}).mean().backward()

    with _quiet():
        preprocess_loraga(base, with_gradients, look)
    model = get_peft_model(base, config)
    for _, layer in lora_layers(model):
        weight = layer.get_base_layer().weight
        before = weight.data
        with torch.no_grad():
            layer.lora_ga_init(_NAME, with_gradients.lora_ga_config)
        weight.data = before  # PEFT's own difference has other bits than the one that a resumed run can make
    take_out(model, {name: value.clone() for name, value in get_peft_model_state_dict(model).items()})
    return model


def take_out(model: Any, first: Mapping[str, Tensor]) -> None:
    """Takes scaling·B·A of the first weights out of the base, in place of others that were taken out before."""
    before = taken_out(model)
    if before.keys() == first.keys() and all(torch.equal(before[name].cpu(), first[name].cpu()) for name in first):
        return
    with torch.no_grad():
        for name, layer in lora_layers(model):
            weight = layer.get_base_layer().weight
            for sign, weights in ((1, before), (-1, first)):
                if weights:
                    a, b = (weights[f"{name}.{part}.weight"].to(weight.device) for part in ("lora_A", "lora_B"))
                    weight.data += sign * (layer.scaling[_NAME] * (b.float() @ a.float())).to(weight.dtype)
    model.taken_out = dict(first)


def taken_out(model: nn.Module) -> dict[str, Tensor]:
    """Gives the first weights that the base is without; empty where it is whole."""
    return getattr(model, "taken_out", {})


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of the adapter, and the first ones where the base is without them."""
    first = {f"{_TAKEN_OUT}{name}": value for name, value in taken_out(model).items()}
    return get_peft_model_state_dict(model) | first


def restore_weights(model: Any, weights: Mapping[str, Tensor], init: Initial) -> None:
    """Puts back the weights that `trained_weights` returned: the ranks of matrices, the base, then the adapter."""
    first = {name.removeprefix(_TAKEN_OUT): value for name, value in weights.items() if name.startswith(_TAKEN_OUT)}
    own = {name: value for name, value in weights.items() if not name.startswith(_TAKEN_OUT)}
    if init == "eva":
        config = model.peft_config[_NAME]
        directions = {
            name: own.get(f"{name}.lora_A.weight", torch.empty(0, layer.in_features))
            for name, layer in lora_layers(model)
        }
        with _as_eva(config, 1.0), _quiet():
            initialize_lora_eva_weights(model, eva_state_dict=directions)
    if first:
        take_out(model, first)
    set_peft_model_state_dict(model, own)


def write_adapter(model: Any, folder: Path) -> None:
    """Writes the adapter for the untouched base.

    Where the base is without the first weights, PEFT writes an adapter of twice the rank: the difference to them.
    """
    first = taken_out(model)
    if not first:
        model.save_pretrained(folder)
        return
    with TemporaryDirectory() as place:
        before = Path(place) / "first"
        before.mkdir()
        save_file({name: value.contiguous() for name, value in first.items()}, before / "adapter_model.safetensors")
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(before))


def ranks_of(model: Any, targets: Sequence[str] | None) -> dict[str, int]:
    """Gives the rank of every matrix, by name; 0 for one that has lost its adapter.

    Args:
        model: a PEFT model with plain LoRA.
        targets: names of the layers that had an adapter at first; None: every linear layer of the blocks.
    """
    base = model.get_base_model()
    ranks = {name: layer.r[_NAME] for name, layer in lora_layers(base)}
    without = names_of(adapted_shapes(base, targets or lora_targets(base)))
    found = ranks | dict.fromkeys(without, 0)
    return {name: found[name] for name, _ in base.named_modules() if name in found}


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the layers of LoRA with their names in the PEFT model."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def _num_directions(init: Initial, rho: float, rank: int) -> int:
    return round(rho * rank) if init == "eva" else 2 * rank


def _counted(rows: Sequence[Encoded]) -> int:
    return sum(label != IGNORED for row in rows for label in row.labels)


def _with_tokens(rows: Sequence[Encoded], collate: Callable[[Sequence[Any]], Batch], num_tokens: int) -> list[Batch]:
    """Makes batches of EVA_TOKENS, or more for so many counted ones; a small one at the end joins the last."""
    groups: list[list[Encoded]] = [[]]
    for row in rows:
        if sum(map(len, groups[-1])) >= EVA_TOKENS and _counted(groups[-1]) >= num_tokens:
            groups.append([])
        groups[-1].append(row)
    if len(groups) > 1 and (sum(map(len, groups[-1])) < EVA_TOKENS / 2 or _counted(groups[-1]) < num_tokens):
        groups[-2:] = [groups[-2] + groups[-1]]
    return [dict(collate(group)) for group in groups]


def _changed(layers: Mapping[str, Any], num_ranks: int) -> dict[str, int]:
    """Gives the ranks with another sum: each changes by the same, the first ones by one more; none is below one."""
    more, rest = divmod(num_ranks - sum(layer.r[_NAME] for layer in layers.values()), len(layers))
    return {
        name: max(1, layer.r[_NAME] + more + (number < rest)) for number, (name, layer) in enumerate(layers.items())
    }


def _size(layer: Any) -> int:
    return layer.in_features + layer.out_features


class _Forward:
    """Runs the blocks alone, and ends a search that would not."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, model: Any, batch: Batch) -> None:
        self.times += 1
        if self.times > _MOST_BATCHES:
            raise ValueError(
                f"EVA's directions still change after {_MOST_BATCHES} batches of train rows; use a lower method.rho or "
                "allocator.budget, data.loss_on=all, or method.init=default"
            )
        mask = batch["attention_mask"]
        blocks = model.get_base_model().base_model
        blocks(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions_of(mask), use_cache=False)


@contextmanager
def _as_eva(config: Any, rho: float) -> Iterator[None]:
    """Calls the LoRA one of EVA, which PEFT's functions ask for; the adapter that is written is a plain one."""
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=rho)
    try:
        yield
    finally:
        config.init_lora_weights, config.eva_config = True, None


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out PEFT's and torch's remarks on hooks and memory, which no user can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(backward hook|low_cpu_mem_usage).*")
        yield
