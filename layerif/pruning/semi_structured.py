"""torch's 2:4 semi-structured format, which halves the weights in memory and is faster on GPUs that support it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from layerif.models.stored import AnyLinear


def is_two_four(weight: Tensor) -> bool:
    """Tells if at most 2 of every 4 consecutive weights of a row (O×I) are not zero."""
    return weight.shape[1] % 4 == 0 and bool(((weight != 0).view(len(weight), -1, 4).sum(dim=2) <= 2).all())


def speed_of_two_four(linears: Mapping[str, AnyLinear], num_tokens: int, rounds: int = 20) -> float:
    """Measures how many times faster the products of all matrices are in the 2:4 format.

    It sums the median time of each matrix and copies one matrix at a time.

    Args:
        linears: the linear layers by name.
        num_tokens: the number of tokens of the input.
        rounds: the number of products per matrix.

    Raises:
        ValueError: there is no GPU of compute capability 8.0 or more, or a weight is not in half precision or not 2:4.
    """
    dense = sparse = 0.0
    for name, linear in linears.items():
        weight = linear.weight.detach()
        _check(name, weight)
        packed = torch.sparse.to_sparse_semi_structured(weight)
        input_TI = torch.randn(num_tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
        dense += _median_seconds(lambda x=input_TI, w=weight: nn.functional.linear(x, w), rounds)
        sparse += _median_seconds(lambda x=input_TI, w=packed: nn.functional.linear(x, w), rounds)
    return dense / sparse


def _check(name: str, weight: Tensor) -> None:
    without = "without it zeros alone save neither time nor memory"
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise ValueError(
            f"torch's 2:4 format needs a CUDA device of compute capability 8.0 or more, the model is on "
            f"{weight.device}; {without}"
        )
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"torch's 2:4 format needs half precision, {name} is {weight.dtype}: model.dtype=bfloat16")
    if not is_two_four(weight):
        raise ValueError(f"{name} is not 2:4; prune with pruner.n=2 pruner.m=4: {without}")


def _median_seconds(work: Callable[[], object], rounds: int) -> float:
    times = []
    for number in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
