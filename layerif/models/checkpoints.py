"""Checks that a checkpoint belongs to a model, by the names and shapes of its tensors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from layerif.models.pretrained import Pretrained


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def refuse_other_shapes(
    checkpoint: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    """Refuses a checkpoint whose names and shapes (`found`) differ from those of the model (`expected`)."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"the checkpoint {checkpoint!r} is of another model: {name} is {found.get(name, 'missing')} there and "
                f"{expected.get(name, 'missing')} here; give checkpoints of the run of this model"
            )


def refuse_other_adapter(model: Pretrained, folder: Path) -> None:
    """Refuses the adapter of another model. PEFT would drop the tensors that do not fit and initialise missing ones."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    config = PeftConfig.from_pretrained(str(folder))
    trained_on, here = config.base_model_name_or_path, model.location()[0]
    config.base_model_name_or_path = None
    with torch.device("meta"):
        try:
            adapted = get_peft_model(model.skeleton(), config)
        except ValueError as error:  # the model has none of the modules that the adapter targets
            raise ValueError(f"the checkpoint {str(folder)!r} is of another model: {error}") from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    found = load_peft_weights(str(folder), device="cpu")
    anywhere = {**shapes_of(adapted), **{name: tuple(tensor.shape) for name, tensor in expected.items()}}
    known = {name: shape for name, shape in anywhere.items() if name in expected or name in found}
    refuse_other_shapes(str(folder), {name: tuple(tensor.shape) for name, tensor in found.items()}, known)
    if trained_on and Path(trained_on).name != Path(here).name:
        warnings.warn(
            f"the checkpoint {str(folder)!r} was trained on {trained_on!r} and is measured on {here!r}: "
            "their shapes agree; check that their weights do",
            RuntimeWarning,
            stacklevel=3,
        )
