"""Checks that a checkpoint belongs to a model, by the names and shapes of its tensors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import nn

from layerif.models.quantised import refuse_other_quantisation

if TYPE_CHECKING:
    from layerif.models.pretrained import Pretrained


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def refuse_other_shapes(
    what: str,
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    *,
    advice: str = "give checkpoints of the run of this model",
) -> None:
    """Refuses a checkpoint whose names and shapes differ from those of the model.

    Args:
        what: the checkpoint, for the message.
        found: its shapes by name.
        expected: those of the model.
        advice: says what to do.
    """
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{what} is of another model: {name} is {found.get(name, 'missing')} there and "
                f"{expected.get(name, 'missing')} here; {advice}"
            )


def refuse_other_adapter(model: Pretrained, folder: Path) -> None:
    """Refuses the adapter of another model. PEFT would drop the tensors that do not fit and initialise missing ones."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    what, advice = f"the adapter {str(folder)!r}", "give an adapter that was trained on this model"
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{what} holds no adapter_config.json; give a folder written by PEFT's save_pretrained")
    refuse_other_quantisation(what, folder, model.quantisation)
    skeleton = model.skeleton()
    try:
        found = _shapes_in(folder)
        config = PeftConfig.from_pretrained(str(folder))
        trained_on, here = config.base_model_name_or_path, model.location()[0]
        config.base_model_name_or_path = None
        with torch.device("meta"):
            adapted = get_peft_model(skeleton, config)
            expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except ValueError as error:  # the model has none of the modules that the adapter targets, say
        raise ValueError(f"{what} is of another model: {str(error).rstrip('.')}; {advice}") from error
    except Exception as error:  # the files are the user's, whatever they raise
        raise ValueError(f"{what} cannot be read ({type(error).__name__}: {error}); is it complete?") from error
    anywhere = {**shapes_of(adapted), **{name: tuple(tensor.shape) for name, tensor in expected.items()}}
    known = {name: shape for name, shape in anywhere.items() if name in expected or name in found}
    refuse_other_shapes(what, found, known, advice=advice)
    if trained_on and Path(trained_on).name != Path(here).name:
        warnings.warn(
            f"{what} was trained on {trained_on!r} and is measured on {here!r}: "
            "their shapes agree; check that their weights do",
            RuntimeWarning,
            stacklevel=3,
        )


def _shapes_in(adapter: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of an adapter's tensors, from the header of its file where that is a safetensors file."""
    from peft.utils.save_and_load import load_peft_weights

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return {name: tuple(tensor.shape) for name, tensor in load_peft_weights(str(adapter), device="cpu").items()}
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
