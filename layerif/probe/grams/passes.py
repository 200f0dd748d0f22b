"""The best way to measure the Grams of some matrices: the form of each, the number of passes, and the place of factors.

A pass runs every sample forward and backward and keeps, for each of its matrices, the inputs and the output gradients
(the factors). Then, matrix by matrix, the factors of all samples are laid out in one piece and multiplied. At most

    factors of one pass  +  the piece of one matrix  +  one tile

are held beside the model, what one batch needs and the Grams themselves. Arithmetic on sizes only; nothing here runs a
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from layerif.probe.grams.products import Form, cheaper, operations, tile_bytes_of

Offload = Literal["auto", "none", "cpu", "disk"]
Choice = Literal["auto", "materialised", "pairwise"]

TILE = 1.6e7  # bytes that stay inside a processor's cache


@dataclass(frozen=True)
class Matrix:
    """A measured weight: its name, its two sizes after projection, and the first matrix that reads the same input."""

    name: str
    num_out: int
    num_in: int
    reads_with: str


@dataclass(frozen=True)
class Workload:
    """The sizes of a measurement.

    Attributes:
        matrices: the measured weights.
        num_train, num_val: samples.
        num_tokens: the tokens of all samples together, padding included.
        longest: the tokens of the longest sample.
        kept_itemsize, work_itemsize: bytes of a number in a factor as kept, and in the products.
        num_processes: the processes that share the samples.
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
        """Gives the chosen form, or the cheaper one for `auto`."""
        if choice != "auto":
            return choice
        return cheaper(self.num_train, self.num_val, self.longest, matrix.num_out, matrix.num_in)

    def operations(self, matrix: Matrix, form: Form) -> float:
        """Counts the floating-point operations of a matrix's Gram."""
        return operations(form, self.num_train, self.num_val, self.longest, matrix.num_out, matrix.num_in)

    def kept_bytes(self, group: Sequence[Matrix]) -> float:
        """Counts the bytes of a pass's factors in each process; an input that several matrices read is kept once."""
        inputs = {matrix.reads_with: matrix.num_in for matrix in group}
        numbers = sum(inputs.values()) + sum(matrix.num_out for matrix in group)
        return float(self.num_tokens * self.kept_itemsize * numbers) / self.num_processes

    def statistic_bytes(self, group: Sequence[Matrix]) -> float:
        """Counts the bytes that a pass holds on the device wherever its factors wait."""
        return 0.0

    def piece_bytes(self, matrix: Matrix) -> float:
        """Counts the bytes of a matrix's factors laid out for all samples, and of what processes exchange for it."""
        samples = self.num_train + self.num_val
        piece = float(samples * self.longest * (matrix.num_out + matrix.num_in) * self.work_itemsize)
        others = (self.num_processes - 1) / self.num_processes
        return piece * (1 + 2 * others * self.kept_itemsize / self.work_itemsize)

    def least_tile_bytes(self, matrix: Matrix, form: Form) -> float:
        """Counts the bytes of the smallest tile."""
        samples = self.num_train + self.num_val
        return tile_bytes_of(form, 1, samples, self.longest, matrix.num_out, matrix.num_in, self.work_itemsize)


@dataclass(frozen=True)
class Passes:
    """A way to measure: the matrices of each pass, form and tile by matrix, and the place where factors wait."""

    workload: Workload
    groups: tuple[tuple[Matrix, ...], ...]
    forms: dict[str, Form]
    offload: Literal["none", "cpu", "disk"]
    tile_bytes: dict[str, float]

    @cached_property
    def kept_bytes(self) -> float:
        """The most that the factors of one pass take, wherever they wait."""
        return max(self.workload.kept_bytes(group) for group in self.groups)

    @cached_property
    def device_bytes(self) -> float:
        """The most that is held on the model's device beside the model and what one batch needs."""
        return max(
            self.workload.piece_bytes(matrix)
            + self.tile_bytes[matrix.name]
            + (self.workload.kept_bytes(group) if self.offload == "none" else 0)
            + self.workload.statistic_bytes(group)
            for group in self.groups
            for matrix in group
        )

    @cached_property
    def operations(self) -> float:
        """The operations of all Grams; the passes themselves come on top."""
        return sum(
            self.workload.operations(matrix, self.forms[matrix.name]) for group in self.groups for matrix in group
        )


def passes(
    workload: Workload,
    memory: float,
    *,
    form: Choice = "auto",
    offload: Offload = "auto",
    tile_bytes: float = TILE,
    host_memory: float = 0,
) -> Passes:
    """Finds the fewest passes that fit into the memory of the model's device.

    Args:
        workload: the sizes of the measurement.
        memory: bytes of the device.
        form: of the products.
        offload: `none` keeps factors on the device, in as many passes as they need; `cpu` moves them to main memory,
            `disk` into files, in one pass. `auto` is none where one pass suffices, otherwise cpu where that needs
            fewer passes, otherwise none.
        tile_bytes: the wanted size of a tile; it gets the rest of the budget, up to this size.
        host_memory: bytes of main memory for factors, 0 where the device is main memory itself.

    Raises:
        ValueError: names the least memory that would do.
    """
    forms: dict[str, Form] = {matrix.name: workload.form(matrix, form) for matrix in workload.matrices}
    arrange = _Arranger(workload, forms, memory)
    if offload == "cpu" and not host_memory:
        raise ValueError("probe.offload=cpu has nowhere to go: the model is in main memory; use none or disk")
    if offload == "auto":
        offload = "none"
        here, moved = arrange.groups(None), arrange.groups(host_memory)
        if moved and (not here or len(moved) < len(here)):
            offload = "cpu"
    room = {"none": None, "cpu": host_memory, "disk": float("inf")}[offload]
    groups = arrange.groups(room)
    if not groups:
        raise ValueError(arrange.refusal(room, offload))
    tiles = {
        matrix.name: min(tile_bytes, memory - workload.piece_bytes(matrix) - arrange.held(group, room))
        for group in groups
        for matrix in group
    }
    return Passes(workload, groups, forms, offload, tiles)


@dataclass(frozen=True)
class _Arranger:
    """Arranges matrices into passes. `room` is the bytes for factors elsewhere; None: they stay on the device."""

    workload: Workload
    forms: dict[str, Form]
    memory: float

    def held(self, group: Sequence[Matrix], room: float | None) -> float:
        """Counts the bytes that a pass holds on the device for all of its matrices."""
        return (self.workload.kept_bytes(group) if room is None else 0.0) + self.workload.statistic_bytes(group)

    def least(self, matrix: Matrix) -> float:
        """Counts the bytes on the device that one matrix's products need."""
        return self.workload.piece_bytes(matrix) + self.workload.least_tile_bytes(matrix, self.forms[matrix.name])

    def groups(self, room: float | None) -> tuple[tuple[Matrix, ...], ...]:
        """Groups consecutive matrices whose factors fit together; gives no group if a single matrix does not fit."""
        groups: list[list[Matrix]] = []
        for matrix in self.workload.matrices:
            if groups and self._fits([*groups[-1], matrix], room):
                groups[-1].append(matrix)
            elif self._fits([matrix], room):
                groups.append([matrix])
            else:
                return ()
        return tuple(map(tuple, groups))

    def _fits(self, group: Sequence[Matrix], room: float | None) -> bool:
        if room is not None and self.workload.kept_bytes(group) > room:
            return False
        return self.held(group, room) + max(map(self.least, group)) <= self.memory

    def refusal(self, room: float | None, offload: str) -> str:
        """Says which memory is too small, and the least that would do."""
        kept = self.workload.kept_bytes
        matrix = max(self.workload.matrices, key=lambda matrix: self.least(matrix) + self.held([matrix], room))
        least = self.least(matrix) + self.held([matrix], room)
        if least <= self.memory and room is not None:
            matrix = max(self.workload.matrices, key=lambda matrix: kept([matrix]))
            return (
                f"probe.offload=cpu: the factors of {matrix.name} alone need {kept([matrix]) / 1e9:.3g} GB of main "
                f"memory, and {room / 1e9:.3g} GB may be taken; use probe.offload=disk"
            )
        others = "" if offload == "disk" else ", set probe.offload=disk"
        return (
            f"{self.memory / 1e9:.3g} GB for the probe (probe.memory_gb, or a part of what is free) are too few: "
            f"{matrix.name} alone needs {least / 1e9:.3g} GB (its factors and one tile); raise probe.memory_gb to at "
            f"least {_rounded_up(least / 1e9)}{others}, or measure fewer or shorter samples, or set probe.projection"
        )


def _rounded_up(value: float) -> str:
    """Writes a value with two figures, never below it."""
    digits = f"{value:.1e}"
    return digits if float(digits) >= value else f"{float(digits) + 10 ** (int(digits[-3:]) - 1):.1e}"
