"""A model that is in memory already, in the form in which measurements take a model."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from layerif.layers import LayerMap
from layerif.models.blocks import Scope, bare, blocks, device_of, layer_map, note_left_out
from layerif.models.memory import free_bytes
from layerif.models.quantised import scheme_in


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in memory. It stays as it is; what must change it works on a copy.

    Args:
        model: a causal language model of transformers, bare or wrapped by PEFT.
        is_hashed: True makes the fingerprint of all weights, which a store needs.
        converted_to: the type of the weights of the copy that is meant; None means the model itself.
    """

    model: nn.Module
    is_hashed: bool = False
    converted_to: str | None = None

    def check(self) -> None:
        """Refuses what is no loaded causal language model.

        Raises:
            ValueError: says what it is instead.
        """
        config = getattr(bare(self.model), "config", None) if isinstance(self.model, nn.Module) else None
        if config is None or not hasattr(self.model, "get_input_embeddings"):
            raise ValueError(
                f"the model is a {type(self.model).__name__}; give a causal language model of transformers, as from "
                "AutoModelForCausalLM.from_pretrained, bare or wrapped by PEFT"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"the model is a {type(bare(self.model)).__name__}, which has an encoder; give a decoder")
        model: Any = self.model
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"the model is a {type(bare(self.model)).__name__}, which has no head that predicts the next token; "
                "load it with AutoModelForCausalLM"
            )
        for name, tensor in self.model.named_parameters():
            if tensor.is_meta:
                raise ValueError(
                    f"the model is on the meta device: {name} has no values; load its weights, without device_map=meta "
                    "or offload"
                )

    def check_finite(self) -> None:
        """Refuses weights that are not finite.

        Raises:
            ValueError: names the first of them.
        """
        for name, tensor in self.model.named_parameters():
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{name} holds values that are not finite; load the model again, in float32 if it was converted"
                )

    def location(self) -> tuple[str, None]:
        """Returns a name to show, in place of a folder."""
        return type(bare(self.model)).__name__, None

    @property
    def dtype(self) -> str:
        """The type of the blocks' weights."""
        if self.converted_to:
            return self.converted_to
        block = next(iter(blocks(self.model).values()), self.model)
        dtype = next(block.parameters()).dtype
        if not dtype.is_floating_point:  # a quantised layer computes in the type of its inputs
            dtype = self.model.get_input_embeddings().weight.dtype  # type: ignore[operator, union-attr]
        return str(dtype).removeprefix("torch.")

    @cached_property
    def quantisation(self) -> str | None:
        """Names the way in which the weights are quantised; None where they are not."""
        return scheme_in(self.model)

    @property
    def has_dense_weights(self) -> bool:
        """Tells if the weights are there as they were before they were quantised."""
        return self.quantisation is None

    @property
    def adapter(self) -> str | None:
        """Tells that there is an adapter of PEFT; None where there is none."""
        return "in memory" if hasattr(self.model, "peft_config") else None

    @cached_property
    def _weights(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(_bytes(tensor))
        return digest.hexdigest()

    def fingerprint(self) -> dict[str, str]:
        """Returns everything about the model that changes a measurement."""
        weights = self._weights if self.is_hashed else "not hashed"
        found = {"weights": weights, "adapter": self._state_of_adapter(), "dtype": self.dtype, "config": self._config()}
        return found if self.quantisation is None else {**found, "quantised": self.quantisation}

    def _config(self) -> str:
        """Hashes the configuration, which decides how the weights are used (`rope_theta`, `sliding_window`)."""
        config: Any = bare(self.model).config
        unseen = ("_name_or_path", "transformers_version")
        content = {name: value for name, value in config.to_dict().items() if name not in unseen}
        return _hash_of(content)

    def _state_of_adapter(self) -> str:
        """Hashes what each layer of an adapter does with its weights; `none` where there is no adapter."""
        if self.adapter is None:
            return "none"
        parts = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
        return _hash_of(
            {
                name: {part: getattr(module, part, None) for part in parts}
                for name, module in self.model.named_modules()
                if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
            }
        )

    def layers(self) -> LayerMap:
        """Returns all blocks with all their linear layers, by the names that they have without an adapter."""
        found = layer_map(self.model, scope="all", skip_unsupported=True)
        bare_names = tuple(tuple(each.replace(".base_layer.", ".") for each in params) for params in found.params)
        return replace(found, params=bare_names)

    def left_out(self, scope: Scope) -> str | None:
        """Says which matrices of the blocks no measurement takes, see `note_left_out`."""
        return note_left_out(self.model, scope)

    def load(self) -> Any:
        """Returns the model itself, or a copy of it in another type.

        Raises:
            MemoryError: a copy is more than half of what is free.
        """
        if self.converted_to is None:
            return self.model
        dtype = getattr(torch, self.converted_to)
        needed = sum(each.numel() for each in self.model.parameters()) * dtype.itemsize
        free = free_bytes(device_of(self.model))
        if needed > free / 2:
            raise MemoryError(f"a copy in {self.converted_to} takes {needed / 1e9:.1f} GB; {free / 1e9:.1f} are free")
        return copy.deepcopy(self.model).to(dtype).eval()

    def copy(self) -> Any:
        """Returns a model that nobody else holds."""
        return copy.deepcopy(self.model) if self.converted_to is None else self.load()

    def in_dtype(self, dtype: str) -> Loaded:
        """Returns this model with weights of another type."""
        return replace(self, converted_to=dtype)

    def at(self, checkpoint: str) -> Loaded:
        """Refuses checkpoints: they are of a model in a folder."""
        raise ValueError(
            f"the checkpoint {checkpoint!r} cannot be measured for a model in memory; use the command line with "
            "model=local model.path=/folder"
        )


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
