"""Weight matrices that a model stores in another way than an nn.Linear: turned, or those of many experts in one tensor.

Each looks like a linear layer (`weight`, `in_features`, `out_features`), and writes to its weight reach the model's own
tensor. Fused experts run all at once; while hooks look at them, they run one after the other (`apart`).

Letters in shape suffixes: T tokens of a batch, K experts a token is sent to, R tokens that are sent to one expert, E
experts, I inputs and O outputs of a matrix, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layerif.models.quantised import is_packed, weight_in


@dataclass(frozen=True)
class Stored:
    """One weight matrix of a module that is not an nn.Linear.

    Attributes:
        holder: the module with the tensor.
        kind: the name of the tensor there.
        expert: the number of the matrix in the tensor; None where the tensor is the matrix.
        is_turned: the tensor has the inputs before the outputs.
    """

    holder: nn.Module
    kind: str
    expert: int | None = None
    is_turned: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Returns this matrix (O×I) in a tensor of the holder's layout, such as the gradient."""
        one = tensor if self.expert is None else tensor[self.expert]
        return one.mT if self.is_turned else one

    @property
    def parameter(self) -> nn.Parameter:
        """The holder's tensor."""
        return getattr(self.holder, self.kind)

    @property
    def weight(self) -> Tensor:
        """The matrix (O×I), a view of the holder's tensor."""
        return self.of(self.parameter)

    @property
    def bias(self) -> Tensor | None:
        """The bias (O) of an expert; None where it has none."""
        biases_EO = getattr(self.holder, f"{self.kind}_bias", None)
        return None if biases_EO is None else biases_EO[self.expert]

    @property
    def out_features(self) -> int:
        """The number of outputs."""
        return self._shape[0]

    @property
    def in_features(self) -> int:
        """The number of inputs."""
        return self._shape[1]

    @property
    def _shape(self) -> tuple[int, int]:
        # Not that of the weight: choosing an expert of a tensor that is spread over processes needs all of them.
        first, second = self.parameter.shape[-2:]
        return (second, first) if self.is_turned else (first, second)


class Packed(Stored):
    """The weight of a linear layer that keeps it quantised: its numbers are made anew each time, writes are lost."""

    @property
    def parameter(self) -> nn.Parameter:
        own = (*self.holder.parameters(recurse=False), *self.holder.buffers(recurse=False))
        return own[0]  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        return weight_in(self.holder)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.holder, "bias", None)

    @property
    def out_features(self) -> int:
        return int(self.holder.out_features)  # type: ignore[arg-type]

    @property
    def in_features(self) -> int:
        return int(self.holder.in_features)  # type: ignore[arg-type]


AnyLinear = nn.Linear | Stored


def tensor_of(linear: AnyLinear) -> nn.Parameter:
    """Returns the model's own tensor that holds a weight."""
    return linear.parameter if isinstance(linear, Stored) else linear.get_parameter("weight")


def stored_in(module: nn.Module) -> dict[str, Stored]:
    """Returns the matrices of a module that stores them in another way, by their names inside the module.

    These are a Conv1D and a quantised layer, whose matrix has an empty name, and fused experts of transformers:
    `3.down_proj`.
    """
    if isinstance(module, Conv1D):
        return {"": Stored(module, "weight", is_turned=True)}
    if is_packed(module):
        return {"": Packed(module, "weight")}
    if not _is_fused(module):
        return {}
    kinds = _kinds(module)
    number = len(getattr(module, kinds[0]))
    return {f"{one}.{kind}": _of_expert(module, kind, one) for one in range(number) for kind in kinds}


def expert_at(module: nn.Module, kind: str, expert: int) -> Stored | None:
    """Returns one matrix of one expert of a module; None where it is not one of fused experts that have it."""
    is_there = _is_fused(module) and kind in _kinds(module) and expert < len(getattr(module, kind))
    return _of_expert(module, kind, expert) if is_there else None


def norm_behind(stored: Stored) -> nn.Module | None:
    """Returns the norm between the second matrix of fused experts and what an expert adds; None: there is none."""
    return getattr(stored.holder, "post_expert_norm", None) if _has_norm(stored.holder) else None


def fused_experts(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that hold the experts of a block in one tensor."""
    return [module for module in model.modules() if _is_fused(module)]


def expert_tensors(model: nn.Module) -> list[str]:
    """Names the tensors of all fused experts, as PEFT's `target_parameters` takes them."""
    return [f"{name}.{kind}" for name, module in model.named_modules() if _is_fused(module) for kind in _kinds(module)]


class _Expert(nn.Module):
    """One matrix of one expert as a module, so that hooks can look at it.

    It is called with the tokens that are sent to the expert (R×I), and with their places among all tokens (R).
    """

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored = (stored,)  # a module in a tuple does not become a child

    @property
    def weight(self) -> Tensor:
        return self.stored[0].weight

    def forward(self, input_RI: Tensor, places_R: Tensor) -> Tensor:
        return F.linear(input_RI, self.weight, self.stored[0].bias)


class Apart:
    """Makes modules of the matrices of fused experts, and lets the experts run one after the other."""

    def __init__(self) -> None:
        self._parts: dict[nn.Module, dict[tuple[str, int], _Expert]] = {}

    def module_of(self, stored: Stored) -> nn.Module:
        """Returns the module that runs with a matrix: its holder, or a part of fused experts."""
        if stored.expert is None:
            return stored.holder
        if stored.holder not in self._parts:
            parts = stored_in(stored.holder).values()
            self._parts[stored.holder] = {(part.kind, part.expert or 0): _Expert(part) for part in parts}
        return self._parts[stored.holder][stored.kind, stored.expert]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Lets the experts run one after the other while the context is open."""
        forwards = {}
        for holder, parts in self._parts.items():
            forward = _routed if hasattr(holder, "has_gate") else _sorted
            forwards[holder] = _bound(forward, holder, parts)
        with standing_in(forwards):
            yield


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Keeps other functions in the place of the forwards of modules while the context is open."""
    own = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
            if module in own:
                module.forward = own[module]


def _is_fused(module: nn.Module) -> bool:
    """Tells if a module holds experts whose layout is known: transformers declares it, and Llama 4 has its own."""
    is_declared = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "_apply_gate", "down_proj"))
    return (is_declared and isinstance(module.down_proj, Tensor)) or type(module).__name__ == "Llama4TextExperts"


def _kinds(fused: nn.Module) -> list[str]:
    return [name for name, each in fused.named_parameters(recurse=False) if each.ndim == 3]


def _of_expert(fused: nn.Module, kind: str, expert: int) -> Stored:
    return Stored(fused, kind, expert, is_turned=bool(getattr(fused, "is_transposed", True)))


def _has_norm(fused: nn.Module) -> bool:
    return bool(getattr(fused, "has_post_expert_norm", False))


def _bound(forward: Any, holder: nn.Module, parts: Mapping[tuple[str, int], _Expert]) -> Any:
    return lambda *args, **kwargs: forward(holder, parts, *args, **kwargs)


def _routed(
    holder: Any,
    parts: Mapping[tuple[str, int], _Expert],
    hidden_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Runs experts that are told which tokens are theirs."""
    first = "gate_up_proj" if holder.has_gate else "up_proj"
    total_TH = torch.zeros_like(hidden_TH)
    for expert in range(len(holder.down_proj)):
        places_R, slot_R = (index_TK == expert).nonzero(as_tuple=True)
        if not len(places_R):
            continue
        inner_RI = parts[first, expert](hidden_TH[places_R], places_R)
        inner_RI = holder._apply_gate(inner_RI) if holder.has_gate else holder.act_fn(inner_RI)
        output_RH = parts["down_proj", expert](inner_RI, places_R)
        if _has_norm(holder):
            output_RH = holder.post_expert_norm(output_RH)
        weighted_RH = output_RH * weights_TK[places_R, slot_R, None]
        total_TH = total_TH.index_add(0, places_R, weighted_RH.to(total_TH.dtype))
    return total_TH


def _sorted(holder: Any, parts: Mapping[tuple[str, int], _Expert], hidden_TH: Tensor) -> Tensor:
    """Runs the experts of Llama 4, each of which is given all tokens, zero where they are not its own."""
    hidden_ETH = hidden_TH.view(len(holder.down_proj), -1, hidden_TH.shape[-1])
    outputs = []
    for expert, own_TH in enumerate(hidden_ETH):
        places_R = own_TH.any(dim=-1).nonzero()[:, 0]
        output_TH = torch.zeros_like(own_TH)
        if len(places_R):
            gate_RI, up_RI = parts["gate_up_proj", expert](own_TH[places_R], places_R).chunk(2, dim=-1)
            output_RH = parts["down_proj", expert](up_RI * holder.act_fn(gate_RI), places_R)
            output_TH = output_TH.index_copy(0, places_R, output_RH)
        outputs.append(output_TH)
    return torch.cat(outputs)
