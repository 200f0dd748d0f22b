"""Verified swaps of levels: sparsity moves between matrices as long as the model comes nearer to the dense one.

This is the level switch of EvoPress (arXiv 2410.14649), started from any allocation. A candidate removes some more
weights of one matrix and as many fewer of another. It is accepted if the mean over tokens of KL(dense ‖ candidate) on a
few windows falls. Every matrix is pruned by the inputs that it has in the dense model, so that a candidate changes two
matrices only.

Letters in shape suffixes: B windows of a batch, T tokens, V words of the vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from layerif.allocate.allocation import Allocation, spent_budget
from layerif.checks import Count, Seed, Share, check_arguments
from layerif.models.blocks import bare, blocks, device_of
from layerif.models.contexts import evaluating, full_precision
from layerif.models.hooks import hooked
from layerif.models.stored import AnyLinear, standing_in
from layerif.progress import progress
from layerif.pruning.levels import Levels, check_main_memory
from layerif.pruning.targets import matrices
from layerif.record.search import read_state, write_state


@dataclass(frozen=True)
class Refinement:
    """The result of `refined`.

    Attributes:
        allocation: of sparsity, by matrix; it removes as many weights as the first one.
        kl_before: the mean over tokens of KL(dense ‖ pruned) with the first allocation, in nats.
        kl: the same with this one.
        tried: the number of candidates.
        accepted: the number of those that lowered it.
        seconds: of all processes that took part.
    """

    allocation: Allocation
    kl_before: float
    kl: float
    tried: int
    accepted: int
    seconds: float


def refined(
    model: nn.Module,
    levels: Levels,
    start: Allocation,
    windows: Sequence[Tensor],
    *,
    forwards: Count,
    step: Share = 0.05,
    floor: Annotated[float, Ge(0), Lt(1)] = 0.0,
    cap: Share = 0.95,
    seed: Seed = 0,
    state: Path | None = None,
) -> Refinement:
    """Improves an allocation of sparsity by candidates that are tried one after the other.

    A candidate moves `step` of the smaller of two matrices, or with m the next lower number (at least the smallest one)
    that both can give and take. Blocks before the first changed one are not calculated again, and a candidate is given
    up as soon as its windows so far are as far from the dense model as all of them were before.

    Args:
        model: the model that `levels` is of. It comes back dense, to the bit, also after an error.
        levels: gives the pruned weights.
        start: an allocation of sparsity, by block or matrix.
        windows: the windows that candidates are judged on, as token ids (B×T).
        forwards: the number of candidates. Each takes at most one forward over the windows.
        step: the fraction of a matrix that moves.
        floor: no matrix is lowered below this sparsity.
        cap: no matrix is raised above it.
        seed: chooses the pairs of matrices.
        state: a file from which the same call carries on after a kill, to the same result, and a call with more
            `forwards` after the last candidate; None writes nothing.

    Raises:
        ValueError: a setting is out of its range, the allocation does not fit the model, no two matrices can exchange
            weights, the dense model's predictions would take more than half of the free memory, or the pruned model's
            are not finite.
    """
    check_arguments(refined, "refined", forwards=forwards, step=step, floor=floor, cap=cap, seed=seed)
    begun = time.perf_counter()
    found = matrices(model)
    search = _Search(
        sizes={name: linear.weight.numel() for name, linear in found.items()},
        grains={name: levels.grain(name) for name in found},
        step=step,
        floor=floor,
        cap=cap if levels.pruner.m is None else min(cap, 1 - 1 / levels.pruner.m),
        seed=seed,
    )
    first = levels.counts(model, start)
    if search.candidate(first, 0) is None:
        raise ValueError(
            f"no two matrices can exchange weights with step={step} between floor={floor} and cap={cap}; use a smaller "
            "step, or a wider range"
        )
    job = _job(search, levels, first, windows)
    known = None if state is None else read_state(state, job)
    reached = None if known is None else _State(**known)
    with torch.no_grad(), evaluating(model), full_precision(), _dense_again(found, levels):
        distance = _Distance(model, windows)
        for name, count in (reached.counts if reached else first).items():
            found[name].weight.copy_(levels(name, count))
        total = distance()
        if reached is None:
            if not math.isfinite(total):
                raise ValueError(
                    "the predictions of the pruned model are not finite on the windows; use a lower sparsity, or load "
                    "the model in a wider dtype (model.dtype=float32)"
                )
            reached = _State(counts=first, before=total, total=total)
        distance.keep()
        seconds_before = reached.seconds
        for number in progress(range(reached.tried, forwards), "swaps of levels"):
            move = search.candidate(reached.counts, number)
            if move is None:
                break
            reached = _tried(found, levels, distance, reached, move)
            reached = replace(reached, tried=number + 1, seconds=seconds_before + time.perf_counter() - begun)
            if state is not None:
                write_state(state, job, asdict(reached))
    return Refinement(
        allocation=_allocation(start, reached.counts, search.sizes),
        kl_before=reached.before / distance.num_tokens,
        kl=reached.total / distance.num_tokens,
        tried=reached.tried,
        accepted=reached.accepted,
        seconds=reached.seconds,
    )


@dataclass(frozen=True)
class _State:
    """The point that a search has reached: the accepted counts, and sums over tokens of KL in nats."""

    counts: Mapping[str, int]
    before: float
    total: float
    tried: int = 0
    accepted: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Search:
    """The candidates: which two matrices exchange how many weights. Each is drawn by the seed and its own number."""

    sizes: Mapping[str, int]
    grains: Mapping[str, int]
    step: float
    floor: float
    cap: float
    seed: int

    def candidate(self, counts: Mapping[str, int], number: int) -> tuple[str, str, int] | None:
        """Draws the matrix to raise, the one to lower and the number of weights; None where no pair can move."""
        highest = {name: self.cap * size + 1e-6 for name, size in self.sizes.items()}
        lowest = {name: self.floor * size - 1e-6 for name, size in self.sizes.items()}
        pairs = [
            (up, down, amount)
            for up in counts
            for down in counts
            if up != down
            and counts[up] + (amount := self._amount(up, down)) <= highest[up]
            and counts[down] - amount >= lowest[down]
        ]
        return Random(f"{self.seed} swaps of levels {number}").choice(pairs) if pairs else None

    def _amount(self, up: str, down: str) -> int:
        grain = math.lcm(self.grains[up], self.grains[down])
        return grain * max(1, int(self.step * min(self.sizes[up], self.sizes[down]) / grain))


def _tried(
    found: Mapping[str, AnyLinear], levels: Levels, distance: _Distance, reached: _State, move: tuple[str, str, int]
) -> _State:
    """Prunes two matrices as a candidate asks, and puts them back unless the model comes nearer to the dense one."""
    up, down, amount = move
    changed = {up: reached.counts[up] + amount, down: reached.counts[down] - amount}
    kept = {name: found[name].weight.detach().clone() for name in changed}
    for name, count in changed.items():
        found[name].weight.copy_(levels(name, count))
    total = distance(changed, below=reached.total)
    if total < reached.total:
        distance.keep()
        return replace(reached, counts={**reached.counts, **changed}, total=total, accepted=reached.accepted + 1)
    for name, weight in kept.items():
        found[name].weight.copy_(weight)
    return reached


class _Distance:
    """KL(dense ‖ model), summed over the tokens of the windows. It is made while the model is dense.

    The outputs of the blocks wait on the model's device, so that a forward begins at the first block that has changed.
    """

    def __init__(self, model: nn.Module, windows: Sequence[Tensor]) -> None:
        self.model, self.windows, self.blocks = model, windows, blocks(model)
        self.num_tokens = sum(input_BT.numel() for input_BT in windows)
        self._outputs: list[dict[str, Any]] = [{} for _ in windows]
        self._fresh: list[dict[str, Any]] = []
        self._log_probs: list[Tensor] = []  # B×T×V, float32
        for index in range(len(windows)):
            log_probs_BTV = self._logits(index, 0)[0].float().log_softmax(-1)
            if index == 0:
                size = self.num_tokens * log_probs_BTV.shape[-1] * log_probs_BTV.element_size()
                check_main_memory(
                    size, f"the dense model's predictions of {self.num_tokens} tokens", "use fewer windows"
                )
            self._log_probs.append(log_probs_BTV.cpu())

    def __call__(self, changed: Sequence[str] | Mapping[str, Any] = (), *, below: float = math.inf) -> float:
        """Returns the sum; infinity as soon as it is known not to be below `below`.

        Args:
            changed: the names of the matrices that differ from those of the last call of `keep`; empty: all may.
            below: a bound. No token adds a negative number.
        """
        first = min((self._block_of(name) for name in changed), default=0)
        total, self._fresh = 0.0, []
        for index, log_probs_BTV in enumerate(self._log_probs):
            logits_BTV, outputs = self._logits(index, first)
            self._fresh.append(outputs)
            for logits_TV, dense_TV in zip(logits_BTV, log_probs_BTV, strict=True):
                dense_TV = dense_TV.to(logits_TV.device)
                difference_TV = dense_TV - logits_TV.float().log_softmax(-1)
                total += float((dense_TV.exp() * difference_TV).sum(-1).clamp(min=0).double().sum())
            if total >= below:
                return math.inf
        return total

    def keep(self) -> None:
        """Lets the next forwards begin with the outputs of the blocks in the last call."""
        for outputs, fresh in zip(self._outputs, self._fresh, strict=True):
            outputs |= fresh

    def _block_of(self, matrix: str) -> int:
        return next(index for index, name in enumerate(self.blocks) if matrix.startswith(f"{name}."))

    def _logits(self, index: int, first: int) -> tuple[Tensor, dict[str, Any]]:
        """Returns the logits of a batch (B×T×V) and the outputs of the blocks from number `first` on."""
        names, fresh = list(self.blocks), {}
        done = {name: self.blocks[name] for name in names[:first]}
        input_BT = self.windows[index].to(device_of(self.model))

        def kept(name: str) -> Any:
            return lambda *args, **kwargs: self._outputs[index][name]

        def note(name: str) -> Any:
            return lambda module, inputs, output: fresh.update({name: output})

        with (
            standing_in({block: kept(name) for name, block in done.items()}),
            hooked([(self.blocks[name], note(name)) for name in names[first:]]),
        ):
            return bare(self.model)(input_ids=input_BT, use_cache=False).logits, fresh


@contextmanager
def _dense_again(found: Mapping[str, AnyLinear], levels: Levels) -> Iterator[None]:
    try:
        yield
    finally:
        with torch.no_grad():
            for name, linear in found.items():
                linear.weight.copy_(levels.dense[name])


def _allocation(start: Allocation, counts: Mapping[str, int], sizes: Mapping[str, int]) -> Allocation:
    values, weights = tuple(counts[name] / sizes[name] for name in counts), tuple(sizes[name] for name in counts)
    budget = spent_budget("sparsity", values, weights)
    return replace(start, units=tuple(counts), values=values, sizes=weights, budget=budget)


def _job(search: _Search, levels: Levels, first: Mapping[str, int], windows: Sequence[Tensor]) -> str:
    """Returns a hash of all that a search depends on; the first rows of the dense matrices stand for the model."""
    digest = hashlib.sha256(repr((asdict(search), levels.pruner, list(first.items()))).encode())
    rows = [weight[0].contiguous().view(torch.uint8) for weight in levels.dense.values()]
    for tensor in (*rows, *levels.windows, *windows):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
