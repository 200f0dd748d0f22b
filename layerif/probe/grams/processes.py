"""Probing with several processes: each runs its share of the samples and multiplies its share of the matrices.

Every factor is sent once, to the process that owns its matrix, so that a Gram is computed by one process from all
samples and equals the single-process one. Processes come from whatever started them (Lightning, torchrun, Slurm); with
one process everything here does nothing.

A model that does not fit one device is spread over them block by block (`spread`, PyTorch's FSDP): weights are gathered
for the block that runs, and every process then has to run equally many batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layerif.models.blocks import bare, blocks

T = TypeVar("T")


@dataclass(frozen=True)
class Shards:
    """The rank of this process among the processes that probe together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Shards:
        """Reads rank and size from torch.distributed; one process where it is not initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def of(self, items: Sequence[T], rank: int | None = None) -> Sequence[T]:
        """Gives the share of a process, by default of this one. Shares differ in length by one at most."""
        return items[self.rank if rank is None else rank :: self.size]

    def share(self, mine: Any) -> list[Any]:
        """Collects the contributions of all processes, in the order of their ranks."""
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Makes all processes fail if one fails inside, so that none waits for it."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = self.share(failure and str(failure)) if self.size > 1 else []
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"process {rank} of {self.size} could not go on: {message}")

    def lay_out(
        self,
        factors: Sequence[tuple[int, Iterator[Tensor]]],
        indices: Sequence[Sequence[int]],
        *,
        longest: int,
        sent_as: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        swap: bool = False,
    ) -> Tensor | None:
        """Lays out one side of a matrix's factors, with all samples in their positions.

        Samples shorter than `longest` are followed by zeros, which add nothing to a product.

        Args:
            factors: for the matrix of each process in turn, its width F and the part that this process has, a tensor
                (B×T×F) for each of its batches.
            indices: the positions of the samples of every batch.
            longest: T.
            sent_as: the dtype between processes.
            dtype: the dtype of the result.
            device: the device of the result.
            swap: True for (S×F×T).

        Returns:
            (S×T×F), or (S×F×T) if swapped; None where this process owns no matrix.
        """
        rows = [[index for batch in self.of(indices, rank) for index in batch] for rank in range(self.size)]
        width = factors[self.rank][0] if self.rank < len(factors) else None
        piece = piece_STF = None
        if width is not None:
            num_samples = sum(map(len, indices))
            shape = (num_samples, width, longest) if swap else (num_samples, longest, width)
            piece = torch.empty(shape, dtype=dtype, device=device)
            piece_STF = piece.mT if swap else piece

        def place(positions: Sequence[int], part_BTF: Tensor) -> None:
            assert piece_STF is not None
            where, length = torch.tensor(positions, device=device), part_BTF.shape[1]
            piece_STF[where, :length] = part_BTF.to(device).to(dtype)
            piece_STF[where, length:] = 0

        if width is not None:
            for positions, part_BTF in zip(self.of(indices), factors[self.rank][1], strict=True):
                place(positions, part_BTF)
        if self.size == 1:
            return piece
        here = len(rows[self.rank])
        outgoing = {
            owner: _packed(parts, torch.zeros(here, longest, features, dtype=sent_as, device=device))
            for owner, (features, parts) in enumerate(factors)
            if owner != self.rank and here
        }
        incoming = {
            rank: torch.empty(len(positions), longest, width, dtype=sent_as, device=device)
            for rank, positions in enumerate(rows)
            if width is not None and rank != self.rank and positions
        }
        self.exchange(outgoing, incoming)
        for rank, part_BTF in incoming.items():
            place(rows[rank], part_BTF)
        return piece

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Sends a tensor to each process in `outgoing`, and fills each tensor in `incoming` from its process."""
        moves = [dist.P2POp(dist.isend, rows, to) for to, rows in outgoing.items()]
        moves += [dist.P2POp(dist.irecv, rows, source) for source, rows in incoming.items()]
        for work in dist.batch_isend_irecv(moves) if moves else ():
            work.wait()


def spread(model: nn.Module, device: torch.device | str, whole: Sequence[nn.Parameter] = ()) -> nn.Module:
    """Divides a model's weights among all processes, on `device` (FSDP2, block by block).

    Args:
        model: changed in its place.
        device: of this process.
        whole: weights that every process keeps whole.

    Returns:
        The model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in blocks(model).values():
        fully_shard(block, mesh=mesh, ignored_params=set(whole))
    fully_shard(bare(model), mesh=mesh, ignored_params=set(whole))
    return model


def is_spread(model: nn.Module) -> bool:
    """Tells a model that `spread` divided."""
    return any(hasattr(block, "unshard") for block in blocks(model).values())


def _packed(parts_BTF: Iterator[Tensor], packed_STF: Tensor) -> Tensor:
    start = 0
    for part in parts_BTF:
        packed_STF[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return packed_STF
