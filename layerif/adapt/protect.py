"""SPIDER in full fine-tuning: the weights that the pretrained model needs most keep their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerif.probe.update_masks import update_mask


class Protection:
    """Mixes the pretrained weights back in after every step of the optimiser: W ← (1 − m)∘W⁰ + m∘W.

    The mask m is SPIDER's, see `layerif.probe.update_masks`, with the gradients of all steps so far summed up: those
    that the optimiser was given, so after clipping and accumulation. The optimiser's own state is left as it is.

    Beside the optimiser it holds two numbers for each trained weight: the pretrained value and the sum of gradients.

    Args:
        model: ready to be trained, with its pretrained weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._pretrained = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._gradients = {name: torch.zeros_like(weight) for name, weight in self._pretrained.items()}

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Mixes the weights after every step of this optimiser from now on."""
        optimizer.register_step_post_hook(lambda *_: self._mix())

    @torch.no_grad()
    def _mix(self) -> None:
        for name, weight in self._weights.items():
            pretrained, summed = (each[name] for each in (self._pretrained, self._gradients))
            if pretrained.device != weight.device:  # Lightning moves a model after `configure_model`
                self._pretrained[name] = pretrained = pretrained.to(weight.device)
                self._gradients[name] = summed = summed.to(weight.device)
            if weight.grad is not None:
                summed += weight.grad
            mask = update_mask(pretrained, summed)
            weight.copy_((1 - mask) * pretrained + mask * weight)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the summed gradients by the names of the weights, for a checkpoint."""
        return dict(self._gradients)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes up the summed gradients that `state_dict` returned."""
        for name, summed in self._gradients.items():
            summed.copy_(saved[name])
