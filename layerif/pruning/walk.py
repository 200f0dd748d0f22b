"""The walk prunes one block after the other: it gathers the inputs of a block, prunes it, and feeds the next.

The model stays where it is; only the block at work is on the device. One forward that skips the blocks captures the
inputs of the first block and the other arguments of every block (masks, rotary embeddings). A finished block is saved,
so that a killed walk carries on: it replays the finished blocks and gives the same bits. From a damaged one on, it
prunes again.

Letters in shape suffixes: B windows of a batch, T tokens, H hidden size, I inputs of a linear layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from layerif.compat import map_tensors
from layerif.files import full_disk_explained, is_intact, save_tensors, whole
from layerif.layers import is_named, refuse_unreached
from layerif.models.blocks import bare, blocks, device_of, linears
from layerif.models.contexts import evaluating, full_precision
from layerif.models.hooks import hooked
from layerif.models.stored import AnyLinear, standing_in
from layerif.pruning import Pruner
from layerif.pruning.targets import Target

ActivationPlace = Literal["device", "cpu", "disk"]

_ADVICE = (
    "free some space, use method.offload=cpu, or set outputs=/another/folder; "
    "the same command carries on from the last finished block"
)
_WITHOUT_INPUTS = "use pruner=magnitude without swaps, which reads no inputs"


@dataclass
class Walk:
    """Prunes the blocks of a model in order, in place.

    Args:
        model: the model.
        pruner: chooses the weights.
        targets: the target by block and by linear layer.
        batches: the calibration windows as token ids (B×T); empty where the pruner needs no inputs.
        folder: the folder for finished blocks, and for activations that wait on disk; None writes nothing.
        device: the device on which a block works.
        offload: the place where activations wait between blocks: on the device, in main memory or on disk.
    """

    model: nn.Module
    pruner: Pruner
    targets: Mapping[str, Mapping[str, Target]]
    batches: Sequence[Tensor]
    folder: Path | None
    device: torch.device | str = "cpu"
    offload: ActivationPlace = "cpu"

    def __post_init__(self) -> None:
        self.blocks = blocks(self.model)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.pruner.needs_inputs:
            num_inputs = {
                f"{name}.{inside}": linear.in_features
                for name, block in self.blocks.items()
                for inside, linear in self._pruned_of(name, block).items()
            }
            self.pruner.check_tokens(sum(batch.numel() for batch in self.batches), num_inputs)
        self.num_finished = sum(takewhile(bool, map(self._is_finished, range(len(self.blocks)))))
        self.num_replayed = self.num_finished
        self._hidden: HiddenStates | None = None
        self._calls: dict[str, list[Call]] = {}

    def __call__(self, index: int) -> None:
        """Prunes block number `index`, or takes it from its file. Blocks come in order, each of them once.

        Raises:
            ValueError: activations are not finite, the inputs of a block cannot be captured, or the pruner refuses a
                matrix; names the block or the matrix.
            OSError: the disk is full.
        """
        begun = time.perf_counter()
        name = list(self.blocks)[index]
        block = self.blocks[name]
        home = device_of(block)
        is_needed = self.pruner.needs_inputs and self.num_replayed < len(self.blocks)
        with torch.no_grad(), evaluating(self.model), full_precision():
            if is_needed and self._hidden is None:
                self._capture()
            block.to(self.device)
            if index < self.num_replayed:
                _set_weights(block, load_file(self._file(index)))
            else:
                self._prune(name, block)
                if self.folder is not None:
                    pruned = {name: module.weight for name, module in linears(block)}
                    seconds = {"seconds": str(time.perf_counter() - begun)}
                    save_tensors(pruned, self._file(index), seconds, advice=_ADVICE)
                self.num_finished = index + 1
            if is_needed and index + 1 < len(self.blocks):
                self._forward(name, block)
            block.to(home)

    def observed(self, index: int) -> tuple[dict[str, str], dict[str, Any]]:
        """Prepares the pruner for block number `index`, whose weights stay. Blocks come in order, each of them once.

        Returns:
            By layer the leader whose inputs it reads, and by leader what the pruner prepared; names are those inside
            the block.

        Raises:
            ValueError: as in a call.
        """
        name = list(self.blocks)[index]
        block = self.blocks[name]
        home = device_of(block)
        with torch.no_grad(), evaluating(self.model), full_precision():
            if self._hidden is None:
                self._capture()
            block.to(self.device)
            leaders, statistics = self._observe(name, block, self._pruned_of(name, block))
            num_windows = sum(map(len, self.batches))
            shared = {
                leader: self.pruner.prepare(statistics.pop(leader), num_windows, name=f"{name}.{leader}")
                for leader in list(statistics)
            }
            if index + 1 < len(self.blocks):
                self._forward(name, block)
            block.to(home)
        return leaders, shared

    @property
    def seconds_before(self) -> float:
        """The seconds that an earlier process took to prune the blocks that are replayed."""
        return sum(float(_header(self._file(index)).get("seconds", 0)) for index in range(self.num_replayed))

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{index:03d}.safetensors"

    def _is_finished(self, index: int) -> bool:
        return self.folder is not None and is_intact(self._file(index), "its block is pruned again")

    def _capture(self) -> None:
        hidden, self._calls = capture_inputs(self.model, self.batches)
        self._hidden = HiddenStates(
            hidden, self.device if self.offload == "device" else "cpu", self.folder if self.offload == "disk" else None
        )

    def _pruned_of(self, block_name: str, block: nn.Module) -> dict[str, AnyLinear]:
        """Returns the linear layers of a block that the pruner does not skip, by their name inside the block."""
        skip = self.pruner.skip
        return {name: each for name, each in linears(block) if not is_named(f"{block_name}.{name}", skip)}

    def _prune(self, block_name: str, block: nn.Module) -> None:
        for module, (weight,) in self._pruned(block_name, block, [self.targets[block_name]]):
            module.weight.copy_(weight)

    def _pruned(
        self, block_name: str, block: nn.Module, aims: Sequence[Mapping[str, Target]]
    ) -> Iterator[tuple[AnyLinear, list[Tensor]]]:
        """Yields every linear layer of a block with its weight as pruned to each of several targets.

        A layer is pruned when it is reached, so that the weights of one layer and one statistic are there at a time.
        """
        modules = self._pruned_of(block_name, block)
        leaders = {name: name for name in modules}
        shared: dict[str, Any] = dict.fromkeys(modules)
        if self.pruner.needs_inputs:
            leaders, statistics = self._observe(block_name, block, modules)
        for leader in dict.fromkeys(leaders.values()):
            if self.pruner.needs_inputs:
                num_windows = sum(map(len, self.batches))
                statistic = statistics.pop(leader)
                shared[leader] = self.pruner.prepare(statistic, num_windows, name=f"{block_name}.{leader}")
            for name, module in modules.items():
                if leaders[name] == leader:
                    yield module, [self._to(module.weight, shared[leader], aim[name]) for aim in aims]
            shared[leader] = None

    def _to(self, weight: Tensor, shared: Any, target: Target) -> Tensor:
        if target.sparsity == 0:
            return weight  # to the bit, which a solver would not keep
        return self.pruner(weight, shared, target.sparsity, target.n)

    def _observe(
        self, block_name: str, block: nn.Module, modules: Mapping[str, AnyLinear]
    ) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Returns by layer the leader whose input it reads (q, k and v share one), and by leader the statistic."""
        leaders: dict[str, str] = {}
        statistics: dict[str, Tensor] = {}
        latest: dict[str, Tensor] = {}  # this batch's inputs, by leader

        def hook(name: str):
            def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                leader = leaders.get(name)
                if leader is None:
                    leader = next((other for other, seen in latest.items() if seen is inputs[0]), name)
                    leaders[name] = leader
                if leader == name:
                    latest[name] = inputs[0]
                    input_TI = inputs[0].flatten(0, -2)
                    statistics[name] = self.pruner.observe(statistics.get(name), input_TI)
                elif latest.get(leader) is not inputs[0]:
                    raise ValueError(
                        f"{block_name}.{name} and {leader} share their inputs in some batches only; {_WITHOUT_INPUTS}"
                    )

            return note

        with hooked([(module, hook(name)) for name, module in modules.items()], before=True):
            for index in range(len(self.batches)):
                latest.clear()
                self._call(block_name, block, index)
        refuse_unreached([f"{block_name}.{name}" for name in modules if name not in leaders])
        for name, statistic in statistics.items():
            if not bool(statistic.isfinite().all()):
                raise ValueError(_not_finite(f"the inputs of {block_name}.{name}"))
        return leaders, statistics

    def _forward(self, name: str, block: nn.Module) -> None:
        assert self._hidden is not None
        for index in range(len(self.batches)):
            output_BTH = self._call(name, block, index)
            if not bool(output_BTH.isfinite().all()):
                raise ValueError(_not_finite(f"the outputs of {name}"))
            self._hidden[index] = output_BTH

    def _call(self, name: str, block: nn.Module, index: int) -> Tensor:
        assert self._hidden is not None
        args, kwargs = map_tensors(lambda tensor: tensor.to(self.device), self._calls[name][index])
        output = block(self._hidden[index].to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


Call = tuple[tuple[Any, ...], dict[str, Any]]


def capture_inputs(model: nn.Module, batches: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, list[Call]]]:
    """Captures the inputs of the blocks, in one forward per batch in which the blocks pass on what they are given.

    Args:
        model: the model.
        batches: token ids (B×T).

    Returns:
        The hidden states (B×T×H) that enter the first block, by batch, and the other arguments of every block, in which
        equal tensors are kept once.

    Raises:
        ValueError: a block is not called exactly once, or not with the output of the block before.
    """
    try:
        return _captured(model, batches, in_tuple=False)
    except _NotPassedOn as error:
        try:  # a Falcon takes the first of what a block returns, even where that is one tensor
            return _captured(model, batches, in_tuple=True)
        except Exception as again:
            raise error from again


def _captured(
    model: nn.Module, batches: Sequence[Tensor], *, in_tuple: bool
) -> tuple[list[Tensor], dict[str, list[Call]]]:
    """Captures inputs, see `capture_inputs`, with blocks that return the hidden state alone or in a tuple."""
    found = blocks(model)
    hidden: list[Tensor] = []
    calls: dict[str, list[Call]] = {name: [] for name in found}
    kept: list[Tensor] = []
    device = device_of(model)
    current: list[Tensor] = []

    def stand_in(name: str):
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden_BTH = args[0] if args else kwargs.pop("hidden_states", None)
            current[:] = current or [hidden_BTH]
            if not isinstance(hidden_BTH, Tensor) or hidden_BTH.ndim != 3 or hidden_BTH is not current[0]:
                raise _NotPassedOn(_cannot_capture(name, "it does not take the output of the block before as it is"))
            calls[name].append(map_tensors(share, (args[1:], kwargs)))
            if name == last:
                raise _Done
            return (hidden_BTH, None) if in_tuple else hidden_BTH

        return forward

    def share(tensor: Tensor) -> Tensor:
        for other in kept:
            if other is tensor or ((other.shape, other.dtype) == (tensor.shape, tensor.dtype) and other.equal(tensor)):
                return other
        kept.append(tensor)
        return tensor

    last = list(found)[-1]
    with standing_in({block: stand_in(name) for name, block in found.items()}):
        for number, input_BT in enumerate(batches, 1):
            current.clear()
            with suppress(_Done):
                bare(model)(input_ids=input_BT.to(device), use_cache=False)
            for name, made in calls.items():
                if len(made) != number:
                    raise ValueError(_cannot_capture(name, f"it ran {len(made) - number + 1} times in one forward"))
            if not bool(current[0].isfinite().all()):
                raise ValueError(_not_finite("the embeddings"))
            hidden.append(current[0])
    return hidden, calls


class HiddenStates:
    """The hidden states of every batch (B×T×H), on a device or in files of `folder`."""

    def __init__(self, first: Sequence[Tensor], device: torch.device | str, folder: Path | None = None) -> None:
        self.device, self.folder = device, folder
        self._kept: list[Tensor | None] = [None] * len(first)
        for index, hidden_BTH in enumerate(first):
            self[index] = hidden_BTH

    def __getitem__(self, index: int) -> Tensor:
        hidden_BTH = self._kept[index]
        return load_file(self._file(index))["hidden"] if hidden_BTH is None else hidden_BTH

    def __setitem__(self, index: int, hidden_BTH: Tensor) -> None:
        if self.folder is None:
            self._kept[index] = hidden_BTH.to(self.device)
        else:
            file = self._file(index)  # for this process alone
            with full_disk_explained(str(file), _ADVICE), whole(file, durable=False) as unfinished:
                safetensors.torch.save_file({"hidden": hidden_BTH.cpu().contiguous()}, unfinished, None)

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"hidden-{index:05d}.safetensors"


class _NotPassedOn(ValueError):
    """Says that a block is not called with what the block before returned."""


class _Done(Exception):
    """Says that all blocks have been called."""


def _set_weights(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, module in linears(block):
        module.weight.copy_(weights[name])


def _header(file: Path) -> Mapping[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def _not_finite(what: str) -> str:
    return (
        f"{what} are not finite on the calibration text; look at the weights, or load the model in a wider dtype "
        "(model.dtype=float32)"
    )


def _cannot_capture(name: str, why: str) -> str:
    return f"the inputs of block {name} cannot be captured: {why}; {_WITHOUT_INPUTS}"
