"""The speed, the memory and the size of a model, so that a smaller one can stand beside the dense one.

Letters in shape suffixes: B prompts, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from layerif.checks import Count, check_fields
from layerif.models.blocks import context_length, device_of
from layerif.models.contexts import evaluating
from layerif.models.memory import PeakMemory
from layerif.models.weights import model_files


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The settings of a measurement of speed. Calling it measures a model.

    Attributes:
        prompt_tokens: the tokens of a prompt, which the model reads at once (prefill).
        new_tokens: the tokens that follow, one at a time (decoding).
        batch_size: the prompts that run side by side.
        repeats: the runs, after one to warm up; the median counts.
    """

    prompt_tokens: Annotated[int, Ge(2)] = 256
    new_tokens: Count = 32
    batch_size: Count = 1
    repeats: Count = 3

    def __post_init__(self) -> None:
        check_fields(self, "method.speed")

    def check(self, model: nn.Module) -> None:
        """Refuses more tokens than the model reads.

        Args:
            model: with weights or without.
        """
        longest, wanted = context_length(model), self.prompt_tokens + self.new_tokens
        if longest is not None and wanted > longest:
            raise ValueError(
                f"method.speed asks for {self.prompt_tokens} + {self.new_tokens} tokens, and the model reads at most "
                f"{longest}; lower method.speed.prompt_tokens or method.speed.new_tokens"
            )

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Measures a model on its device.

        Returns:
            `prefill_tokens_per_second` and `decode_tokens_per_second`, the medians over the runs, and `memory_bytes`:
            on CUDA the most that torch had allocated during the runs (`max_memory_allocated`), elsewhere the bytes of
            all parameters, buffers and keys and values in the cache at the end of a run.
        """
        device = device_of(model)
        num_ids = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(num_ids, (self.batch_size, self.prompt_tokens), generator=generator).to(device)
        prefills, decodes, cache = [], [], None
        peak = PeakMemory(device)
        with evaluating(model), torch.inference_mode():
            for number in range(self.repeats + 1):
                prefill, decode, cache = self._run(model, ids_BT)
                if number:
                    prefills.append(prefill)
                    decodes.append(decode)
        taken = weight_bytes(model, buffers=True) + sum(map(_bytes, _kept_in(cache)))
        return {
            "prefill_tokens_per_second": ids_BT.numel() / statistics.median(prefills),
            "decode_tokens_per_second": self.batch_size * self.new_tokens / statistics.median(decodes),
            # The main memory of the process would hold what was there before, such as the dense model.
            "memory_bytes": peak.bytes if peak.of == "cuda" else taken,
        }

    def _run(self, model: Any, ids_BT: Tensor) -> tuple[float, float, Any]:
        """Reads the prompts and continues them; gives the seconds of both, and the cache."""
        begun = _now(ids_BT.device)
        found = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1)
        read = _now(ids_BT.device)
        for _ in range(self.new_tokens):
            next_B1 = found.logits[:, -1:].argmax(-1)
            found = model(input_ids=next_B1, past_key_values=found.past_key_values, use_cache=True)
        return read - begun, _now(ids_BT.device) - read, found.past_key_values


def weight_bytes(model: nn.Module, *, buffers: bool = False) -> int:
    """Counts the bytes of all parameters, a tied one once, which `save_pretrained` writes.

    Args:
        model: any.
        buffers: count the buffers, too.
    """
    return sum(map(_bytes, [*model.parameters(), *(model.buffers() if buffers else ())]))


def folder_bytes(folder: Path) -> int:
    """Counts the bytes of the configuration and the weights in a folder of a model."""
    return sum((folder / name).stat().st_size for name in model_files(folder))


def _kept_in(cache: Any) -> Iterator[Tensor]:
    """Yields the tensors of a key-value cache."""
    for layer in getattr(cache, "layers", ()):
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor):
                yield tensor


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
