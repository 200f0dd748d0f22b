"""The licence of a model, as its own files name it."""

from __future__ import annotations

from pathlib import Path

from layerif.checks import require
from layerif.models.embedded import EmbeddedModel
from layerif.models.pretrained import Pretrained


def licence_of(model: Pretrained) -> str | None:
    """Reads the licence from the model card, or from the GGUF file of the embedded model; None where neither has it."""
    from huggingface_hub import ModelCard, hf_hub_download

    if isinstance(model, EmbeddedModel):
        field = require("gguf", "embedded").GGUFReader(model.gguf()).get_field("general.license")
        return None if field is None else str(field.contents())
    where, revision = model.location()
    folder = Path(where)
    try:
        file = folder / "README.md" if folder.is_dir() else hf_hub_download(where, "README.md", revision=revision)
        found = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict().get("license")
    except Exception:  # there is no card, no network, or a card that nobody can read
        return None
    return found if isinstance(found, str) else None
