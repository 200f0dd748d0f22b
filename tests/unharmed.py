"""The law that a model in memory comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.tiny import tiny_model


def assert_unharmed_by(work: Callable[[Any], Any]) -> None:
    """Gives a model in training mode, partly frozen and with gradients, to `work`, and asserts that nothing changed."""
    model = tiny_model().train()
    model.get_input_embeddings().weight.requires_grad_(False)
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    work(model)
    assert all(module.training for module in model.modules())
    assert needed == {name: p.requires_grad for name, p in model.named_parameters()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name  # type: ignore[arg-type]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
