"""The weights of a model: the files that hold them, and what loading found in these."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from layerif.files import hash_file, read_json
from layerif.models.blocks import blocks

_CONFIGS = {"config.json", "adapter_config.json"}


def hash_folder(folder: Path) -> str:
    """Computes the SHA-256 of the names and contents of the files that a model or an adapter is loaded from."""
    files = model_files(folder)
    if not files:
        raise ValueError(
            f"{str(folder)!r} holds no model files ({', '.join(sorted(_CONFIGS))}, *.safetensors); give a folder "
            "written by save_pretrained"
        )
    return hashlib.sha256("".join(f"{name}:{hash_file(folder / name)};" for name in files).encode()).hexdigest()


def model_files(folder: Path) -> list[str]:
    """Lists the configuration, the weights, the indices of shards and every file that one of these names.

    Args:
        folder: of a model or an adapter.

    Returns:
        The names relative to the folder, sorted.

    Raises:
        ValueError: a file is named that lies outside the folder.
    """
    found = {
        file.name
        for file in folder.glob("*")
        if file.name in _CONFIGS or file.suffix in {".safetensors", ".bin", ".gguf"} or _is_index(file.name)
    }
    unread = list(found)
    while unread:
        source = unread.pop()
        for name in _named_in(folder / source):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(
                    f"{str(folder / source)!r} names {name!r}, which lies outside the folder; a model's files belong "
                    "into its own folder: copy them there and name them relative to it"
                )
            name = PurePosixPath(name).as_posix()
            # An index whose files are not there is a leftover of another format, or loading says what is missing.
            if name not in found and (folder / name).is_file():
                found.add(name)
                unread.append(name)
    return sorted(found)


def refuse_incomplete(where: str, model: nn.Module, found: Mapping[str, Any]) -> None:
    """Refuses a model that is not the one in its files: transformers fills up with random weights and drops blocks.

    Args:
        where: the folder or the name of the model, for the message.
        model: as transformers loaded it, with its sizes from the configuration.
        found: what `from_pretrained` returns with `output_loading_info`.

    Raises:
        ValueError: a weight has another shape in the files, the files lack one, or they hold more blocks.
    """
    config = "config.json and weights belong to different models, or config.json was changed"
    if found["mismatched_keys"]:
        name, there, here = min(found["mismatched_keys"])
        raise ValueError(
            f"cannot load {where!r}: {name} is {tuple(there)} in the weights and {tuple(here)} by config.json; {config}"
        )
    # A buffer that is missing has the value that the model computes for it.
    weights = [name for name, _ in model.named_parameters()]
    if missing := [name for name in weights if name in found["missing_keys"]]:
        raise ValueError(
            f"cannot load {where!r}: {missing[0]} is not among its weights ({len(missing)} of {len(weights)} are "
            "missing), and random numbers would stand in its place; is the folder complete and that of a causal "
            "language model, and are the sizes in config.json those of its weights?"
        )
    if block := _unexpected_block(model, found["unexpected_keys"]):
        raise ValueError(
            f"cannot load {where!r}: its weights have the block {block}, and config.json says {len(blocks(model))} "
            f"blocks; {config}"
        )


def _is_index(name: str) -> bool:
    return name.endswith((".safetensors.index.json", ".bin.index.json"))


def _named_in(file: Path) -> list[str]:
    """Returns the files that an index of shards or a config.json tells transformers to load."""
    if file.name == "config.json":
        config = read_json(file, what="model configuration")
        named = config.get("transformers_weights") if isinstance(config, dict) else None
        return [named] if isinstance(named, str) else []
    if not _is_index(file.name):
        return []
    index = read_json(file, what="index of the weights")
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{str(file)!r} must hold the name of a file for each tensor in 'weight_map'; is it complete?")
    return sorted(set(shards.values()))


def _unexpected_block(model: nn.Module, keys: set[str]) -> str | None:
    """Names the first block among the tensors that the model has no place for; None where they belong to no block."""
    known = list(blocks(model))
    if not known:
        return None
    path = known[0].rpartition(".")[0]
    inner = path.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")  # weights of the model without its head
    numbers = [
        int(match[1]) for key in keys if (match := re.match(rf"(?:{re.escape(path)}|{re.escape(inner)})\.(\d+)\.", key))
    ]
    # Blocks that predict further tokens in training stand behind the others in some files, and no loss runs them.
    further = getattr(getattr(model, "config", None), "num_nextn_predict_layers", None) or 0
    number = min((number for number in numbers if number >= len(known) + further), default=None)
    return None if number is None else f"{path}.{number}"
