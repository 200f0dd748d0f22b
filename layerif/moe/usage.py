"""The use of the experts by the routers of a LoRA-MoE, over one forward or many.

Letters: R routers of one shape, N tokens, E experts, K chosen experts of a token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from layerif.moe.routing import Record, Routing, counted, last_forward, record_routing, routing_of

UNUSED = 0.1  # in units of an even share, 1/E
WASTED = 0.25  # share of all experts; that a third of the routers has an unused one after a short run is normal


@dataclass(frozen=True)
class ExpertUsage:
    """The use of one router's experts over some tokens, without padding.

    Args:
        load: the share of the assignments (K per token) that each expert got (E,); sums to 1.
        weight: the mean routing weight of each expert (E,), 0 for a token that did not choose it; sums to 1.
        entropy: the mean over tokens of −Σ p·ln p, in nats, with the router's probabilities p before top-k: ln E where
            the router cannot tell experts apart, 0 where it is certain.
    """

    load: Tensor
    weight: Tensor
    entropy: float

    @property
    def unused(self) -> list[int]:
        """The experts with less than a tenth of an even share of the weight.

        The weight decides and not the load, because with K = E every expert gets the same load. Shazeer et al. (2017),
        section 4, describe how routers come to favour a few experts and train only those. The tenth is our choice.
        """
        return [expert for expert, weight in enumerate(self.weight.tolist()) if weight < UNUSED / len(self.weight)]


def expert_usage(model: nn.Module) -> dict[str, ExpertUsage]:
    """Returns the use of every routed layer in the last forward, by module name in the base model.

    Forwards keep their routing as for `balance_loss`, with the same errors. Where several adapters are active at once,
    `.adapter` follows the name.
    """
    meter = UsageMeter(with_grad=False)
    meter.add(last_forward(model))
    return meter.take()


@contextmanager
def measure_usage(model: nn.Module, *, with_grad: bool = False) -> Iterator[UsageMeter]:
    """Gives a meter of the forwards inside the context; it stays empty for a model without LoRA-MoE layers.

    Meters do not add up: an inner one replaces the outer one until it ends.

    Args:
        model: the model.
        with_grad: measure the forwards that build a graph, instead of those that do not.
    """
    meter = UsageMeter(with_grad)
    routing = routing_of(model)
    if routing is None:
        yield meter
        return
    before, routing.after_forward = routing.after_forward, meter.after_forward
    try:
        with record_routing(model):
            yield meter
    finally:
        routing.after_forward = before


class UsageMeter:
    """Sums over forwards, kept on the routers' devices, so that only `take` waits for a device."""

    def __init__(self, with_grad: bool) -> None:
        self.with_grad = with_grad
        self._sums: dict[tuple[str, ...], Tensor] = {}  # by the names of routers of one shape: (R, 2·E + 2)

    def after_forward(self, routing: Routing) -> None:
        """Adds the last forward if it ran with or without gradients as this meter wants."""
        if routing.with_grad == self.with_grad:
            self.add(routing)

    def add(self, routing: Routing) -> None:
        """Adds the last forward. Raises ValueError for a mask that does not fit the tokens."""
        several = len({record.adapter for record in routing.records}) > 1
        alike: dict[tuple[Any, ...], dict[str, Record]] = defaultdict(dict)
        for record in routing.records:
            name = f"{record.name}.{record.adapter}" if several else record.name
            shape = record.logits.device, record.logits.dtype, record.logits.shape, record.top_k
            alike[shape][name] = record
        with torch.no_grad():
            for records in alike.values():
                self._add(tuple(records), _sums(list(records.values()), routing.attention_mask))

    def state(self) -> dict[tuple[str, ...], Tensor]:
        """Returns the sums of this process since the last `take`, for another meter to `restore`."""
        return dict(self._sums)

    def restore(self, state: Mapping[tuple[str, ...], Tensor]) -> None:
        """Adds the sums that `state` of another meter returned."""
        for names, sums in state.items():
            self._add(names, sums)

    def take(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, ExpertUsage]:
        """Returns the use of each router since the last `take`; `reduce` adds the sums of all processes."""
        kept, self._sums = self._sums, {}
        if not kept:
            return {}
        device = next(iter(kept.values())).device  # a model split over devices leaves its routers on several
        flat = reduce(torch.cat([sums.flatten().to(device) for sums in kept.values()])).cpu()
        parts = flat.split([sums.numel() for sums in kept.values()])
        rows: dict[str, Tensor] = {}
        for (names, sums), part in zip(kept.items(), parts, strict=True):
            for name, row in zip(names, part.view(sums.shape), strict=True):
                rows[name] = rows[name] + row if name in rows else row
        return {name: _usage(row / row[-1]) for name, row in rows.items()}

    def _add(self, names: tuple[str, ...], sums: Tensor) -> None:
        self._sums[names] = self._sums[names].to(sums.device) + sums if names in self._sums else sums


def usage_by_block(usage: Mapping[str, ExpertUsage], blocks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns, for every block with routers, the mean `load` and `entropy` of its routers as plain numbers.

    Where the routers of a block have different numbers of experts, the load of an expert is the mean over those that
    have it, as a share of the sum.
    """
    found = {}
    for block in blocks:
        routers = [one for name, one in usage.items() if name.startswith(f"{block}.")]
        if routers:
            load = pad_sequence([one.load for one in routers], batch_first=True, padding_value=torch.nan).nanmean(dim=0)
            if len({len(one.load) for one in routers}) > 1:
                load = load / load.sum()
            found[block] = {"load": load.tolist(), "entropy": fmean(one.entropy for one in routers)}
    return found


def between_tasks(usage: Mapping[str, Mapping[str, ExpertUsage]]) -> dict[str, float]:
    """Computes how far each router's experts split the tasks, in nats.

    It is the Jensen-Shannon divergence of the loads of T tasks that weigh alike, which is the mutual information of
    task and expert: 0 where each task has the same load, at most ln T, where no expert serves two.

    Args:
        usage: by task and then by router.

    Returns:
        The divergence by router.
    """
    found = {}
    for router in next(iter(usage.values())):
        load_TE = torch.stack([of_task[router].load for of_task in usage.values()])
        of_mean, of_each = torch.special.entr(load_TE.mean(dim=0)).sum(), torch.special.entr(load_TE).sum(dim=1)
        found[router] = max(0.0, float(of_mean - of_each.mean()))
    return found


def describe_unused(usage: Mapping[str, ExpertUsage]) -> str | None:
    """Returns a sentence where at least a quarter of the experts is unused, and None otherwise."""
    num_experts = sum(len(one.load) for one in usage.values())
    num_unused = sum(len(one.unused) for one in usage.values())
    if not num_unused or num_unused < WASTED * num_experts:
        return None
    worst = max(usage, key=lambda name: len(usage[name].unused))
    return (
        f"{num_unused} of {num_experts} experts are hardly used (most in {worst}): spread tokens with "
        "method.balance_coefficient=0.001, or lower allocator.budget"
    )


def _sums(records: Sequence[Record], attention_mask: Any) -> Tensor:
    """Sums load, weight, entropy and the number of tokens, for routers of one shape."""
    logits_RNE = torch.stack([record.logits.detach().flatten(0, -2) for record in records])
    top_k = records[0].top_k
    top_RNK, chosen_RNK = logits_RNE.topk(top_k, dim=-1)
    nothing = torch.zeros_like(logits_RNE)
    load_RNE = nothing.scatter(-1, chosen_RNK, 1 / top_k)
    weight_RNE = nothing.scatter(-1, chosen_RNK, top_RNK.softmax(dim=-1))
    entropy_RN1 = torch.special.entr(logits_RNE.softmax(dim=-1)).sum(dim=-1, keepdim=True)
    each = torch.cat([load_RNE, weight_RNE, entropy_RN1, torch.ones_like(entropy_RN1)], dim=-1)
    if attention_mask is not None:  # no indexing by the mask, which would wait for the device
        each = each.where(counted(attention_mask, each.shape[1]).to(each.device)[:, None], 0)
    return each.sum(dim=1)


def _usage(means: Tensor) -> ExpertUsage:
    load_E, weight_E = means[:-2].chunk(2)
    return ExpertUsage(load_E, weight_E, float(means[-2]))
