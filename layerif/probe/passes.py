"""How the Grams of some matrices are best measured: which form each takes, in how many passes, and where factors wait.

A pass runs every sample forward and backward and keeps, for each of its matrices, the inputs and the output gradients
(the factors). Then, matrix by matrix, the factors of all samples are laid out in one piece and multiplied. At most

    factors of one pass  +  the piece of one matrix  +  one tile

are held beside the model and what one batch needs. Arithmetic on sizes only; nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from layerif.probe.products import Form, cheaper, least_tile_bytes, operations

Offload = Literal["auto", "none", "cpu", "disk"]
Choice = Literal["auto", "materialised", "pairwise"]


@dataclass(frozen=True)
class Matrix:
    """One measured weight: its name, its two sizes after projection, and the first matrix that reads the same input."""

    name: str
    num_out: int
    num_in: int
    reads_with: str


@dataclass(frozen=True)
class Workload:
    """What is to be measured. num_tokens: all samples' together, padding included; longest: of one sample.

    kept_itemsize, work_itemsize: bytes of a number in a factor as kept, and in the products. num_processes: that share
    the samples.
    """

    matrices: tuple[Matrix, ...]
    num_train: int
    num_val: int
    num_tokens: int
    longest: int
    kept_itemsize: int = 4
    work_itemsize: int = 4
    num_processes: int = 1

    def form(self, matrix: Matrix, choice: Choice = "auto") -> Form:
        if choice != "auto":
            return choice
        return cheaper(self.num_train, self.num_val, self.longest, matrix.num_out, matrix.num_in)

    def operations(self, matrix: Matrix, form: Form) -> float:
        return operations(form, self.num_train, self.num_val, self.longest, matrix.num_out, matrix.num_in)

    def kept_bytes(self, group: Sequence[Matrix]) -> float:
        """Of the factors of a pass over `group`, in each process; an input that several matrices read is kept once."""
        inputs = {matrix.reads_with: matrix.num_in for matrix in group}
        numbers = sum(inputs.values()) + sum(matrix.num_out for matrix in group)
        return float(self.num_tokens * self.kept_itemsize * numbers) / self.num_processes

    def piece_bytes(self, matrix: Matrix) -> float:
        """Of one matrix's factors laid out for all samples, ready to be multiplied."""
        samples = self.num_train + self.num_val
        return float(samples * self.longest * (matrix.num_out + matrix.num_in) * self.work_itemsize)

    def least_tile_bytes(self, matrix: Matrix, form: Form) -> float:
        return least_tile_bytes(form, self.num_train + self.num_val, self.longest, matrix.num_in, self.work_itemsize)


@dataclass(frozen=True)
class Passes:
    """groups: the matrices of each pass. forms: by matrix. offload: where factors wait. tile_bytes: of a product."""

    workload: Workload
    groups: tuple[tuple[Matrix, ...], ...]
    forms: dict[str, Form]
    offload: Literal["none", "cpu", "disk"]
    tile_bytes: float

    @cached_property
    def kept_bytes(self) -> float:
        """The most that the factors of one pass take, wherever they wait."""
        return max(self.workload.kept_bytes(group) for group in self.groups)

    @cached_property
    def device_bytes(self) -> float:
        """The most that is held on the model's device beside the model and what one batch needs."""
        working = max(self.workload.piece_bytes(matrix) for group in self.groups for matrix in group) + self.tile_bytes
        return working + (self.kept_bytes if self.offload == "none" else 0)

    @cached_property
    def operations(self) -> float:
        """Of all Grams; the passes themselves come on top."""
        return sum(
            self.workload.operations(matrix, self.forms[matrix.name]) for group in self.groups for matrix in group
        )


def passes(
    workload: Workload,
    memory: float,
    *,
    form: Choice = "auto",
    offload: Offload = "auto",
    tile_bytes: float = 1.6e7,
    host_memory: float = 0,
) -> Passes:
    """The passes that fit into `memory` bytes of the model's device.

    offload: `none` keeps factors on the device, in as many passes as they need; `cpu` moves them to main memory
    (`host_memory` bytes of it), `disk` into files, in one pass. `auto` is none where one pass suffices, otherwise cpu
    where that needs fewer passes, otherwise none. host_memory: 0 where the device is main memory itself.
    tile_bytes: wanted; smaller where the budget is.
    Raises ValueError with the least memory that would do.
    """
    forms: dict[str, Form] = {matrix.name: workload.form(matrix, form) for matrix in workload.matrices}
    held = _Held(workload, forms, memory, tile_bytes)
    if offload == "auto":
        offload = "none"
        fits = held.fits(None)
        if held.fits(host_memory) and not (fits and len(held.groups(None)) <= len(held.groups(host_memory))):
            offload = "cpu"
    if offload == "cpu" and not host_memory:
        raise ValueError("probe.offload=cpu has nowhere to go: the model is in main memory; use none or disk")
    room = {"none": None, "cpu": host_memory, "disk": float("inf")}[offload]
    held.require(room, offload)
    return Passes(workload, held.groups(room), forms, offload, held.tile(room))


@dataclass(frozen=True)
class _Held:
    """What fits beside the pieces and tiles of the products. room: bytes for factors elsewhere, None: on the device."""

    workload: Workload
    forms: dict[str, Form]
    memory: float
    wanted_tile: float

    def least(self, matrix: Matrix, room: float | None) -> float:
        tile = self.workload.least_tile_bytes(matrix, self.forms[matrix.name])
        kept = self.workload.kept_bytes([matrix]) if room is None else 0
        return self.workload.piece_bytes(matrix) + tile + kept

    def fits(self, room: float | None) -> bool:
        matrices = self.workload.matrices
        if room is not None and max(self.workload.kept_bytes([matrix]) for matrix in matrices) > room:
            return False
        return max(self.least(matrix, room) for matrix in matrices) <= self.memory

    def require(self, room: float | None, offload: str) -> None:
        if self.fits(room):
            return
        matrix = max(self.workload.matrices, key=lambda matrix: self.least(matrix, room))
        least = self.least(matrix, room)
        if least <= self.memory:
            raise ValueError("probe.offload=cpu: main memory cannot hold one matrix's factors; use probe.offload=disk")
        others = "" if offload == "disk" else ", set probe.offload=disk"
        raise ValueError(
            f"probe.memory_gb={self.memory / 1e9:.3g} is too small: {matrix.name} alone needs {least / 1e9:.3g} GB "
            f"(its factors and one tile); raise it to at least {_rounded_up(least / 1e9)}{others}, or measure fewer or "
            "shorter samples, or set probe.projection"
        )

    def tile(self, room: float | None) -> float:
        """The wanted tile, or what the budget leaves for it."""
        matrices = self.workload.matrices
        least = max(self.workload.least_tile_bytes(matrix, self.forms[matrix.name]) for matrix in matrices)
        largest = max(self.least(matrix, room) for matrix in matrices) - least
        return max(least, min(self.wanted_tile, self.memory - largest))

    def groups(self, room: float | None) -> tuple[tuple[Matrix, ...], ...]:
        """Consecutive matrices whose factors are held together."""
        piece = max(self.workload.piece_bytes(matrix) for matrix in self.workload.matrices)
        limit = self.memory - piece - self.tile(None) if room is None else room
        groups: list[list[Matrix]] = [[]]
        for matrix in self.workload.matrices:
            if groups[-1] and self.workload.kept_bytes([*groups[-1], matrix]) > limit:
                groups.append([])
            groups[-1].append(matrix)
        return tuple(map(tuple, groups))


def _rounded_up(value: float) -> str:
    """Two figures, never below the value."""
    digits = f"{value:.1e}"
    return digits if float(digits) >= value else f"{float(digits) + 10 ** (int(digits[-3:]) - 1):.1e}"
