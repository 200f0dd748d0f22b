"""The measurement of loss curves: what the loss pays for each change of each matrix, by a pruner or by number formats.

`prices` has the formulas. A block's curve sums z over its matrices before it is squared.

Letters in shape suffixes: S samples, T tokens, V the positions that are looked at, I inputs and O outputs of a linear
layer, K levels, U units, B samples of a batch, P all positions of all samples (S·T).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial as partial_of
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from layerif.allocate.curves import Curves, with_base
from layerif.checks import listed
from layerif.layers import MatrixOrBlock, block_of, refuse_unreached
from layerif.models.blocks import device_of, linear_at, weight_of
from layerif.models.contexts import evaluating, full_precision
from layerif.models.hooks import hooked
from layerif.models.loss import Loss, per_sample_loss
from layerif.models.stored import Stored
from layerif.probe.curves.prices import costs_of, diagonal_costs, effects
from layerif.probe.curves.text import LossText
from layerif.probe.grams.factors import inputs_read_together
from layerif.probe.grams.gather import Found, Gathering, wanted_tile_bytes, workload
from layerif.probe.grams.passes import Matrix, Offload, Passes, Workload
from layerif.probe.grams.processes import Shards
from layerif.progress import progress
from layerif.scores import AllocationKind

CurveForm = Literal["exact", "diagonal"]
HeldGrams = Literal["none", "matrix", "pass"]

# A matrix in up to seven forms: weight, metric, sorted metric, turned weight, mask, change, and Fisher of two halves.
COPIES = 7


class Changes(Protocol):
    """The source of the changes that are priced: a pruner (`layerif.pruning.Pruner`) or number formats."""

    @property
    def kind(self) -> AllocationKind:
        """The meaning of a level."""
        ...

    @property
    def called(self) -> str:
        """Its name, with the settings that the changes depend on."""
        ...

    @property
    def skip(self) -> Sequence[str]:
        """The matrices that it leaves as they are."""
        ...

    def levels(self) -> tuple[float, ...]:
        """Gives the only levels that it can reach; empty where it can reach any."""
        ...

    @property
    def needs_inputs(self) -> bool:
        """Tells if a change looks at the inputs of a layer. Such a source is one of `Masks`."""
        ...

    def changes_at(self, weight: Tensor, shared: Any, levels: Sequence[float], /) -> Iterator[Tensor]:
        """Yields what each level changes in the weight."""
        ...


class Masks(Changes, Protocol):
    """A source of changes that looks at the inputs of a layer."""

    @property
    def observes_gram(self) -> bool:
        """Tells if the statistic of a layer is the Gram matrix of its inputs."""
        ...

    def observe(self, so_far: Any, input_TI: Tensor) -> Any:
        """Adds the inputs of some tokens to the statistic of a layer."""
        ...

    def check_tokens(self, num_tokens: int, num_inputs: Mapping[str, int]) -> None:
        """Warns where so few tokens say too little about the inputs of a layer."""
        ...

    def prepare(self, statistic: Any, num_windows: int, *, name: str) -> Any:
        """Gives what matrices of the same inputs share."""
        ...


def masks_of(changes: Changes) -> Masks | None:
    """Gives a source of changes as one that looks at inputs; None where it does not."""
    return cast(Masks, changes) if changes.needs_inputs else None


def measure_loss_curves(
    model: nn.Module,
    params: Sequence[str],
    changes: Changes,
    loss_text: LossText,
    levels: Sequence[float],
    *,
    mask_windows: Sequence[Tensor] | None = None,
    form: CurveForm = "exact",
    granularity: MatrixOrBlock = "matrix",
    tokens: float = 1.0,
    seed: int = 0,
    memory_gb: float | None = None,
    offload: Offload = "auto",
    partial: Path | None = None,
    loss: Loss = per_sample_loss,
    is_stepped: bool = False,
    source: Mapping[str, str] | None = None,
    fingerprint: str = "none",
) -> Curves:
    """Measures the predicted rise of the loss of every matrix (or block) at every level.

    With several processes (torch.distributed) all call this with the same arguments, and each gets all curves.

    Args:
        model: a causal language model; it is left as it was.
        params: the names of the weights, block by block.
        changes: the pruner or the number formats whose changes are priced.
        loss_text: the samples whose loss is watched.
        levels: sparsities above 0, or bits, ascending.
        mask_windows: the windows that the pruner takes its statistics of (B×T each); None: the samples of `loss_text`.
        form: `exact` or `diagonal`, see above.
        granularity: a curve per matrix or per block. The diagonal form of a block is the sum over its matrices.
        tokens: the share of each sample's positions that is looked at.
        seed: chooses these positions.
        memory_gb: see `Probe`.
        offload: see `Probe`.
        partial: a folder for the results of an interrupted measurement; it must belong to this measurement alone.
        loss: gives the loss of each sample (B).
        is_stepped: only the levels themselves can be had (n of m).
        source: what the curves belong to, see `Curves`.
        fingerprint: of the measurement.

    Raises:
        ValueError: names the sample, matrix or setting that cannot be measured.
    """
    shards, batches = Shards.current(), list(loss_text.batches)
    reads_with = inputs_read_together(model, params)
    observed: dict[str, Any] = {}
    shared: dict[str, Any] = {}  # by the matrix that reads the input first: q, k and v have it in common
    longest = max(batch["input_ids"].shape[1] for _, batch in batches)
    places_V, weights_V, is_second_V = loss_text.positions(longest, tokens, seed)
    num_windows = len(loss_text.weights) if mask_windows is None else sum(map(len, mask_windows))
    masks = masks_of(changes)
    grams = grams_held(masks, mask_windows is not None)
    if masks is not None:
        read = [batch["input_ids"] for _, batch in batches] if mask_windows is None else mask_windows
        num_inputs = {param.removesuffix(".weight"): weight_of(model, param).shape[1] for param in params}
        masks.check_tokens(sum(ids_BT.numel() for ids_BT in read), num_inputs)

    def observe(todo: Sequence[str]) -> None:
        observed.clear()
        if masks is not None and mask_windows is not None:
            observed.update(_observed(model, todo, reads_with, masks, mask_windows))

    def prepared(param: str, input_STI: Tensor) -> Any:
        leader = reads_with[param]
        if masks is None:
            return None
        if leader not in shared:
            shared.clear()
            seen = observed[leader] if observed else masks.observe(None, input_STI.flatten(0, 1))
            shared[leader] = masks.prepare(seen, num_windows, name=param.removesuffix(".weight"))
        return shared[leader]

    def priced(passes: Passes, matrix: Matrix, input_STI: Tensor, delta_STO: Tensor, weight_OI: Tensor) -> Found:
        where_V = places_V.to(input_STI.device)
        weight_V, second_V = weights_V.to(input_STI.device), is_second_V.to(input_STI.device)
        input_PI, delta_PO = input_STI.flatten(0, 1), delta_STO.flatten(0, 1)
        made = changes.changes_at(weight_OI.to(input_STI.dtype), prepared(matrix.name, input_STI), levels)
        load = passes.workload
        assert isinstance(load, CurveWorkload)
        with full_precision(), torch.no_grad():
            if form == "diagonal":
                return {"costs": diagonal_costs(input_PI, delta_PO, weight_V, second_V, made, where_V)}
            if load.num_copied:
                input_PI, delta_PO = input_PI[where_V], delta_PO[where_V]
            z_KV = effects(input_PI, delta_PO, made, load.rows(matrix, passes.tile_bytes[matrix.name]))
            if granularity == "block":
                return {"effects": z_KV}
            return {"costs": costs_of(z_KV, weight_V, second_V)}

    gathering = Gathering(
        model,
        batches,
        loss_text.names,
        partial=partial,
        shards=shards,
        loss=loss,
        kind="curves",
        takes_weights=True,
        by_token=True,
        advice="name it in pruner.skip" if changes.kind == "sparsity" else "quantise another model",
    )
    found = gathering.each(
        params,
        priced,
        lambda todo: workload(
            model,
            todo,
            batches,
            (),
            inputs_read_together(model, todo),
            num_processes=shards.size,
            kind=partial_of(curve_workload, places_V, is_second_V, len(levels), form, grams),
        ),
        form="materialised",
        memory_gb=memory_gb,
        offload=offload,
        tile_bytes=curve_tile_bytes(model, params, device_of(model)),
        before_pass=observe,
    )
    names = tuple(param.removesuffix(".weight") for param in params)
    unreached = [name for name in names if not any(each.any() for each in found[f"{name}.weight"].values())]
    unreached = [name for name in unreached if isinstance(linear_at(model, name), Stored)]  # experts without a token
    if masks is not None and mask_windows is None:
        refuse_unreached(unreached)
    if unreached:
        warnings.warn(
            f"no token of the samples reaches {listed(unreached, 4)} ({len(unreached)} of {len(names)} matrices), so "
            "that their curves are 0; give more samples",
            RuntimeWarning,
            stacklevel=2,
        )
    numel = [weight_of(model, param).numel() for param in params]
    all_levels = with_base(changes.kind, levels)
    sizes_UK = torch.tensor(numel, dtype=torch.float64)[:, None] * torch.tensor(all_levels, dtype=torch.float64)
    is_summed = granularity == "block" and form == "exact"
    if is_summed:
        halves = _of_blocks(found, names, weights_V, is_second_V)
    else:
        halves = torch.stack([found[param]["costs"] for param in params], dim=1)
    by_half = torch.cat([halves.new_zeros(*halves.shape[:2], len(all_levels) - len(levels)), halves], dim=2)
    curves = Curves(
        names,
        all_levels,
        sizes_UK * 0 if is_summed else by_half.sum(0),
        sizes_UK,
        kind=changes.kind,
        source=source or {},
        fingerprint=fingerprint,
        is_stepped=is_stepped,
        by_half=None if is_summed else by_half,
    )
    if granularity == "matrix":
        return curves
    return curves.by_block if not is_summed else curves.by_block.with_costs(by_half)


@dataclass(frozen=True)
class CurveWorkload(Workload):
    """The sizes of a measurement of curves, which holds copies of a matrix instead of per-sample gradients.

    Attributes:
        curve_form: `exact` or `diagonal`.
        num_levels: the levels whose changes are priced.
        num_positions: the positions that are looked at.
        num_copied: the positions whose factors are copied at once; 0 where they are used as they are laid out.
        grams: whether a pruner's Gram matrices of the inputs (I×I) are held: those of all layers of a `pass` before it,
            that of the layer in work (`matrix`), or `none`.
    """

    curve_form: CurveForm = "exact"
    num_levels: int = 1
    num_positions: int = 1
    num_copied: int = 0
    grams: HeldGrams = "none"

    def operations(self, matrix: Matrix, form: Any) -> float:
        """Counts the operations of a matrix's prices: one product of all positions for each level, or one for all."""
        return self.price_operations(matrix, self.curve_form)

    def price_operations(self, matrix: Matrix, form: CurveForm) -> float:
        """Counts the operations of a matrix's prices in either form."""
        product = 2.0 * self.num_positions * matrix.num_out * matrix.num_in
        return product * (self.num_levels if form == "exact" else 1)

    def piece_bytes(self, matrix: Matrix) -> float:
        copied = self.num_copied * (matrix.num_out + matrix.num_in) * self.work_itemsize
        # Its inverse, and a step between the two, stand beside the Gram matrix of the layer in work.
        grams = (self.grams != "none") * 3.0 * matrix.num_in**2 * self.work_itemsize
        return super().piece_bytes(matrix) + copied + self._effects_bytes + grams

    def statistic_bytes(self, group: Sequence[Matrix]) -> float:
        inputs = {matrix.reads_with: matrix.num_in for matrix in group} if self.grams == "pass" else {}
        return float(sum(num_in**2 for num_in in inputs.values()) * self.work_itemsize)

    def least_tile_bytes(self, matrix: Matrix, form: Any) -> float:
        return _fixed_bytes(matrix, self.work_itemsize) + self._row_bytes(matrix)

    def rows(self, matrix: Matrix, tile_bytes: float) -> int:
        """Counts the positions whose effects are computed together in a tile."""
        return max(1, int((tile_bytes - _fixed_bytes(matrix, self.work_itemsize)) / self._row_bytes(matrix)))

    @property
    def _effects_bytes(self) -> float:
        """The bytes of the effects of all levels, with their squares in float64, once whole and once by half."""
        return self.num_levels * self.num_positions * (self.work_itemsize + 24.0) * (self.curve_form == "exact")

    def _row_bytes(self, matrix: Matrix) -> float:
        return float(min(matrix.num_out, matrix.num_in) * self.work_itemsize)


def curve_workload(
    places_V: Tensor, is_second_V: Tensor, num_levels: int, form: CurveForm, grams: HeldGrams, *args: Any, **sizes: Any
) -> CurveWorkload:
    """Makes the workload of curves out of the chosen positions and the sizes of the factors, see `Workload`."""
    num_second = int(is_second_V.sum())
    num_all = (sizes["num_train"] + sizes["num_val"]) * sizes["longest"]
    if form == "diagonal":
        num_copied = max(num_second, len(places_V) - num_second)
    else:  # all positions in their order need no copy
        num_copied = 0 if torch.equal(places_V, torch.arange(num_all)) else len(places_V)
    return CurveWorkload(
        *args,
        **sizes,
        curve_form=form,
        num_levels=num_levels,
        num_positions=len(places_V),
        num_copied=num_copied,
        grams=grams,
    )


def grams_held(masks: Masks | None, observes_apart: bool) -> HeldGrams:
    """Tells which Gram matrices of inputs are held; `observes_apart` where a pass of its own takes them before."""
    if masks is None or not masks.observes_gram:
        return "none"
    return "pass" if observes_apart else "matrix"


def curve_tile_bytes(model: nn.Module, params: Sequence[str], device: torch.device) -> float:
    """Gives the wanted bytes of a tile: the copies of the largest matrix, and a tile of effects."""
    weights = [weight_of(model, param) for param in params]
    return wanted_tile_bytes(device) + max(float(COPIES * each.numel() * max(each.itemsize, 4)) for each in weights)


def _fixed_bytes(matrix: Matrix, itemsize: int) -> float:
    return float(COPIES * matrix.num_out * matrix.num_in * itemsize)


def _of_blocks(found: Mapping[str, Found], names: Sequence[str], weights_V: Tensor, is_second_V: Tensor) -> Tensor:
    """Sums the effects of each block's matrices, and prices the sums (2×U×K)."""
    sums: dict[str, Tensor] = {}
    for name in names:
        block, effects_KV = block_of(name), found[f"{name}.weight"]["effects"]
        sums[block] = sums[block] + effects_KV if block in sums else effects_KV
    return torch.stack([costs_of(each, weights_V, is_second_V) for each in sums.values()], dim=1)


def _observed(
    model: nn.Module, params: Sequence[str], reads_with: Mapping[str, str], masks: Masks, windows: Sequence[Tensor]
) -> dict[str, Any]:
    """Takes the pruner's statistic of every input, in one forward pass over the windows."""
    found: dict[str, Any] = {}

    def hook(param: str):
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[param] = masks.observe(found.get(param), inputs[0].flatten(0, -2))

        return note

    leaders = list(dict.fromkeys(reads_with[param] for param in params))
    hooks = [(linear_at(model, param), hook(param)) for param in leaders]
    device = device_of(model)
    with hooked(hooks, before=True), evaluating(model), torch.no_grad(), full_precision():
        for ids_BT in progress(windows, "calibration"):
            model(input_ids=ids_BT.to(device), use_cache=False, logits_to_keep=1)
    refuse_unreached([param.removesuffix(".weight") for param in leaders if param not in found])
    return found
