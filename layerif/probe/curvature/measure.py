"""The measurement of curvature: every sample runs forward and backward, then one matrix after the other is taken apart.

For one matrix, `bases` gives the eigenvectors U and eigenvalues Λ of an approximation of its Fisher matrix F. With g'_i
and v'_q the gradients of train sample i and of query q in that basis,

    I_qi = −⟨v_q, (F + λ)⁻¹ g_i⟩ = −Σ v'_q ∘ g'_i / (Λ + λ)

is kept at every λ of `layerif.evidence.DAMPINGS`, which gives it at any other. No gradient of a whole matrix is formed:
the factors are turned into the basis, and the sum is taken over slabs of output rows.

Letters in shape suffixes: S all samples (N train, then M validation), Q queries, K dampings, T tokens, I inputs and O
outputs of a linear layer, R output rows of a slab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial as partial_of
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerif.evidence import DAMPINGS, LayerCurvature, MatrixCurvature
from layerif.layers import LayerMap
from layerif.models.contexts import full_precision
from layerif.models.loss import Loss, per_sample_loss
from layerif.probe.curvature.bases import (
    BASES,
    Basis,
    Moments,
    Spectrum,
    kronecker_eigenbasis,
    moment_bytes,
    moments,
    slabs,
    spectrum_of,
    turn,
)
from layerif.probe.grams.factors import inputs_read_together
from layerif.probe.grams.gather import Found, Gathering, IndexedBatch, workload
from layerif.probe.grams.passes import Matrix, Offload, Passes, Workload
from layerif.probe.grams.processes import Shards

Queries = Literal["halves", "each"]

# Two squares in float64 for each side of a matrix, of each basis, and three more while one of them is decomposed.
_SQUARES = 7
MEAN_SQUARE = "mean_square"


def measure_curvature(
    model: nn.Module,
    layers: LayerMap,
    train: Sequence[IndexedBatch],
    validation: Sequence[IndexedBatch],
    *,
    spectra: Sequence[Spectrum] = ("kfac", "ekfac", "shampoo"),
    queries: Queries = "halves",
    dampings: Sequence[float] = DAMPINGS,
    memory_gb: float | None = None,
    offload: Offload = "auto",
    partial: Path | None = None,
    fingerprint: str = "",
    names: Sequence[str] | None = None,
    loss: Loss = per_sample_loss,
) -> LayerCurvature:
    """Measures influence under the curvature of every matrix in `layers`.

    With several processes (torch.distributed) all call this with the same arguments, and each gets all of it.

    Args:
        model: a causal language model; it is left as it was.
        layers: the blocks and matrices to measure.
        train: batches with the position of each of their samples.
        validation: the same of the validation samples.
        spectra: the approximations of the curvature. K-FAC and EK-FAC share their eigenvectors.
        queries: `each` validation sample, or the sums over every other one and over the others (`halves`).
        dampings: relative ones: all of `DAMPINGS`, which give every other one, or one of them.
        memory_gb: see `Probe`.
        offload: see `Probe`.
        partial: a folder for the results of an interrupted measurement; it must belong to this measurement alone.
        fingerprint: of the measurement.
        names: of the samples, train then validation, for messages.
        loss: gives the loss of each sample (B), whose gradients are measured.

    Raises:
        ValueError: names block and sample for a loss or gradient that is not finite, and the least that would do for a
            memory budget that is too small.
    """
    num_train = sum(len(indices) for indices, _ in train)
    num_val = sum(len(indices) for indices, _ in validation)
    batches = [*train, *([[num_train + index for index in indices], batch] for indices, batch in validation)]
    if names is None:
        names = [f"train sample {index}" for index in range(num_train)]
        names += [f"validation sample {index}" for index in range(num_val)]
    shards, queries_QM = Shards.current(), query_weights(queries, num_val)

    def take_apart(passes: Passes, matrix: Matrix, input_STI: Tensor, delta_SOT: Tensor) -> Found:
        load = passes.workload
        assert isinstance(load, CurvatureWorkload)
        tile, is_shampoo = passes.tile_bytes[matrix.name], "shampoo" in spectra
        with full_precision(), torch.no_grad():
            chunk = load.chunk(matrix, tile)
            seen = moments(input_STI[:num_train], delta_SOT[:num_train], with_shampoo=is_shampoo, chunk=chunk)
            _check_finite(seen.squares, matrix.name, names)
            num_rows = load.slab_rows(matrix, tile)
            found = influences(
                input_STI, delta_SOT, seen, spectra, queries_QM, dampings, num_rows=num_rows, chunk=chunk
            )
        for influence_KQN in found.values():
            _check_finite(influence_KQN.sum(dim=(0, 1)), matrix.name, ["a validation sample"] * num_train)
        return {**found, MEAN_SQUARE: seen.squares.mean() / (matrix.num_out * matrix.num_in)}

    gathering = Gathering(model, batches, names, None, partial, shards, loss, kind="curvature")
    kind = partial_of(
        CurvatureWorkload, num_queries=len(queries_QM), num_dampings=len(dampings), spectra=tuple(spectra)
    )
    found = gathering.each(
        layers.matrices,
        take_apart,
        lambda todo: workload(
            model,
            todo,
            train,
            validation,
            inputs_read_together(model, todo),
            num_processes=shards.size,
            kind=kind,
        ),
        form="materialised",
        memory_gb=memory_gb,
        offload=offload,
    )
    matrices = {param: curvature_in(found[param], dampings) for param in layers.matrices}
    return LayerCurvature(layers, matrices, fingerprint)


def influences(
    input_STI: Tensor,
    delta_SOT: Tensor,
    seen: Moments,
    spectra: Sequence[Spectrum],
    queries_QM: Tensor,
    dampings: Sequence[float] = DAMPINGS,
    *,
    num_rows: int,
    chunk: int,
) -> Found:
    """Gives I of one matrix at every damping (K×Q×N), by the approximation. The factors are used up.

    Args:
        input_STI: inputs of all samples, train first.
        delta_SOT: output gradients of all samples.
        seen: the moments of the train samples.
        spectra: the approximations.
        queries_QM: the weight of each validation sample in each query.
        dampings: relative ones.
        num_rows: the output rows of a slab.
        chunk: the samples whose factors are turned together.
    """
    num_train, (num_queries, _) = len(seen.squares), queries_QM.shape
    shape = len(dampings) * num_queries, num_train
    found: dict[Spectrum, Tensor] = {spectrum: input_STI.new_zeros(shape) for spectrum in spectra}
    mean_square = float(seen.squares.mean()) / (delta_SOT.shape[1] * input_STI.shape[2])
    queries_QM = queries_QM.to(input_STI)
    lambda_K11 = mean_square * torch.tensor(list(dampings), dtype=torch.float64, device=input_STI.device)[:, None, None]
    turned = None
    bases: list[Basis] = list(dict.fromkeys(BASES[spectrum] for spectrum in spectra))
    for name in bases if mean_square > 0 else ():
        basis = kronecker_eigenbasis(name, seen)
        out_OO, in_II = basis.out_OO, basis.in_II
        if turned is not None:  # from one basis into the next
            out_OO, in_II = turned.out_OO.mT @ out_OO, turned.in_II.mT @ in_II
        turn(input_STI, delta_SOT, out_OO, in_II, chunk)
        turned = basis
        for rows, turned_SRI in slabs(input_STI, delta_SOT, num_rows):
            train_NRI = turned_SRI[:num_train]
            query_QRI = torch.tensordot(queries_QM, turned_SRI[num_train:], dims=1)
            for spectrum in spectra:
                if BASES[spectrum] != name:
                    continue
                damped_KRI = (spectrum_of(spectrum, basis, rows, train_NRI) + lambda_K11).to(input_STI.dtype)
                columns_KQRI = query_QRI / damped_KRI[:, None]
                found[spectrum].addmm_(columns_KQRI.flatten(0, 1).flatten(1), train_NRI.flatten(1).mT, alpha=-1)
    return {str(spectrum): each.view(len(dampings), num_queries, num_train) for spectrum, each in found.items()}


def query_weights(queries: Queries, num_val: int) -> Tensor:
    """Gives the weight of each validation sample in each query (Q×M)."""
    if queries == "each":
        return torch.eye(num_val)
    is_second_M = torch.arange(num_val) % 2
    return torch.stack([1 - is_second_M, is_second_M]).float()


def curvature_in(tensors: Mapping[str, Tensor], dampings: Sequence[float] = DAMPINGS) -> MatrixCurvature:
    """Gives the curvature of one matrix out of what was kept of it."""
    kept = {name: tensor for name, tensor in tensors.items() if name != MEAN_SQUARE}
    return MatrixCurvature(kept, float(tensors[MEAN_SQUARE]), tuple(dampings))


@dataclass(frozen=True)
class CurvatureWorkload(Workload):
    """The sizes of a measurement of curvature.

    Attributes:
        num_queries, num_dampings: a product is made for each pair of them.
        spectra: the approximations.
    """

    num_queries: int = 1
    num_dampings: int = 1
    spectra: tuple[Spectrum, ...] = ("ekfac",)

    def operations(self, matrix: Matrix, form: Any) -> float:
        """Counts the operations on a matrix: moments, turned factors, gradients, and products at all dampings."""
        num_samples, num_bases = self.num_train + self.num_val, len({BASES[spectrum] for spectrum in self.spectra})
        sides = matrix.num_out**2 + matrix.num_in**2
        tokens = 2.0 * num_samples * self.longest
        turned = tokens * sides * (1 + num_bases)
        gradients = tokens * matrix.num_out * matrix.num_in * num_bases
        products = (
            2.0
            * self.num_queries
            * self.num_dampings
            * self.num_train
            * matrix.num_out
            * matrix.num_in
            * len(self.spectra)
        )
        # Ten times the cube of a side for its eigenvectors, in float64.
        return turned + gradients + products + 10.0 * num_bases * (matrix.num_out**3 + matrix.num_in**3)

    def piece_bytes(self, matrix: Matrix) -> float:
        return super().piece_bytes(matrix) + 8.0 * _SQUARES * (matrix.num_out**2 + matrix.num_in**2)

    def least_tile_bytes(self, matrix: Matrix, form: Any) -> float:
        return max(self._row_bytes(matrix), self._chunk_bytes(matrix))

    def slab_rows(self, matrix: Matrix, tile_bytes: float) -> int:
        """Counts the output rows whose gradients a tile holds."""
        return max(1, min(matrix.num_out, int(tile_bytes / self._row_bytes(matrix))))

    def chunk(self, matrix: Matrix, tile_bytes: float) -> int:
        """Counts the samples whose moments a tile holds."""
        return max(1, int(tile_bytes / self._chunk_bytes(matrix)))

    def _row_bytes(self, matrix: Matrix) -> float:
        # The gradients, the queries at all dampings, and the damped spectrum with its sum in float64.
        numbers = self.num_train + self.num_val + (2 * self.num_queries + 3) * self.num_dampings
        return float(self.work_itemsize * matrix.num_in * numbers)

    def _chunk_bytes(self, matrix: Matrix) -> float:
        return moment_bytes(self.longest, matrix.num_out, matrix.num_in, self.work_itemsize)


def _check_finite(found: Tensor, matrix: str, names: Sequence[str]) -> None:
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"the gradient of {matrix} is not finite for {names[int((~found.isfinite()).nonzero()[0])]}; "
            "look at that row, or load the model in float32 (model.dtype=float32)"
        )
