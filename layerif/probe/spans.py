"""The angles between the hidden states before and after spans of blocks: the evidence of `estimator=angular`.

Letters in shape suffixes: B windows of a batch, T tokens, V the real tokens of a batch, H hidden size, L blocks. Sums
are taken in float64 over real tokens alone, so that batch size and padding change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerif.allocate.spans import Spans
from layerif.models.blocks import blocks, device_of
from layerif.models.contexts import evaluating
from layerif.models.hooks import hooked
from layerif.probe.activations import read_batch
from layerif.probe.curves.request import WINDOWS, Windows, hash_of_windows, max_positions, model_hash
from layerif.probe.curves.text import LossText, windows_text
from layerif.probe.measurements import Load, Measurements
from layerif.probe.request import Request
from layerif.probe.store import MeasurementKind
from layerif.progress import progress
from layerif.versions import VERSIONS

SPANS: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("spans", "forward passes over windows")
_TOKENS = 128  # whose states are compared at once, in float64


@dataclass(frozen=True)
class SpanAngles(Request):
    """A request for the mean angle that every span of blocks turns the hidden state by; the first process takes it.

    Attributes:
        calibration: the windows that are read.
    """

    reads_windows: ClassVar[bool] = True

    calibration: Windows

    def check(self, measurements: Measurements) -> None:
        self.windows(measurements)

    def windows(self, measurements: Measurements) -> list[Tensor]:
        """Cuts the windows (B×T each)."""
        return self.calibration.batches(measurements.tokenizer, max_positions(measurements))

    def take(self, measurements: Measurements, load: Load) -> tuple[Spans, bool]:
        windows = self.windows(measurements)
        tensors, key, reused = measurements.by_the_first(
            SPANS,
            lambda: measure_spans(measurements.merged(load), windows_text(windows)),
            spans=VERSIONS["spans"],
            windows=hash_of_windows(windows),
        )
        source = {"model": model_hash(measurements.model), "text": WINDOWS}
        first, second = tensors["num_tokens"].tolist()
        return Spans(measurements.layers().names, tensors["angles"], (first, second), source, key), reused


def measure_spans(model: nn.Module, text: LossText) -> dict[str, Tensor]:
    """Sums (1/π)·arccos cos(x_l, x_k) over the tokens of each half of the samples, in one forward pass.

    Args:
        model: a causal language model; it is left as it was.
        text: the samples.

    Returns:
        `angles` (2×(L+1)×(L+1), float64), and `num_tokens` of each half (2).

    Raises:
        ValueError: names the block whose output is not finite.
    """
    found, device = blocks(model), device_of(model)
    angles = torch.zeros(2, len(found) + 1, len(found) + 1, dtype=torch.float64, device=device)
    num_tokens = torch.zeros(2, dtype=torch.long)
    with evaluating(model), torch.no_grad():
        for indices, batch in progress(text.batches, "spans"):
            mask_BT = batch["attention_mask"].bool().to(device)
            states: list[Tensor] = []
            with hooked(_noting(found, states, mask_BT), with_kwargs=True):
                read_batch(model, batch["input_ids"].to(device), mask_BT)
            is_second_B = torch.tensor([index % 2 for index in indices], device=device).bool()
            is_second_V = is_second_B[:, None].expand_as(mask_BT)[mask_BT]
            for half, is_in_V in enumerate((~is_second_V, is_second_V)):
                num_tokens[half] += int(is_in_V.sum())
                for places in is_in_V.nonzero()[:, 0].split(_TOKENS):
                    angles[half] += _angles(torch.stack([state_VH[places] for state_VH in states], dim=1))
    return {"angles": angles.cpu(), "num_tokens": num_tokens}


def _angles(states_VLH: Tensor) -> Tensor:
    """Sums the angle between any two states over the tokens, in units of π."""
    unit_VLH = nn.functional.normalize(states_VLH.double(), dim=-1)
    cosines_VLL = (unit_VLH @ unit_VLH.mT).clamp(-1, 1)  # rounding may exceed 1
    return cosines_VLL.arccos().sum(0).fill_diagonal_(0) / math.pi


def _noting(
    found: Mapping[str, nn.Module], states: list[Tensor], mask_BT: Tensor
) -> list[tuple[nn.Module, Callable[..., None]]]:
    """Pairs every block with the hook that appends its output, the first one with its input before it."""

    def hook(name: str, is_first: bool) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen = [args[0] if args else kwargs["hidden_states"]] if is_first else []
            seen.append(output[0] if isinstance(output, tuple) else output)
            for state in seen:
                states.append(state.reshape(*mask_BT.shape, -1)[mask_BT])
            if not bool(states[-1].isfinite().all()):
                raise ValueError(
                    f"the output of block {name} is not finite; look at the weights, or load the model in float32 "
                    "(model.dtype=float32)"
                )

        return look

    return [(block, hook(name, index == 0)) for index, (name, block) in enumerate(found.items())]
