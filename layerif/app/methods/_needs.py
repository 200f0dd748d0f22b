"""The devices, memory, passes and operations that each method would need, counted from a model's configuration.

Operations are those of matrix products, a multiplication and an addition as two. Seconds are the operations at a given
rate. Reading weights, communication, everything that is not a product, and the evaluation come on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from layerif.adapt.sizes import Capacity, Shapes, adapted_shapes, num_parameters
from layerif.layers import LayerMap, is_attention
from layerif.models.blocks import Scope, blocks, layer_map
from layerif.models.quantised import bits_of_scheme
from layerif.probe.curves.measure import COPIES, CurveWorkload
from layerif.probe.grams.passes import TILE, Matrix, Workload, passes

OF_DENSE_WEIGHTS = ("curves", "full", "prune", "drop", "quantise")  # all of these refuse a quantised model
_MOST_DEVICES = 1024
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "o")  # names of the output projection of an attention
_TRAINED = 16  # bytes of a trained number: itself, its gradient and AdamW's two moments, in float32


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model that its cost depends on. No weight is ever allocated.

    Attributes:
        numel, itemsize: the parameters, and the bytes of each that is not quantised, and of an activation.
        num_bytes, block_bytes: of all weights, and of the largest block.
        quantised: the way in which the weights are quantised; None where they are not.
        trained_numel: the parameters of all blocks.
        layers: the linear layers of the blocks.
        measured: those that the probe takes.
        adapted: those that get an adapter.
        active: the weights of all blocks that a token is multiplied by: of experts, those that it is routed to, or all
            where the model runs all of them on every token (Llama 4).
        numbers: the inputs and outputs of these weights.
        mixed: the numbers of all heads by which tokens look at one another, a query's and a value's, over all blocks.
        hidden, head: the numbers of a token between blocks, and the weights of the head.
        experts: the experts that a token takes, of those that there are; None where there are none.
    """

    numel: int
    itemsize: int
    num_bytes: float
    block_bytes: float
    quantised: str | None
    trained_numel: int
    layers: LayerMap
    measured: LayerMap
    adapted: Shapes
    active: float
    numbers: float
    mixed: int
    hidden: int
    head: int
    experts: tuple[int, int] | None

    def forward(self, length: int) -> float:
        """Counts the operations of a forward pass for one token of a sample of this length."""
        return 2.0 * (self.active + self.head) + self._attention(length)

    def backward(self, length: int) -> float:
        """Counts the operations of the backward pass to all activations for one token; no weight has a gradient."""
        return 2.0 * (self.active + self.head) + 2 * self._attention(length)

    def activations(self, num_tokens: int, *, checkpointed: bool = False) -> float:
        """Estimates the bytes that a batch holds for the backward pass, logits and their gradient in float32.

        Args:
            num_tokens: of the batch.
            checkpointed: only the input of each block is held, and all of the one block that runs again.
        """
        num_blocks = len(self.layers.names)
        kept = self.numbers + 4 * self.hidden * num_blocks
        if checkpointed:
            kept = kept / num_blocks + self.hidden * num_blocks
        return num_tokens * (kept * self.itemsize + self.head / self.hidden * (self.itemsize + 8))

    def _attention(self, length: int) -> float:
        return 2.0 * length * self.mixed  # queries by keys, and the result by values


def dimensions_of(skeleton: Any, scope: Scope, quantised: str | None = None) -> Dimensions:
    """Reads the sizes of a model.

    Args:
        skeleton: the model on the meta device.
        scope: the matrices of a block that the probe measures.
        quantised: the way in which the weights are quantised, see `layerif.models.quantised.scheme_of`; where its bits
            are unknown, its bytes are those of weights that are not quantised.
    """
    config = skeleton.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    active, numbers, mixed, experts = 0.0, 0.0, 0, None
    sizes, saved = [], []
    head = skeleton.get_output_embeddings().weight
    for block in blocks(skeleton).values():
        routed = _expert_parameters(block)
        sizes.append(sum(parameter.numel() for parameter in block.parameters()))
        saved.append(
            _packed(block, quantised) * (head.itemsize - (bits_of_scheme(quantised or "") or 8 * head.itemsize) / 8)
        )
        mixed += sum(_mixed_numbers(name, module, config) for name, module in block.named_modules())
        for name, parameter in block.named_parameters():
            if parameter.ndim < 2 or name.endswith("bias"):
                continue
            total = routed.get(name)
            experts = (chosen, total) if total else experts
            share = chosen / total if total and not _takes_all(block.get_submodule(name.rpartition(".")[0])) else 1.0
            active += share * parameter.numel()
            fused = len(parameter) if total and parameter.ndim == 3 else 1
            numbers += share * fused * sum(parameter.shape[-2:])
    numel = sum(parameter.numel() for parameter in skeleton.parameters())
    return Dimensions(
        numel=numel,
        itemsize=head.itemsize,
        num_bytes=numel * head.itemsize - sum(saved),
        block_bytes=max(size * head.itemsize - less for size, less in zip(sizes, saved, strict=True)),
        quantised=quantised,
        trained_numel=sum(sizes),
        layers=layer_map(skeleton, scope="all", skip_unsupported=True),
        measured=layer_map(skeleton, scope=scope, skip_unsupported=True),
        adapted=adapted_shapes(skeleton, None),
        active=active,
        numbers=numbers,
        mixed=mixed,
        hidden=head.shape[1],
        head=head.numel(),
        experts=experts,
    )


def _packed(block: nn.Module, quantised: str | None) -> int:
    """Counts the weights of a block that are quantised: bitsandbytes leaves fused experts as they are."""
    if quantised is None:
        return 0
    if quantised in ("nf4", "fp4", "int8"):
        return sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear | Conv1D))
    return sum(each.numel() for name, each in block.named_parameters() if each.ndim >= 2 and not name.endswith("bias"))


def _mixed_numbers(name: str, module: nn.Module, config: Any) -> int:
    """Counts the numbers of all heads by which an attention mixes tokens; 0 for a module that is none.

    The output projection reads a value of every head. A query has the size of a value, except in latent attention
    (MLA). Linear attention and Mamba, which have a convolution over tokens, keep a state instead.
    """
    found = {inside: child for inside, child in module.named_children() if isinstance(child, nn.Linear | Conv1D)}
    output = next((found[inside] for inside in _OUTPUTS if inside in found), None)
    if output is None or not is_attention(name) or any(isinstance(child, nn.Conv1d) for child in module.children()):
        return 0
    values = int(output.weight.shape[isinstance(output, nn.Linear)])
    if (rotated := getattr(config, "qk_rope_head_dim", None)) is None:
        return 2 * values
    return values + values // config.v_head_dim * (config.qk_nope_head_dim + rotated)


def _takes_all(experts: nn.Module) -> bool:
    """Tells if fused experts get tokens without a choice, and so all of them run on every token."""
    is_fused = any(parameter.ndim == 3 for parameter in experts.parameters(recurse=False))
    return is_fused and len(signature(experts.forward).parameters) == 1


def _expert_parameters(block: nn.Module) -> Mapping[str, int]:
    """Finds the parameters of routed experts in a block, with the number of experts: fused (E×O×I), or in a list."""
    found = {
        name: len(parameter)
        for name, parameter in block.named_parameters()
        if parameter.ndim == 3 and "experts" in name
    }
    for name, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("experts"):
            found |= {f"{name}.{inner}": len(module) for inner, _ in module.named_parameters()}
    return found


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """The amounts of work.

    Attributes:
        num_train, num_val: samples of the probe.
        longest, sample_tokens, batch_size: the tokens of the longest of them and of all, and the samples of a batch.
        num_windows, window, window_batch: calibration windows, their tokens, and the windows of a batch.
        fit_tokens, fit_length, fit_batch: the tokens of all steps of fine-tuning, of a row, and the rows of a batch.
        epochs: of fine-tuning.
        looked_at: the share of the positions that curves look at.
        num_levels, num_formats: the sparsities and the number formats that curves price.
    """

    num_train: int
    num_val: int
    longest: int
    sample_tokens: int
    batch_size: int
    num_windows: int = 16
    window: int = 256
    window_batch: int = 4
    fit_tokens: int
    fit_length: int
    fit_batch: int
    epochs: int
    looked_at: float = 0.45
    num_levels: int = 8
    num_formats: int = 6


@dataclass(frozen=True)
class Need:
    """The devices, memory, passes and time of a method.

    Attributes:
        method: its name, or that of the evidence.
        about: its size, in words.
        devices: the fewest devices of the given memory, among which the weights are spread where there are several
            (FSDP); None where the method takes one device, and that is too small.
        device_gb: the memory that it takes of each.
        passes: over the samples, the windows or the rows.
        operations: of all passes and products.
        seconds: of the operations on these devices.
    """

    method: str
    about: str
    devices: int | None
    device_gb: float
    passes: int
    operations: float
    seconds: float


def needs(shape: Dimensions, work: Amounts, device_gb: float, teraflops: float) -> list[Need]:
    """Counts what every method would need; of quantised weights, every method that takes them.

    Args:
        shape: of the model.
        work: the amounts.
        device_gb: the memory of a device.
        teraflops: 10¹² operations a second of a device.
    """
    found = _Counting(shape, work, device_gb * 1e9, teraflops * 1e12)
    every = [
        found.scores(),
        found.curves("curves", work.num_levels, "levels of sparsity"),
        found.adapter("lora", "rank 8", Capacity(1, 8)),
        found.adapter("lora_moe", "5 experts of rank 8", Capacity(5, 8)),
        found.full(),
        found.prune(),
        found.drop(),
        found.curves("quantise", work.num_formats, "number formats", spread=False),
    ]
    return [need for need in every if shape.quantised is None or need.method not in OF_DENSE_WEIGHTS]


@dataclass(frozen=True)
class _Counting:
    shape: Dimensions
    work: Amounts
    memory: float
    rate: float

    def scores(self) -> Need:
        work, measured = self.work, self.shape.measured
        load = dict(
            num_train=work.num_train,
            num_val=work.num_val,
            num_tokens=work.sample_tokens,
            longest=work.longest,
            **self._itemsizes,
        )
        about = f"{len(measured.matrices)} matrices, {work.num_train} + {work.num_val} samples"
        batch = work.batch_size * work.longest
        return self._measured("scores", about, measured, load, Workload, work.longest, batch, TILE)

    def curves(self, name: str, num_levels: int, what: str, *, spread: bool = True) -> Need:
        work, layers = self.work, self.shape.layers
        tokens = work.num_windows * work.window
        positions = round(work.looked_at * tokens)
        load = dict(
            num_train=work.num_windows,
            num_val=0,
            num_tokens=tokens,
            longest=work.window,
            num_levels=num_levels,
            num_positions=positions,
            num_copied=positions,
            **self._itemsizes,
        )
        about = f"{len(layers.matrices)} matrices at {num_levels} {what}, {work.num_windows} windows"
        tile = TILE + max(layers.matrix_numel or ()) * COPIES * 4  # in float32
        batch = work.window_batch * work.window
        return self._measured(name, about, layers, load, CurveWorkload, work.window, batch, tile, spread=spread)

    def adapter(self, name: str, about: str, capacity: Capacity) -> Need:
        shape, work = self.shape, self.work
        trained = num_parameters(shape.adapted, dict.fromkeys(shape.adapted, capacity))
        forward, backward = shape.forward(work.fit_length), shape.backward(work.fit_length)
        each = forward + backward + 6.0 * trained  # an adapter's weights are multiplied once forward and twice backward
        about = f"{about}: {trained:,} parameters"
        for checkpointed in (False, True):
            beside = trained * _TRAINED
            beside += shape.activations(work.fit_batch * work.fit_length, checkpointed=checkpointed)
            devices = next((one for one in self._devices if self._weights(one) + beside <= self.memory), None)
            if devices is not None:
                break
            if not checkpointed:
                about, each = f"{about}, with method.gradient_checkpointing=true", each + forward
        memory = self._weights(devices or 1) + beside
        return self._need(name, about, devices, memory, work.epochs, work.fit_tokens * each)

    def full(self) -> Need:
        shape, work = self.shape, self.work
        # Weights that are trained are in float32.
        memory = shape.numel * 4.0 + shape.trained_numel * (_TRAINED - 4.0)
        memory += shape.activations(work.fit_batch * work.fit_length) * 4 / shape.itemsize
        each = shape.forward(work.fit_length) + shape.backward(work.fit_length) + 2 * shape.active
        about = f"all blocks: {shape.trained_numel:,} parameters"
        return self._need("full", about, self._one(memory), memory, work.epochs, work.fit_tokens * each)

    def prune(self) -> Need:
        shape, work = self.shape, self.work
        batch = work.window_batch * work.window
        memory = shape.num_bytes + batch * shape.numbers / len(shape.layers.names) * shape.itemsize
        # Every block runs as it is, and once more with its weights pruned; the head does not.
        operations = 2.0 * work.num_windows * work.window * (shape.forward(work.window) - 2.0 * shape.head)
        about = f"Wanda, {work.num_windows} windows"
        return self._need("prune", about, self._one(memory), memory, 2, operations)

    def drop(self) -> Need:
        shape, work = self.shape, self.work
        memory = shape.num_bytes + shape.activations(work.window_batch * work.window)
        tokens = work.num_windows * work.window
        operations = tokens * (shape.forward(work.window) + shape.backward(work.window))
        about = f"skip curves of {len(shape.layers.names)} blocks, {work.num_windows} windows"
        return self._need("drop", about, self._one(memory), memory, 1, operations)

    def _measured(
        self,
        name: str,
        about: str,
        layers: LayerMap,
        load: Mapping[str, Any],
        kind: type[Workload],
        length: int,
        batch_tokens: int,
        tile: float,
        *,
        spread: bool = True,
    ) -> Need:
        """Counts gradient passes: the fewest devices on which the factors of at least one matrix have room."""
        shape = self.shape
        assert layers.matrix_shapes is not None
        matrices = tuple(
            Matrix(param, *sides, param) for param, sides in zip(layers.matrices, layers.matrix_shapes, strict=True)
        )
        each = load["num_tokens"] * (shape.forward(length) + shape.backward(length))
        form = "auto" if kind is Workload else "materialised"
        for devices in self._devices if spread else (1,):
            workload, found = kind(matrices, num_processes=devices, **load), []
            for tokens in (batch_tokens, length):
                held = self._weights(devices) + shape.activations(tokens)
                try:
                    arranged = passes(workload, self.memory - held, form=form, tile_bytes=tile)
                except ValueError:  # a matrix has no room beside these weights
                    continue
                words = about if tokens == batch_tokens else f"{about}, one at a time"
                found.append((len(arranged.groups), held + arranged.device_bytes, arranged.operations, words))
            if found:
                number, memory, products, about = min(found, key=lambda way: way[0])
                return self._need(name, about, devices, memory, number, number * each + products)
        workload = kind(matrices, num_processes=1, **load)
        factors = max(
            workload.kept_bytes([one]) + workload.statistic_bytes([one]) + workload.piece_bytes(one) for one in matrices
        )
        return self._need(name, about, None, self._weights(1) + shape.activations(length) + factors + tile, 1, each)

    @property
    def _devices(self) -> Sequence[int]:
        if self.shape.quantised:
            return [1]  # nothing divides quantised weights
        return [2**power for power in range(_MOST_DEVICES.bit_length())]

    @property
    def _itemsizes(self) -> dict[str, int]:
        return {"kept_itemsize": self.shape.itemsize, "work_itemsize": max(self.shape.itemsize, 4)}

    def _weights(self, devices: int) -> float:
        """Counts the bytes of weights on each device: its part, and where it is one, two blocks that are gathered."""
        gathered = 2.0 * self.shape.block_bytes if devices > 1 else 0.0
        return self.shape.num_bytes / devices + gathered

    def _one(self, memory: float) -> int | None:
        return 1 if memory <= self.memory else None

    def _need(self, name: str, about: str, devices: int | None, memory: float, number: int, operations: float) -> Need:
        return Need(name, about, devices, memory / 1e9, number, operations, operations / (devices or 1) / self.rate)
