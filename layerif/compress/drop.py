"""Blocks, attention and MLP of blocks, or experts are left out of a loaded model.

A model that lost blocks, or as many experts in every block, is an ordinary one of its family: `save_pretrained` writes
it, and plain transformers loads it. One that lost parts of blocks exists in memory only, because no configuration can
describe it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerif.checks import did_you_mean, how_many
from layerif.compress.experts import expert_changes
from layerif.layers import block_of, depths, is_attention, is_whole_expert, within_block
from layerif.models.blocks import bare, blocks

_INDICES = ("layer_idx", "layer_id")  # the names that a module's number in the key-value cache has
_NUMBERS = ("moe_layers", "mlp_only_layers")  # lists of numbers of blocks in configurations
_FIRST = ("first_k_dense_replace",)  # the number of first blocks that are of another kind
_PLAIN = (bool, int, float, str, type(None))


def drop(model: nn.Module, units: Iterable[str]) -> None:
    """Leaves units out of a model, in place.

    The blocks that stay are numbered anew, and the configuration's lists with an entry for each block lose the entries
    of blocks that go.

    Args:
        model: a causal language model, with weights or without.
        units: the names of blocks, of the attention and the MLP of blocks, or of experts.

    Raises:
        ValueError: a unit is unknown, no block would stay, or the configuration cannot describe what is left.
    """
    for place, name, value in _changes(model, units):
        setattr(place, name, value)


@contextmanager
def without(model: nn.Module, units: Iterable[str]) -> Iterator[None]:
    """Leaves units out of a model while the context is open; afterwards it is as it was, also after an error."""
    changed = []
    try:
        for place, name, value in _changes(model, units):
            changed.append((place, name, getattr(place, name)))
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in reversed(changed):
            setattr(place, name, value)


def check_droppable(skeleton: nn.Module, units: Sequence[str]) -> None:
    """Refuses a model that would not be an ordinary one of its family without some blocks.

    Leaving out the first block moves every other one, so that it also shows settings that count blocks. Without parts
    of blocks no model is ordinary, and only their names are checked.

    Args:
        skeleton: the model without its weights; it is left as it was.
        units: the names of blocks, of parts of blocks or of experts, that would go.

    Raises:
        ValueError: names the model's kind, and what its configuration cannot say.
    """
    has_experts = any(map(is_whole_expert, units))
    has_parts = any(map(within_block, units)) and not has_experts
    for dropped in (units,) if has_parts or has_experts else ([next(iter(blocks(skeleton)))], units):
        with without(skeleton, dropped):
            if not has_parts:
                check_ordinary(skeleton)


def check_ordinary(model: nn.Module) -> None:
    """Refuses a model whose configuration builds another model than this one.

    Args:
        model: a causal language model, with weights or without.

    Raises:
        ValueError: names the kind of the model and the difference.
    """
    config = _config(model)
    try:
        with torch.device("meta"):
            built = type(bare(model))(type(config).from_dict(config.to_dict()))
    except Exception as error:  # transformers raises what it likes
        why = f"without them it cannot be built ({str(error).splitlines()[0]})"
        raise _cannot_be_filtered(config, why) from error
    ours, theirs = _description(bare(model)), _description(built)
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            why = f"without them it makes {name} {theirs.get(name)} where the model has {ours.get(name)}"
            raise _cannot_be_filtered(config, why)


def _config(model: nn.Module) -> Any:
    return bare(model).config


def _cannot_be_filtered(config: Any, why: str) -> ValueError:
    return ValueError(
        f"the configuration of a {config.model_type} model cannot be filtered: {why}; choose other units or "
        "another model, or allocator.unit=sublayer with method.save=false"
    )


def _description(model: nn.Module) -> dict[str, Any]:
    """Gives the shapes of all parameters, and the plain settings of all modules in blocks, by name."""
    found: dict[str, Any] = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for block_name, block in blocks(model).items():
        for name, module in block.named_modules():
            for key, value in vars(module).items():
                if not key.startswith("_") and key != "training" and isinstance(value, _PLAIN):
                    found[f"{block_name}.{name}.{key}".replace("..", ".")] = value
    return found


def _changes(model: nn.Module, units: Iterable[str]) -> list[tuple[Any, str, Any]]:
    """Lists the attributes that change if units are left out: the object, the name and the new value of each."""
    found, dropped = blocks(model), list(dict.fromkeys(units))
    if experts := [unit for unit in dropped if is_whole_expert(unit)]:
        if len(experts) < len(dropped):
            raise ValueError("experts cannot be left out together with other units; leave out one kind at a time")
        return expert_changes(bare(model), experts)
    gone = [unit for unit in dropped if unit in found]
    changes: list[tuple[Any, str, Any]] = [_stand_in(model, found, unit) for unit in dropped if unit not in found]
    if not gone:
        return changes
    if len(gone) == len(found):
        raise ValueError(f"a model of {how_many(len(found), 'block')} cannot lose all of them; keep one at least")
    stays = [name for name in found if name not in gone]
    holder, _, attribute = next(iter(found)).rpartition(".")[0].rpartition(".")
    changes.append((bare(model).get_submodule(holder), attribute, nn.ModuleList(found[name] for name in stays)))
    for number, name in enumerate(stays):
        for module in found[name].modules():
            changes += [(module, index, number) for index in _INDICES if isinstance(getattr(module, index, None), int)]
    numbers = depths(list(found))
    config = _config(model).get_text_config()
    new_numbers = {numbers[block]: number for number, block in enumerate(stays)}
    for name, value in config.to_dict().items():
        if name in _NUMBERS and isinstance(value, list | tuple):
            changes.append((config, name, [new_numbers[number] for number in value if number in new_numbers]))
        elif name in _FIRST and isinstance(value, int):
            changes.append((config, name, sum(number < value for number in new_numbers)))
        elif "layer" in name and isinstance(value, list | tuple) and len(value) == len(found):
            changes.append((config, name, [value[numbers[block]] for block in stays]))
    return [*changes, (config, "num_hidden_layers", len(stays))]


def _stand_in(model: nn.Module, found: dict[str, nn.Module], unit: str) -> tuple[nn.Module, str, nn.Module]:
    block, part = found.get(block_of(unit)), within_block(unit)
    children = {} if block is None else dict(block.named_children())
    if block is None or part not in children:
        known = [*found, *(f"{block_of(unit)}.{name}" for name in children)]
        raise ValueError(
            f"{unit!r} is not a block or a part of one that this model has{did_you_mean(unit, known)}; give names of "
            "blocks, or of their attention and MLP"
        )
    if not is_attention(part):
        return block, part, _NoMlp()
    index = next((number for name in _INDICES if isinstance(number := getattr(children[part], name, None), int)), None)
    return block, part, _NoAttention(index)


class _NoMlp(nn.Module):
    """Adds nothing to the hidden state in place of an MLP."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


class _NoAttention(nn.Module):
    """Adds nothing to the hidden state in place of an attention.

    It keeps one number per token in the key-value cache, because others read the number of tokens there.
    """

    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        hidden_BTH = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None and self.layer_idx is not None:
            count_B1T1 = hidden_BTH.new_zeros(len(hidden_BTH), 1, hidden_BTH.shape[1], 1)
            cache.update(count_B1T1, count_B1T1, self.layer_idx)
        return torch.zeros_like(hidden_BTH), None
