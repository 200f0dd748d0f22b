"""Compares the time and memory of the LoRA-MoE linear with loops over experts and with plain LoRA of the same size.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python experiments/benchmark_first_light/moe_linear.py

It runs forward + backward of one 576 × 576 linear (SmolLM2-135M's width) on 8 × 128 tokens, with rank 8 and top 2. The
contestants take turns in one process, and each figure is a median over rounds. Saved bytes are those of the distinct
storages that autograd keeps for backward, without dropout. Parameters and the layer's own input do not count, because
the caller holds them anyway.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig
from torch import Tensor, nn

from experiments.timing import seconds as seconds_of
from layerif.moe import LoraMoeConfig, LoraMoeLinear
from layerif.moe.routing import Routing

WIDTH, RANK, ALPHA, TOP_K, DROPOUT = 576, 8, 16, 2, 0.05
BATCH, TOKENS = 8, 128


class ExpertLoop(nn.Module):
    """The same layer from its definition: every expert computes the tokens that are routed to it, and adds them in.

    Args:
        base_layer: the frozen linear.
        num_experts: the number of experts.
        dropout: the rate of dropout before every expert.
        dense: every expert computes all tokens, with weight zero where it was not chosen.
    """

    def __init__(self, base_layer: nn.Linear, num_experts: int, dropout: float, *, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        width_in, width_out = base_layer.in_features, base_layer.out_features
        self.base_layer = base_layer
        self.router = nn.Linear(width_in, num_experts, bias=False)
        self.down = nn.ModuleList([nn.Linear(width_in, RANK, bias=False) for _ in range(num_experts)])
        self.up = nn.ModuleList([nn.Linear(RANK, width_out, bias=False) for _ in range(num_experts)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = F.softmax(self.router(tokens).float(), dim=-1).topk(TOP_K, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        routed = F.one_hot(chosen, len(self.down)).permute(2, 1, 0)
        mixed = tokens.new_zeros(len(tokens), self.base_layer.out_features)
        for expert, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            if self.dense:
                gate = (weights * routed[expert].T).sum(dim=-1, keepdim=True)
                mixed = mixed + up(down(self.dropout(tokens))) * (ALPHA / RANK) * gate
                continue
            slot, token = torch.where(routed[expert])
            output = up(down(self.dropout(tokens[token]))) * (ALPHA / RANK) * weights[token, slot, None]
            mixed.index_add_(0, token, output)
        return self.base_layer(x) + mixed.view(*x.shape[:-1], -1)


def measure(
    experts: tuple[int, ...] = (2, 5, 10), *, device: str = "cpu", dropout: float = DROPOUT, rounds: int = 40
) -> list[dict[str, Any]]:
    """Measures ours, both loops and LoRA, with one row per number of experts.

    A row has median milliseconds, saved bytes and ratios. Ratios to the loop take the faster loop for the time and the
    smaller one for the bytes.
    """
    rows = []
    for num_experts in experts:
        times = _interleaved(_contestants(num_experts, dropout, device), device, rounds)
        saved = {
            name: saved_bytes(layer, _input(device)) for name, layer in _contestants(num_experts, 0, device).items()
        }
        rows.append(
            {
                "device": device,
                "threads": torch.get_num_threads(),
                "num_experts": num_experts,
                "milliseconds": times,
                "faster_than_loop": min(times["loop"], times["dense loop"]) / times["ours"],
                "time_over_lora": times["ours"] / times["lora"],
                "saved_bytes": saved,
                "saved_over_loop": saved["ours"] / min(saved["loop"], saved["dense loop"]),
            }
        )
    return rows


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Counts the bytes of the distinct storages kept for backward, without parameters and x."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [x, *layer.parameters()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _output = layer(x)
    return sum(kept.values())


def _contestants(num_experts: int, dropout: float, device: str) -> dict[str, nn.Module]:
    """Builds ours, the loops, and a LoRA of the nearest rank that has as many parameters, the router's included."""
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    config = LoraMoeConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, num_experts=num_experts, top_k=TOP_K)
    ours = LoraMoeLinear(linear, "default", config, num_experts, "linear", Routing())
    rank = round(sum(p.numel() for p in ours.parameters() if p.requires_grad) / (2 * WIDTH))
    lora_config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
    lora = LoraLinear(linear, "default", config=lora_config, r=rank, lora_alpha=2 * rank)
    layers = {
        "ours": ours,
        "loop": ExpertLoop(linear, num_experts, dropout, dense=False),
        "dense loop": ExpertLoop(linear, num_experts, dropout, dense=True),
        "lora": lora,
    }
    return {name: layer.to(device) for name, layer in layers.items()}


def _input(device: str) -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, device=device).requires_grad_()


def _interleaved(layers: dict[str, nn.Module], device: str, rounds: int) -> dict[str, float]:
    x = _input(device)
    gradient = torch.randn_like(x)
    for layer in layers.values():
        seconds_of(lambda layer=layer: layer(x).backward(gradient), device)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            seconds[name].append(seconds_of(lambda layer=layer: layer(x).backward(gradient), device))
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, forward + backward")
        print("experts   ours ms   loop ms  dense ms   LoRA ms   loop/ours   ours/LoRA   saved ours/loop")
        for row in measure(device=device):
            ms = row["milliseconds"]
            print(
                f"{row['num_experts']:7d}{ms['ours']:10.2f}{ms['loop']:10.2f}{ms['dense loop']:10.2f}{ms['lora']:10.2f}"
                f"{row['faster_than_loop']:12.2f}{row['time_over_lora']:12.2f}{row['saved_over_loop']:18.3f}"
            )


if __name__ == "__main__":
    main()
