"""The norms of what every expert adds to the hidden state: the evidence of `estimator=expert_output`.

Letters in shape suffixes: T tokens of a batch, K experts a token is sent to, R tokens that are sent to one expert, H
hidden size, L experts of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerif.allocate.curves import sizes_of
from layerif.evidence import LayerExperts
from layerif.models.blocks import device_of, linear_at
from layerif.models.contexts import evaluating, full_precision
from layerif.models.hooks import hooked
from layerif.models.stored import Stored, norm_behind
from layerif.probe.curves.request import Windows, hash_of_windows, max_positions
from layerif.probe.measurements import Load, Measurements
from layerif.probe.request import Request
from layerif.probe.store import MeasurementKind
from layerif.progress import progress
from layerif.versions import VERSIONS

EXPERT_OUTPUTS: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("expert_outputs", "passes over experts")


@dataclass(frozen=True)
class ExpertOutputs(Request):
    """A request for the norms of what every expert adds; the first process takes it alone.

    Attributes:
        calibration: the windows that are read.
    """

    reads_windows: ClassVar[bool] = True
    keeps_experts: ClassVar[bool] = True

    calibration: Windows

    def check(self, measurements: Measurements) -> None:
        sizes_of(measurements.layers(), "expert")
        self.windows(measurements)

    def windows(self, measurements: Measurements) -> list[Tensor]:
        """Cuts the windows (B×T each)."""
        return self.calibration.batches(measurements.tokenizer, max_positions(measurements))

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerExperts, bool]:
        windows, experts = self.windows(measurements), measurements.layers().each_expert
        tensors, key, reused = measurements.by_the_first(
            EXPERT_OUTPUTS,
            lambda: expert_outputs(measurements.merged(load), experts.names, windows),
            expert_outputs=VERSIONS["expert_outputs"],
            windows=hash_of_windows(windows),
        )
        num_tokens = sum(each.numel() for each in windows)
        return LayerExperts(experts, tensors["sums"], tensors["counts"], num_tokens, key), reused


def expert_outputs(model: nn.Module, experts: Sequence[str], windows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Sums g·‖f‖₂ over the tokens that are sent to each expert, and counts these tokens, in one forward pass.

    Args:
        model: a causal language model; it is left as it was.
        experts: their names, such as `model.layers.0.mlp.experts.3`.
        windows: token ids (B×T each).

    Returns:
        `sums` (L, float64) and `counts` (L).

    Raises:
        ValueError: names an expert whose output is not finite.
    """
    sums_L = torch.zeros(len(experts), dtype=torch.float64)
    counts_L = torch.zeros(len(experts), dtype=torch.long)
    routing: dict[nn.Module, tuple[Tensor, ...]] = {}  # by the module of fused experts, what it was called with

    def of_experts(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        routing[module] = (*args, *kwargs.values())[1:]

    def of_output(number: int, linear: Stored) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor, Tensor], kwargs: Any, output_RH: Tensor) -> None:
            norm = norm_behind(linear)
            norm_R = (output_RH if norm is None else norm(output_RH)).double().norm(dim=1)
            if len(routing[linear.holder]) == 2:
                index_TK, weights_TK = routing[linear.holder]
                is_its_RK = index_TK[args[1]] == linear.expert
                norm_R = norm_R * (weights_TK[args[1]].double() * is_its_RK).sum(1)
            sums_L[number] += norm_R.sum().cpu()  # Llama 4 weighs what its experts are given instead
            counts_L[number] += len(norm_R)

        return look

    linears: list[Stored] = []
    for name in experts:
        linear = linear_at(model, f"{name}.down_proj")
        assert isinstance(linear, Stored)
        linears.append(linear)
    of_outputs = [(linear, of_output(number, linear)) for number, linear in enumerate(linears)]
    calls = [(holder, of_experts) for holder in dict.fromkeys(linear.holder for linear in linears)]
    with evaluating(model), torch.no_grad(), full_precision():
        for ids_BT in progress(windows, "experts"):
            with hooked(of_outputs, with_kwargs=True), hooked(calls, before=True, with_kwargs=True):
                model(input_ids=ids_BT.to(device_of(model)), use_cache=False, logits_to_keep=1)
    if not bool(sums_L.isfinite().all()):
        name = experts[int((~sums_L.isfinite()).nonzero()[0])]
        raise ValueError(
            f"the output of {name} is not finite; look at the weights, or load the model in float32 "
            "(model.dtype=float32)"
        )
    return {"sums": sums_L, "counts": counts_L}
