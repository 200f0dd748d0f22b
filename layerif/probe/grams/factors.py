"""The factors of per-sample gradients: inputs and output gradients of linear layers, which hooks take from a batch.

The gradient of sample i's loss in the weight of a linear layer is a sum over its tokens, g_i = Σ_t δ_it a_itᵀ, with a
the layer's input and δ the loss gradient at its output. The weights themselves need no gradient, so that the pass costs
less than an ordinary backward.

Letters in shape suffixes: B samples of a batch, T tokens, I inputs and O outputs of a layer, F features of either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from layerif.models.blocks import device_of, dtype_of, linear_at
from layerif.models.contexts import evaluating
from layerif.models.hooks import first_non_finite_block, hooked
from layerif.models.loss import Loss, checked_loss, per_sample_loss
from layerif.models.stored import AnyLinear, Stored, fused_experts, standing_in

Factors = dict[str, tuple[Tensor, Tensor]]  # by matrix: (input_BTI, delta_BTO)


Side = Literal["in", "out"]


SIDES: tuple[Side, Side] = ("in", "out")
ANOTHER_SCOPE = "choose another probe.scope"


def capture_factors(
    model: nn.Module,
    params: Sequence[str],
    batch: Mapping[str, Tensor],
    names: Sequence[str],
    project: Callable[[Tensor, Side], Tensor] = lambda values, side: values,
    *,
    in_step: bool = False,
    loss: Loss = per_sample_loss,
    advice: str = ANOTHER_SCOPE,
) -> Factors:
    """Runs a batch forward and backward and gives the factors of every matrix, zero where there is padding.

    Factors of an expert are zero at the tokens that are not sent to it.

    Args:
        model: a causal language model with frozen weights.
        params: the names of the matrices.
        batch: token ids, mask and labels.
        names: of the samples, for messages.
        project: turns masked values of a side (`in` or `out`) into the values of the factor. It is applied once to an
            input that several matrices read.
        in_step: True where other processes run a batch at the same time and need this one to the end of its backward.
            An error then waits till the end, and no block is looked for.
        loss: gives the loss of each sample (B).
        advice: what to do about a layer that cannot be measured.

    Raises:
        ValueError: names block and sample for a loss that is not finite, and a layer that did not run exactly once.
    """
    found: Factors = {}
    device = device_of(model)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    is_given = loss is not per_sample_loss
    hooks = _hooks(model, params, batch["attention_mask"].bool(), project, found, advice, is_given)
    with hooked(hooks), torch.enable_grad():
        loss_B = checked_loss(loss, model, batch)
        is_finite = bool(loss_B.isfinite().all())
        if is_finite or in_step:
            loss_B.sum().backward()
    if not is_finite:
        sample = names[int((~loss_B.isfinite()).nonzero()[0])]
        where = "" if in_step else f", from {first_non_finite_block(model, batch)} on"
        raise ValueError(
            f"the loss of {sample} is not finite{where}; look at that row and at the weights, or load the model in "
            "float32 (model.dtype=float32)"
        )
    if is_given and not found:
        raise ValueError(
            "the loss does not depend on any measured matrix; compute it from the outputs of the model that it is given"
        )
    for param in [param for param in params if param not in found]:
        linear = linear_at(model, param)
        if isinstance(linear, Stored) and linear.expert is not None:  # no token of this batch is sent to it
            # Its weight is not touched: where it is spread over processes, the others may have nothing to do here.
            shape, dtype = batch["input_ids"].shape, dtype_of(model, param)
            input_BTI = torch.zeros(*shape, linear.in_features, dtype=dtype, device=device)
            delta_BTO = torch.zeros(*shape, linear.out_features, dtype=dtype, device=device)
            found[param] = project(input_BTI, "in"), project(delta_BTO, "out")
    if idle := [param for param in params if param not in found]:
        raise ValueError(
            f"{idle[0].removesuffix('.weight')} took no part in the forward pass, so it has no gradient; {advice}"
        )
    return found


def inputs_read_together(model: nn.Module, params: Sequence[str]) -> dict[str, str]:
    """Gives for each matrix the first of `params` that reads the very same tensor, as q, k and v do.

    It takes a forward pass of two tokens, and works on the meta device too. Matrices of fused experts read apart.
    """
    first: dict[int, str] = {}
    alive: list[Tensor] = []  # a freed tensor's id may be given to another
    found: dict[str, str] = {}

    def hook(param: str):
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            alive.append(inputs[0])
            found[param] = first.setdefault(id(inputs[0]), param)

        return note

    linears = {param: linear_at(model, param) for param in params}
    calls = [(linear, hook(param)) for param, linear in linears.items() if getattr(linear, "expert", None) is None]
    experts = dict.fromkeys(fused_experts(model), _no_experts)
    with evaluating(model), standing_in(experts), hooked(calls, before=True), torch.no_grad():
        device = device_of(model)
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    return {param: found.get(param, param) for param in params}


def _hooks(
    model: nn.Module,
    params: Sequence[str],
    mask_BT: Tensor,
    project: Callable[[Tensor, Side], Tensor],
    found: Factors,
    advice: str,
    is_given: bool,
) -> list[tuple[AnyLinear, Callable[..., None]]]:
    # q, k and v read the same tensor: what is kept of it is made once. The entry keeps the original alive, since a
    # freed tensor's id may be given to another.
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    seen: set[str] = set()

    def masked(values: Tensor, side: Side, places: Sequence[Tensor] = ()) -> Tensor:
        values = values.detach()
        if places:  # the values are those of an expert's tokens
            spread_PF = values.new_zeros(mask_BT.numel(), values.shape[-1])
            values = spread_PF.index_copy_(0, places[0], values)
        # Some families (OPT) flatten samples and tokens. Where, not a product: padded positions may hold NaN.
        values_BTF = values.reshape(*mask_BT.shape, -1)
        return project(values_BTF.where(mask_BT[..., None], 0), side)

    def forward_hook(param: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output_BTO: Tensor) -> None:
            original, *places = inputs
            if is_given and not places:
                _check_call(original.numel() // original.shape[-1], mask_BT.numel(), param in seen)
                seen.add(param)
            if id(original) not in shared:
                _check_tokens(param, original, places, mask_BT)
                shared[id(original)] = original, masked(original, "in", places)
            input_BTI = shared[id(original)][1]
            if not output_BTO.requires_grad:  # the first matrix of the pass: the backward ends here
                output_BTO.requires_grad_()

            def take_both(delta_BTO: Tensor) -> None:
                if param in found:
                    raise ValueError(
                        f"{param.removesuffix('.weight')} ran several times in one forward, and shared layers cannot "
                        f"be measured; {advice}"
                    )
                found[param] = input_BTI, masked(delta_BTO, "out", places)

            output_BTO.register_hook(take_both)

        return note

    return [(linear_at(model, param), forward_hook(param)) for param in params]


def _check_tokens(param: str, values: Tensor, places: Sequence[Tensor], mask_BT: Tensor) -> None:
    """Refuses a linear layer that does not see every token of the batch, such as an expert with a module of its own."""
    if not places and (num_tokens := values.numel() // values.shape[-1]) != mask_BT.numel():
        raise ValueError(
            f"{param.removesuffix('.weight')} ran on {num_tokens} of the {mask_BT.numel()} tokens of a batch, so that "
            "its gradients cannot be told apart by sample; experts are measured where the model holds those of a block "
            "in one tensor, as transformers does"
        )


def _no_experts(hidden_TH: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Stands in for fused experts where only shapes matter; on the meta device no token is sent anywhere."""
    return torch.zeros_like(hidden_TH)


def _check_call(num_tokens: int, num_in_batch: int, is_again: bool) -> None:
    """Refuses a loss of the caller's that does not run the model once on the whole batch."""
    if is_again:
        raise ValueError("the loss ran the model more than once; call it once for the whole batch")
    if num_tokens != num_in_batch:
        raise ValueError(
            f"the loss ran the model on {num_tokens} tokens of the {num_in_batch} of the batch, padding included; call "
            "it once for the whole batch"
        )
