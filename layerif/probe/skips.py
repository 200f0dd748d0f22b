"""The effect on the loss of leaving out a block or a part of it: the evidence of `estimator=skip_curve`.

Letters in shape suffixes: S windows, B windows of a batch, T tokens, H hidden size, U units, P all tokens of a batch, R
those that are sent to an expert. Sums are taken over real tokens alone, so that batch size and padding change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerif.allocate.curves import sizes_of
from layerif.evidence import LayerSkips
from layerif.layers import Unit, block_of, is_whole_expert, within_block
from layerif.models.blocks import bare, blocks, device_of, linear_at
from layerif.models.contexts import frozen, full_precision
from layerif.models.hooks import hooked
from layerif.models.loss import Loss, per_sample_loss
from layerif.models.stored import Stored, norm_behind
from layerif.probe.curves.request import WINDOWS, Windows, hash_of_windows, max_positions, model_hash
from layerif.probe.curves.text import LossText, windows_text
from layerif.probe.measurements import Load, Measurements
from layerif.probe.request import Request
from layerif.probe.store import MeasurementKind
from layerif.progress import progress
from layerif.versions import VERSIONS

SKIPS: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("skips", "skip passes")


@dataclass(frozen=True)
class Skips(Request):
    """A request for the predicted effect of leaving out each unit; the first process takes it alone.

    Attributes:
        calibration: the windows whose loss is watched.
        unit: whether blocks, their two parts or their experts are left out.
    """

    takes_loss: ClassVar[bool] = True
    reads_windows: ClassVar[bool] = True

    calibration: Windows
    unit: Unit = "block"

    def check(self, measurements: Measurements) -> None:
        sizes_of(measurements.layers(), self.unit)
        self.windows(measurements)

    def windows(self, measurements: Measurements) -> list[Tensor]:
        """Cuts the windows (B×T each)."""
        return self.calibration.batches(measurements.tokenizer, max_positions(measurements))

    def loss_text(self, measurements: Measurements) -> LossText:
        """Gives the windows as the samples whose loss is watched."""
        return windows_text(self.windows(measurements))

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerSkips, bool]:
        units, numel = sizes_of(measurements.layers(), self.unit)
        text = self.loss_text(measurements)
        tensors, key, reused = measurements.by_the_first(
            SKIPS,
            lambda: measure_skips(measurements.merged(load), units, text, measurements.loss or per_sample_loss),
            skips=VERSIONS["skips"],
            loss=measurements.loss_name,
            windows=hash_of_windows(self.windows(measurements)),
            units=list(units),
        )
        weights_S = text.weights
        is_second_S = torch.arange(len(weights_S)) % 2 > 0
        by_half = {
            name: torch.stack(
                [(weights_S * half)[:, None].mul(tensors[name]).sum(0) for half in (~is_second_S, is_second_S)]
            )
            for name in ("first", "second")
        }
        source = {"model": model_hash(measurements.model), "loss_text": WINDOWS}
        return LayerSkips(units, numel, self.unit, by_half["first"], by_half["second"], source, key), reused


def measure_skips(
    model: nn.Module, units: Sequence[str], loss_text: LossText, loss: Loss = per_sample_loss
) -> dict[str, Tensor]:
    """Measures z = −γᵀr at every token, in one gradient pass, and sums it up.

    r is what a unit adds to the hidden state: a block's output less its input, or the output of its attention or MLP,
    behind the norm that reads this output alone where there is one (Gemma 2 and 3). γ is the gradient of the sample's
    loss there. An expert's r is its output, behind the norm of experts where there is one (Muse Spark), and its γ holds
    the weight that the router gives it.

    Args:
        model: a causal language model; it is left as it was.
        units: the names of blocks, of the attention and the MLP of blocks, or of experts.
        loss_text: the samples.
        loss: gives the loss of each sample (B).

    Returns:
        `first`, Σ z over the tokens, and `second`, ½·T·Σ z² with T the tokens that the sample's loss counts (S×U each,
        float64).

    Raises:
        ValueError: names the sample and the unit where they are not finite.
    """
    shape, device = (len(loss_text.weights), len(units)), device_of(model)
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in ("first", "second")}
    counted_S = loss_text.counted()
    with frozen(model), full_precision():
        for indices, batch in progress(loss_text.batches, "skips"):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            mask_BT = batch["attention_mask"].bool()
            effects: dict[int, Tensor] = {}
            with hooked(_hooks(model, units, effects, mask_BT.numel()), with_kwargs=True), torch.enable_grad():
                loss(model, batch).sum().backward()
            for number, z_P in effects.items():
                z_BT = z_P.view_as(mask_BT).where(mask_BT, 0).cpu()
                sums["first"][indices, number] = z_BT.sum(1)
                sums["second"][indices, number] = 0.5 * counted_S[indices] * z_BT.square().sum(1)
    for found_SU in sums.values():
        if not bool(found_SU.isfinite().all()):
            sample, number = (~found_SU.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"the effect of leaving out {units[number]} is not finite on {loss_text.names[sample]}; look at the "
                "weights, or load the model in float32 (model.dtype=float32)"
            )
    return sums


def _hooks(
    model: nn.Module, units: Sequence[str], effects: dict[int, Tensor], num_tokens: int
) -> list[tuple[nn.Module | Stored, Callable[..., None]]]:
    """Pairs modules with the hooks that put z of each unit's tokens (P) into `effects`, by its number."""
    updates: dict[int, Tensor] = {}
    running: dict[nn.Module, tuple[int, Tensor]] = {}  # by the module of fused experts, the expert and its tokens

    def watch(number: int, update: Tensor, at: Tensor, places_R: Tensor | None = None) -> None:
        updates[number] = at

        def note(gradient: Tensor) -> None:
            if updates[number] is at:  # and no norm stands behind it
                z_R = _products(update, gradient)
                effects[number] = z_R if places_R is None else z_R.new_zeros(num_tokens).index_copy(0, places_R, z_R)

        at.register_hook(note)

    def of_expert(number: int, holder: nn.Module) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output_RH: Tensor) -> None:
            running[holder] = number, args[1]
            watch(number, output_RH.detach(), output_RH, args[1])

        return look

    def of_expert_norm(holder: nn.Module) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output_RH: Tensor) -> None:
            number, places_R = running.pop(holder, (-1, None))  # it runs for experts that are not watched, too
            if places_R is not None:
                watch(number, output_RH.detach(), output_RH, places_R)

        return look

    def of_block(number: int) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = _hidden(args, kwargs), output[0] if isinstance(output, tuple) else output
            watch(number, (after - before).detach(), after)

        return look

    def of_part(number: int) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            added = output[0] if isinstance(output, tuple) else output
            watch(number, added.detach(), added)

        return look

    def of_norm(numbers: Sequence[int]) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            for number in numbers:
                if number in updates and args and args[0] is updates[number]:
                    watch(number, output.detach(), output)

        return look

    found = blocks(model)
    hooks: list[tuple[nn.Module | Stored, Callable[..., None]]] = [(_embedding(model), _wanting_gradients)]
    parts: dict[str, list[int]] = {}
    norms: dict[nn.Module, Callable[..., None]] = {}
    for number, unit in enumerate(units):
        if is_whole_expert(unit):
            linear = linear_at(model, f"{unit}.down_proj")
            assert isinstance(linear, Stored)
            hooks.append((linear, of_expert(number, linear.holder)))
            if (norm := norm_behind(linear)) is not None:
                norms[norm] = of_expert_norm(linear.holder)
            continue
        module = bare(model).get_submodule(unit)
        hooks.append((module, of_part(number) if within_block(unit) else of_block(number)))
        if within_block(unit):
            parts.setdefault(block_of(unit), []).append(number)
    for block, numbers in parts.items():
        own = {bare(model).get_submodule(units[number]) for number in numbers}
        hooks += [(child, of_norm(numbers)) for child in found[block].children() if child not in own]
    return [*hooks, *norms.items()]


def _products(update: Tensor, gradient: Tensor) -> Tensor:
    """Computes z of every token, one after the other in float64."""
    wide = torch.promote_types(update.dtype, torch.float32)
    return -(update.to(wide) * gradient.to(wide)).flatten(0, -2).sum(-1).double()


def _embedding(model: nn.Module) -> nn.Module:
    return bare(model).get_input_embeddings()  # type: ignore[operator]


def _wanting_gradients(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
    """Lets the backward pass reach the first block, although all weights are frozen."""
    output.requires_grad_()


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
