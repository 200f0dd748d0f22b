"""Targets say how many weights each matrix of a model loses, by an allocation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from layerif.checks import did_you_mean, is_number
from layerif.layers import check_named, is_named
from layerif.models.blocks import bare, blocks, linears, refuse_unknown_experts
from layerif.models.quantised import refuse_quantised_block
from layerif.models.stored import AnyLinear, tensor_of
from layerif.pruning import Pruner
from layerif.pruning.mask import check_width, counts, kept_of_m


@dataclass(frozen=True)
class Target:
    """The weights that a matrix loses: a fraction of them, or all but n of every m."""

    sparsity: float | None = None
    n: int | None = None


def targets(model: nn.Module, allocation: Mapping[str, float], pruner: Pruner) -> dict[str, dict[str, Target]]:
    """Returns the target of every linear layer, by block and by its name inside the block.

    All matrices together lose exactly round(Σ sparsity·numel) weights. With n of every m they lose the nearest number
    that a whole n per block or matrix allows.

    Args:
        model: the model, with or without weights.
        allocation: the sparsity by block (`model.layers.3`) or by matrix (`model.layers.3.mlp.up_proj`), which has
            precedence over its block.
        pruner: says n and m, and which matrices stay dense.

    Raises:
        ValueError: the allocation has a name that the model lacks, misses a matrix or holds a sparsity outside [0, 1),
            m does not divide a width, or a block has experts in a layout that is not known.
    """
    found = matrices(model, skip_unsupported=pruner.skip_unsupported)
    check_named(tuple(found), pruner.skip)
    skipped = {name for name in found if is_named(name, pruner.skip)}
    everything, found = found, {name: module for name, module in found.items() if name not in skipped}
    if not found:
        raise ValueError(f"pruner.skip={list(pruner.skip)} leaves no matrix; name fewer")
    allocation = {key: each for key, each in allocation.items() if not _holds_only(key, everything, skipped)}
    keys = _keys(allocation, found)
    numel = {name: module.weight.numel() for name, module in found.items()}
    if pruner.m is None:
        counted = counts(sparsities(found, allocation), numel)
        flat = {name: Target(sparsity=counted[name] / numel[name]) for name in found}
    else:
        for name, module in found.items():
            check_width(module.in_features, pruner.m, name)
        kept = _kept(allocation, keys, numel, pruner.m) if pruner.n is None else dict.fromkeys(allocation, pruner.n)
        for key, sparsity in allocation.items():
            if pruner.n is not None and abs(sparsity - (1 - pruner.n / pruner.m)) > 1e-6:
                raise ValueError(
                    f"pruner.n={pruner.n} pruner.m={pruner.m} removes {1 - pruner.n / pruner.m} everywhere, but "
                    f"{key} is allocated {sparsity:.6f}; use estimator=uniform "
                    f"allocator.target={1 - pruner.n / pruner.m}, or pruner.n=null for an n per block"
                )
        flat = {name: Target(n=kept[keys[name]]) for name in found}
    flat |= dict.fromkeys(skipped, Target(sparsity=0.0))
    return {
        block_name: {name: flat[f"{block_name}.{name}"] for name, _ in linears(block)}
        for block_name, block in blocks(model).items()
    }


def sparsities(names: Collection[str], allocation: Mapping[str, float]) -> dict[str, float]:
    """Returns the sparsity of every matrix in `names`, its own or that of its block, with the checks of `targets`."""
    return {name: allocation[key] for name, key in _keys(allocation, names).items()}


def matrices(model: nn.Module, *, skip_unsupported: bool = True) -> dict[str, AnyLinear]:
    """Returns every linear layer inside the blocks by its full name.

    Args:
        model: the model, with or without weights.
        skip_unsupported: leave out experts in a layout that is not known.

    Raises:
        ValueError: a block has quantised weights or experts in a layout that is not known, or two layers share a
            weight.
    """
    found: dict[str, AnyLinear] = {}
    for block_name, block in blocks(model).items():
        refuse_quantised_block(block_name, block)
        if not skip_unsupported:
            refuse_unknown_experts(block_name, block, "all", "prune the rest with pruner.skip_unsupported=true")
        found |= {f"{block_name}.{name}": linear for name, linear in linears(block)}
    if not found:
        raise ValueError(
            f"{type(bare(model)).__name__} has no blocks with linear layers; prune a decoder-only transformer"
        )
    owners: dict[tuple[int, int | None], str] = {}
    for name, linear in found.items():
        key = id(tensor_of(linear)), getattr(linear, "expert", None)
        if (other := owners.setdefault(key, name)) != name:
            raise ValueError(
                f"{name} shares its weight with {other}, and shared weights cannot be pruned block by block; untie them"
            )
    return found


def _keys(allocation: Mapping[str, float], found: Collection[str]) -> dict[str, str]:
    """Finds the most specific name in the allocation for every matrix."""
    used = {name: _covering(name, allocation) for name in found}
    known = [*found, *{name.rpartition(".")[0] for name in found}]
    for key, sparsity in allocation.items():
        if not any(_covers(key, name) for name in found):
            raise ValueError(
                f"the allocation names {key!r}, which holds no linear layer{did_you_mean(key, known)}; name blocks or "
                f"matrices, such as {known[0]}"
            )
        if not is_number(sparsity) or not 0 <= sparsity < 1:
            raise ValueError(f"the sparsity of {key} is {sparsity}; allowed: a number of at least 0 and below 1")
    if missing := [name for name, key in used.items() if key is None]:
        raise ValueError(
            f"the allocation has no sparsity for {missing[0]} ({len(missing)} of {len(found)} matrices have none); "
            "name its block or the matrix"
        )
    return {name: key for name, key in used.items() if key is not None}


def _holds_only(key: str, found: Collection[str], skipped: Collection[str]) -> bool:
    """Tells if a name in an allocation decides about matrices that stay dense, and about no other."""
    covered = [name for name in found if _covers(key, name)]
    return bool(covered) and all(name in skipped for name in covered)


def most_specific(name: str, allocation: Mapping[str, float]) -> str:
    """Finds the name in the allocation that decides about a matrix: its own, or else that of the module around it."""
    found = _covering(name, allocation)
    assert found is not None, name
    return found


def _covering(name: str, allocation: Mapping[str, float]) -> str | None:
    return max((key for key in allocation if _covers(key, name)), key=len, default=None)


def _covers(key: str, name: str) -> bool:
    return f"{name}.weight".startswith(f"{key}.") or key == f"{name}.weight"


def _kept(allocation: Mapping[str, float], keys: Mapping[str, str], numel: Mapping[str, int], m: int) -> dict[str, int]:
    sizes = dict.fromkeys(allocation, 0)
    for name, key in keys.items():
        sizes[key] += numel[name]
    return kept_of_m(allocation, sizes, m)
