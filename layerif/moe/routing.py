"""The choices of the routers in the last forward, and the load-balancing loss of these choices.

Letters: N counted tokens, E experts, K chosen experts of a token.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from layerif.data.rows import IGNORED
from layerif.models.blocks import device_of


def balance_loss(model: nn.Module) -> Tensor:
    """Computes the mean over the routed layers of E·Σ_e f_e·P_e in the last forward.

    f_e is the share of the N·K assignments that expert e got (without a gradient); P_e is the mean probability of
    expert e over the N tokens, before top-k. Padding, where `attention_mask` is 0, counts in neither. This is the loss
    of the Switch Transformer with f normalised over the K choices. Layers with one expert have no router and do not
    enter the mean. A forward keeps its routing where `balance_coefficient` is above 0, and inside
    `record_routing(model)`.

    A training forward that is given `labels` adds `balance_coefficient` times this to the model's own loss. The value
    has no gradient then, so that adding it once more would train nothing twice.

    Returns:
        A scalar: 1 where the load is balanced, at most E/K, and 0 for a model without routers.

    Raises:
        ValueError: no routing was kept, the mask does not fit the tokens, or reentrant checkpointing cut the gradient.
    """
    routing = last_forward(model)
    if not routing.records:
        return torch.zeros((), device=device_of(model))
    if not routing.is_added and routing.with_grad:
        routing.unread = False
    mean = _mean_balance(routing.records, routing)
    return mean.detach() if routing.is_added else mean


def _mean_balance(records: Sequence[Record], routing: Routing) -> Tensor:
    """Computes the mean of E·Σ_e f_e·P_e over some routers."""
    terms = []
    for record in records:
        if routing.with_grad and record.trainable and not record.logits.requires_grad:
            raise ValueError(
                f"the router of {record.name} has no gradient: reentrant gradient checkpointing drops it; "
                'use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        probs_NE, load_E = _probabilities(record, routing.attention_mask)
        terms.append(probs_NE.shape[1] * (load_E * probs_NE.mean(dim=0)).sum())
    device = terms[0].device  # a model split over devices leaves its routers on several
    return torch.stack([term.to(device) for term in terms]).mean()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[None]:
    """Makes every forward inside the context keep its routing, for `expert_usage` and `balance_loss`."""
    routing = routing_of(model)
    if routing is None:
        raise _no_layers(model)
    before, routing.asked = routing.asked, True
    try:
        yield
    finally:
        routing.asked = before


class Record(NamedTuple):
    """One router's part of the last forward; `trainable` says that its weight asked for a gradient."""

    name: str
    adapter: str
    logits: Tensor
    top_k: int
    trainable: bool
    coefficient: float  # the weight of the balance loss


class _TermPerToken(torch.autograd.Function):
    """Takes a term from the log-probability of every counted token, so that their mean loss has the term in it.

    TRL trains on the sum of these, divided by a number of tokens that the model does not know. The gradient that comes
    back holds that number. It must be the same at every token, or the term would get a weight that nobody asked for.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, term: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return log_probs - term.to(log_probs.device, log_probs.dtype) * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (mask,) = ctx.saved_tensors
        of_tokens = gradient[mask]
        if of_tokens.numel() and bool((of_tokens != of_tokens[0]).any()):
            raise ValueError(
                "the balance loss cannot be part of a loss that weighs tokens differently, as TRL's loss_type='dft' or "
                "a loss of preferences does; use loss_type='nll', or balance_coefficient=0"
            )
        return gradient, -of_tokens.sum(), None


class Routing:
    """The routing that the LoRA-MoE layers of one model share; it opens before a forward and closes after it.

    Blocks that gradient checkpointing runs again during backward find it closed, so their routing does not count twice
    and does not replace the routing behind the loss. It keeps references only and adds no operation to the forward, so
    both runs of a checkpointed block are the same.
    """

    def __init__(self) -> None:
        self.asked = False
        self.unread = False  # the balance loss of the last training forward has reached no gradient and no reader
        self.after_forward: Callable[[Routing], None] | None = None
        self._handles: list[Any] = []
        self._forget()

    def watch(self, model: nn.Module) -> None:
        """Follows the forwards of `model`, which PEFT's wrappers and `generate` call, too."""
        self.unwatch()
        self._handles = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]

    def unwatch(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def keep(self, record: Record) -> None:
        """Keeps a router's part where its adapter balances, or `record_routing` asks for it."""
        if self.is_open and (record.coefficient or self.asked):
            self.records.append(record)
            self.unread |= bool(record.coefficient) and record.trainable and self.with_grad

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the last forward out of a copied or pickled model; a tensor inside a graph cannot be copied."""
        return self.__dict__ | {
            "records": [],
            "attention_mask": None,
            "unread": False,
            "is_added": False,
            "is_open": False,
            "after_forward": None,
        }

    def _open(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.unread and torch.is_grad_enabled():
            warnings.warn(
                "balance_coefficient is above 0 but the last training step left the balance loss out: give the model "
                "labels and train on its own loss (label smoothing and a compute_loss_func do not), or add "
                "balance_coefficient * balance_loss(model) to the loss",
                stacklevel=2,
            )
            self.unread = False
        self._forget()
        self.is_open = True
        self.with_grad = torch.is_grad_enabled()
        self.attention_mask = _named(model, args, kwargs).get("attention_mask")

    def _close(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self.is_open = False
        if output is None:  # the forward failed
            return None
        if self.after_forward is not None:
            self.after_forward(self)
        given = _named(model, args, kwargs)
        has_loss = isinstance(output, tuple) or getattr(output, "loss", None) is not None
        if not self.unread or not self.with_grad or all(given.get(name) is None for name in _LABELS) or not has_loss:
            return None
        return self._with_term(output, given)

    def _with_term(self, output: Any, given: Mapping[str, Any]) -> Any:
        """Adds the balance loss to the model's own loss, and to the log-probabilities in its place that TRL reads."""
        term = sum(
            of_adapter[0].coefficient * _mean_balance(of_adapter, self)
            for adapter in {record.adapter for record in self.records}
            if (of_adapter := [record for record in self.records if record.adapter == adapter])[0].coefficient
        )
        assert isinstance(term, Tensor)
        term.register_hook(self._reached)
        self.is_added = True
        of_batch = term * _share(given)
        if isinstance(output, tuple):
            return (output[0] + of_batch.to(output[0].device), *output[1:])
        output.loss = output.loss + of_batch.to(output.loss.device)
        if getattr(output, "log_probs", None) is not None:
            output.log_probs = _TermPerToken.apply(output.log_probs, term, output.label_mask)
        return output

    def _reached(self, gradient: Tensor) -> None:
        self.unread = False

    def _forget(self) -> None:
        self.is_open = False
        self.with_grad = False
        self.is_added = False
        self.records: list[Record] = []
        self.attention_mask: Any = None


_LABELS = ("labels", "shift_labels")


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the arguments of a forward by their names."""
    named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) if args else {}
    return named | dict(kwargs)


def _share(given: Mapping[str, Any]) -> Any:
    """Gives the share of a batch in the step of the optimiser: that of its tokens, where the model is told of all.

    A model of transformers that is given `num_items_in_batch` sums its loss over tokens and divides by this number, and
    the trainer adds such losses up over the batches of a step.
    """
    of_step = given.get("num_items_in_batch")
    if of_step is None:
        return 1
    shifted = given.get("shift_labels")
    labels = given["labels"][..., 1:] if shifted is None else shifted
    return (labels != IGNORED).sum() / of_step


def routing_of(model: nn.Module) -> Routing | None:
    """Returns the routing of the LoRA-MoE layers of `model`; None where it has no such layer."""
    layers = _routing_layers(model)
    return layers[0].routing if layers else None


def last_forward(model: nn.Module) -> Routing:
    """Returns the routing of the last forward. Raises ValueError where routers ran and kept nothing."""
    layers = _routing_layers(model)
    if not layers:
        raise _no_layers(model)
    routing: Routing = layers[0].routing
    if not routing.records and any(layer.has_router for layer in layers):
        raise ValueError(
            "the last forward kept no routing: run it with an enabled adapter whose balance_coefficient is above 0, "
            "or inside `with record_routing(model):`"
        )
    return routing


def _routing_layers(model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "routing", None), Routing)
    ]


def _no_layers(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} has no LoRA-MoE layer; wrap it with get_peft_model(model, LoraMoeConfig(...))"
    )


def _probabilities(record: Record, attention_mask: Any) -> tuple[Tensor, Tensor]:
    """Returns the router probabilities of the counted tokens (N × E) and the load f (E), which has no gradient."""
    logits_NE = record.logits.flatten(0, -2)
    if attention_mask is not None:
        logits_NE = logits_NE[counted(attention_mask, len(logits_NE)).to(logits_NE.device)]
    chosen = logits_NE.detach().topk(record.top_k, dim=-1).indices.flatten()
    counts_E = torch.zeros_like(logits_NE[0]).index_add(0, chosen, torch.ones_like(chosen, dtype=logits_NE.dtype))
    return logits_NE.softmax(dim=-1), counts_E / len(chosen)


def counted(attention_mask: Any, num_tokens: int) -> Tensor:
    """Returns the mask of the tokens that a layer saw, without the earlier ones that a cache holds."""
    shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else ()
    if len(shape) != 2 or num_tokens % shape[0] or num_tokens > shape[0] * shape[1]:
        raise ValueError(
            f"cannot tell padding from attention_mask {shape or type(attention_mask).__name__} "
            f"for {num_tokens} tokens: "
            "give a (batch × tokens) mask, 1 for a token and 0 for padding"
        )
    return attention_mask[:, -(num_tokens // shape[0]) :].flatten() != 0
