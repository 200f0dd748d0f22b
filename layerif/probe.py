"""One pass over a model and its samples leaves a Gram matrix per weight matrix, for all blocks at once.

The gradient of sample i's loss in the weight of a linear layer is a sum over its tokens, g_i = Σ_t δ_it a_itᵀ, with a
the layer's input and δ the loss gradient at its output. Hooks keep a and δ; the weights themselves need no gradient,
so that the pass costs less than an ordinary backward. Afterwards, matrix by matrix, the g_i are formed in slabs of
output rows and their inner products added up: memory holds the factors and one slab, never all gradients.

Letters in shape suffixes: B batch, T tokens, I inputs and O outputs of a linear layer, S all samples (N train, then
M validation), R the entries of a slab.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from layerif.layers import LayerGrams, LayerMap, MatrixGram
from layerif.loss import per_sample_loss
from layerif.models import Parameters, Scope, bare, blocks

log = logging.getLogger(__name__)

VERSION = 1  # part of every cache key: raise it when the meaning of a Gram changes

IndexedBatch = tuple[Sequence[int], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is measured: which samples, which parameters, under which loss.

    num_train, num_validation: samples (the paper: 300 and 50); max_length: tokens, longer samples are cut and counted.
    template: `plain` is instruction + " " + output, as the released scores. loss_on: `all` tokens (the paper) or
    only the `output`. memory_gb: for what the hooks keep; beyond it the blocks are measured in several passes. None:
    half of what the device has free.
    """

    scope: Scope = "attention"
    parameters: Parameters = "weights"
    num_train: int = 300
    num_validation: int = 50
    max_length: int = 128
    template: Literal["plain", "alpaca"] = "plain"
    loss_on: Literal["all", "output"] = "all"
    batch_size: int = 8
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_train", 1), ("num_validation", 1), ("batch_size", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"probe.{name}={getattr(self, name)} must be at least {least}")
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise ValueError(f"probe.memory_gb={self.memory_gb} must be above 0, or null for half of what is free")


def measure(
    model: nn.Module,
    layers: LayerMap,
    train: Sequence[IndexedBatch],
    validation: Sequence[IndexedBatch],
    *,
    memory_gb: float | None = None,
    fingerprint: str = "",
    names: Sequence[str] | None = None,
) -> LayerGrams:
    """Grams of the per-sample gradients of every matrix in `layers`.

    train, validation: batches with the position of each of their samples; the Grams' rows follow the positions,
    however the samples were batched. Gradients of half-precision models are multiplied in float32.
    names: of the samples, train then validation, for messages.
    Raises ValueError naming block and sample for a loss or gradient that is not finite.
    """
    num_train = sum(len(indices) for indices, _ in train)
    batches = [*train, *([[num_train + index for index in indices], batch] for indices, batch in validation)]
    num_samples = sum(len(indices) for indices, _ in batches)
    num_tokens = sum(batch["input_ids"].numel() for _, batch in batches)
    if names is None:
        names = [f"{'train' if index < num_train else 'validation'} sample {index}" for index in range(num_samples)]
    order_S = torch.tensor([index for indices, _ in batches for index in indices]).argsort()

    memory = _free_memory(next(model.parameters()).device) / 2 if memory_gb is None else memory_gb * 1e9
    groups = _groups(model, layers, num_tokens, memory)
    if len(groups) > 1:
        log.info("%d passes: what the hooks keep does not fit into %.1f GB at once", len(groups), memory / 1e9)
    grams: dict[str, MatrixGram] = {}
    for number, group in enumerate(groups, 1):
        params = [param for layer in group for param in layers.params[layer]]
        kept = _capture(model, params, batches, names, f"gradients {number}/{len(groups)}")
        for param in tqdm(params, desc="Gram matrices", disable=None, leave=False):
            gram_SS = _gram(kept.pop(param), num_samples)[order_S][:, order_S]
            grams[param] = _split(param, gram_SS, num_train, bare(model).get_parameter(param).numel(), names)
    return LayerGrams(layers, grams, fingerprint)


def first_non_finite_block(model: nn.Module, batch: Mapping[str, Tensor]) -> str:
    """The first block whose output on `batch` is not finite, or what follows the blocks."""
    spoilt: list[str] = []

    def note(name: str):
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not bool(hidden.isfinite().all()):
                spoilt.append(name)

        return hook

    handles = [block.register_forward_hook(note(name)) for name, block in blocks(model).items()]
    try:
        with torch.no_grad():
            per_sample_loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return f"block {spoilt[0]}" if spoilt else "the head"


def _capture(
    model: nn.Module, params: Sequence[str], batches: Sequence[IndexedBatch], names: Sequence[str], description: str
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """One forward and backward per batch: for each matrix its (input_BTI, delta_BTO) of every batch."""
    kept: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    device = next(model.parameters()).device
    with _only_activations(model):
        for indices, batch in tqdm(batches, desc=description, disable=None, leave=False):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with _hooks(model, params, batch["attention_mask"].bool(), kept), torch.enable_grad():
                loss_B = per_sample_loss(model, batch)
                if not bool(loss_B.isfinite().all()):
                    sample = names[indices[int((~loss_B.isfinite()).nonzero()[0])]]
                    raise ValueError(
                        f"the loss of {sample} is not finite, from {first_non_finite_block(model, batch)} on; look at "
                        "that row and at the weights, or load the model in float32 (model.dtype=float32)"
                    )
                loss_B.sum().backward()
    return kept


@contextmanager
def _hooks(
    model: nn.Module,
    params: Sequence[str],
    mask_BT: Tensor,
    kept: dict[str, list[tuple[Tensor, Tensor]]],
) -> Iterator[None]:
    # q, k and v read the same tensor: its masked copy is made once. The entry keeps the original alive, since a
    # freed tensor's id may be given to another.
    shared: dict[int, tuple[Tensor, Tensor]] = {}

    def masked(values: Tensor) -> Tensor:
        # Some families (OPT) flatten samples and tokens. Where, not a product: padded positions may hold NaN.
        values_BTF = values.detach().reshape(*mask_BT.shape, -1)
        return values_BTF.where(mask_BT[..., None], 0)

    def forward_hook(param: str):
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output_BTO: Tensor) -> None:
            original = inputs[0]
            if id(original) not in shared:
                shared[id(original)] = original, masked(original)
            input_BTI = shared[id(original)][1]
            if not output_BTO.requires_grad:  # the first matrix of the pass: the backward ends here
                output_BTO.requires_grad_()
            output_BTO.register_hook(lambda delta_BTO: kept[param].append((input_BTI, masked(delta_BTO))))

        return keep

    modules = [(param, bare(model).get_submodule(param.removesuffix(".weight"))) for param in params]
    handles = [module.register_forward_hook(forward_hook(param)) for param, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gram(factors: Sequence[tuple[Tensor, Tensor]], num_samples: int, slab_bytes: float | None = None) -> Tensor:
    """Σ over slabs of output rows of G_SR G_SRᵀ, with G_SR = δᵀa of those rows: (S×S) in the batches' order.

    slab_bytes: None keeps a slab inside a processor's cache, or a GPU busy.
    """
    dtype = torch.promote_types(factors[0][0].dtype, torch.float32)
    input_STI = _stacked([inputs for inputs, _ in factors], dtype)
    delta_SOT = _stacked([delta for _, delta in factors], dtype).mT.contiguous()
    if len(input_STI) != num_samples:
        raise ValueError("a linear layer ran several times in one forward: shared layers cannot be measured")
    num_outputs, num_inputs = delta_SOT.shape[1], input_STI.shape[2]
    slab_bytes = slab_bytes or (1.6e7 if input_STI.device.type == "cpu" else 1e9)
    num_rows = min(num_outputs, max(1, int(slab_bytes / (num_samples * num_inputs * dtype.itemsize))))
    gram_SS = input_STI.new_zeros(num_samples, num_samples)
    memory = input_STI.new_empty(num_samples * num_rows * num_inputs)  # one slab's, used again for each
    for rows_SRT in delta_SOT.split(num_rows, dim=1):
        size = num_samples * rows_SRT.shape[1] * num_inputs
        slab_SRI = torch.bmm(rows_SRT, input_STI, out=memory[:size].view(num_samples, -1, num_inputs))
        slab_SR = slab_SRI.flatten(1)
        gram_SS.addmm_(slab_SR, slab_SR.mT)
    return gram_SS


def _stacked(parts_BTF: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All batches as one (S×T×F), shorter ones followed by zeros, which add nothing to a product."""
    longest = max(part.shape[1] for part in parts_BTF)
    return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts_BTF]).to(dtype)


def _split(param: str, gram_SS: Tensor, num_train: int, numel: int, names: Sequence[str]) -> MatrixGram:
    norms_S = gram_SS.diagonal()
    if not bool(norms_S.isfinite().all()):
        sample = names[int((~norms_S.isfinite()).nonzero()[0])]
        raise ValueError(
            f"the gradient of {param} is not finite for {sample}; "
            "look at that row, or load the model in float32 (model.dtype=float32)"
        )
    gram_SS = gram_SS.cpu()
    return MatrixGram(
        train_train=gram_SS[:num_train, :num_train].clone(),
        val_train=gram_SS[num_train:, :num_train].clone(),
        val_norms=gram_SS.diagonal()[num_train:].clamp(min=0).sqrt(),
        numel=numel,
    )


def _groups(model: nn.Module, layers: LayerMap, num_tokens: int, memory: float) -> list[list[int]]:
    """Consecutive blocks whose kept inputs and output gradients fit into `memory` bytes together."""
    groups: list[list[int]] = [[]]
    used = 0.0
    for index, params in enumerate(layers.params):
        weights = [bare(model).get_parameter(param) for param in params]
        size = num_tokens * sum(sum(weight.shape) * weight.element_size() for weight in weights)
        if groups[-1] and used + size > memory:
            groups.append([])
            used = 0.0
        groups[-1].append(index)
        used += size
    return groups


def _free_memory(device: torch.device) -> float:
    """Bytes that could be taken now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@contextmanager
def _only_activations(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient for any weight, both put back afterwards."""
    training = {module: module.training for module in model.modules()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in wanted:
            parameter.requires_grad_()
