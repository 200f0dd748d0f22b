"""The licence of a model comes from its own files, or is not known."""

from __future__ import annotations

import gguf
import pytest

from layerif.models.embedded import EmbeddedModel
from layerif.models.licence import licence_of
from layerif.models.pretrained import HubModel, LocalModel


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Mine\n", "mit"),
        ("---\ntags: [a]\n---\n# Mine\n", None),
        ("---\nlicense: [mit, other]\n---\n", None),
        ("---\nlicense: {{ mit\n---\n", None),
        ("license: mit\n", None),
        (None, None),
    ],
)
def test_a_folder_names_it_in_its_model_card(tmp_path, card, expected):
    (tmp_path / "config.json").write_text("{}")
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(LocalModel(path=str(tmp_path))) == expected


def test_a_hub_that_cannot_be_asked_names_none():
    assert licence_of(HubModel(name="layerif/nowhere")) is None


@pytest.mark.parametrize("expected", ["apache-2.0", None])
def test_the_embedded_model_names_it_in_its_file(tmp_path, monkeypatch, expected):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    if expected:
        writer.add_license(expected)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(EmbeddedModel, "gguf", lambda self: tmp_path / "model.gguf")
    assert licence_of(EmbeddedModel(cache=str(tmp_path))) == expected
