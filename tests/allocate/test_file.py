"""Laws of an allocation that is read back: what was written by matrix is read by matrix, and nothing is mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerif.allocate import Allocation
from layerif.allocate.file import SavedAllocation
from layerif.layers import LayerMap
from layerif.models.blocks import layer_map
from layerif.scores import LayerScores
from tests.tiny import tiny_model

LAYERS = layer_map(tiny_model(), scope="all")
UNITS = tuple(param.removesuffix(".weight") for param in LAYERS.matrices)
SCORES = LayerScores(LAYERS.names, (1.0,) * 3, "undertrained", "equal", "none")
SOURCE = {"model": "folder 1234", "pruner": "wanda(compare=row)"}
UP = "model.layers.1.mlp.up_proj"
HALF_OF_BLOCKS, HALF = dict.fromkeys(LAYERS.names, 0.5), dict.fromkeys(UNITS, 0.5)


def allocation(layers: LayerMap = LAYERS, source: dict[str, str] | None = None) -> Allocation:
    """A sparsity of every matrix, as curves give it."""
    units, sizes = tuple(param.removesuffix(".weight") for param in layers.matrices), layers.matrix_numel
    assert sizes is not None
    values = np.random.default_rng(0).uniform(0.2, 0.9, len(units))
    budget = float(values @ np.array(sizes) / sum(sizes))
    return Allocation(units, "sparsity", tuple(values.tolist()), budget, sizes, SOURCE if source is None else source)


def read(folder: Path, content: Any, *, layers: LayerMap = LAYERS, kind: Any = "sparsity") -> Allocation:
    file = folder / "saved.json"
    file.write_text(json.dumps(content))
    return SavedAllocation(path=str(file), kind=kind)(SCORES, layers)


def assert_same(found: Allocation, written: Allocation) -> None:
    assert found.budget == pytest.approx(written.budget, rel=1e-12)
    assert {**found.to_dict(), "budget": 0} == {**written.to_dict(), "budget": 0}


def test_an_allocation_by_matrix_is_read_from_a_record_with_its_source(tmp_path):
    written = allocation()
    record = {"version": 2, "config": {}, "decision": {"scores": None, "allocation": written.to_dict()}}
    for content in (record, written.to_dict()):
        assert_same(read(tmp_path, content), written)


def test_a_mapping_of_matrices_is_read_in_any_order_and_belongs_anywhere(tmp_path):
    written = allocation(source={})
    assert_same(read(tmp_path, dict(reversed(written.by_name().items()))), written)


def test_matrices_weigh_as_much_as_they_have_parameters(tmp_path):
    only_up = {unit: float(unit.endswith("up_proj")) for unit in UNITS}
    of_up = sum(param.numel() for name, param in tiny_model().named_parameters() if name.endswith("up_proj.weight"))
    assert read(tmp_path, only_up).budget == pytest.approx(of_up / sum(LAYERS.numel))


def test_ranks_and_experts_of_matrices_name_those_with_an_adapter_alone(tmp_path):
    chosen = {unit: number for number, unit in enumerate(UNITS) if unit.endswith(("up_proj", "q_proj"))}
    found = read(tmp_path, dict(reversed(chosen.items())), kind="rank")
    assert found.by_name() == chosen
    assert list(found.units) == list(chosen)
    assert found.budget == sum(chosen.values())
    assert_same(read(tmp_path, {"allocation": found.to_dict()}, kind="rank"), found)


def test_a_mapping_of_blocks_stays_one_of_blocks(tmp_path):
    found = read(tmp_path, HALF_OF_BLOCKS)
    assert (found.units, found.sizes) == (LAYERS.names, LAYERS.numel)


def test_what_the_pruner_skips_is_neither_needed_nor_allowed(tmp_path):
    fewer = LAYERS.without(["down_proj"])
    written = allocation(fewer)
    assert_same(read(tmp_path, written.to_dict(), layers=fewer), written)
    with pytest.raises(ValueError, match=r"lacks 3 of the model's 21 matrices, the first is '.*\.0\.mlp\.down_proj'"):
        read(tmp_path, written.to_dict())
    with pytest.raises(ValueError, match=r"the matrix '.*down_proj', which this model does not have or pruner\.skip"):
        read(tmp_path, allocation().to_dict(), layers=fewer)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ({**HALF_OF_BLOCKS, UP: 0.2}, "sparsity", rf"to blocks \({LAYERS.names[0]}\) and to matrices \({UP}\)"),
        ({**HALF_OF_BLOCKS, UP: 0.2}, "sparsity", r"use method=prune method\.allocation=.*saved\.json"),
        ({**HALF_OF_BLOCKS, "model.layers.1.mlp": 0.2}, "sparsity", "an allocator gives them to one or the other"),
        ({**HALF, f"{UP}s": 0.5}, "sparsity", rf"did you mean '{UP}'\?\); its 21 matrices are"),
        ({unit: 0.5 for unit in UNITS if unit != UP}, "sparsity", rf"lacks 1 of .* 21 matrices, the first is '{UP}'"),
        (
            dict.fromkeys(UNITS, 1),
            "layers",
            r"gives layers to matrices .*only sparsity, bits, experts, rank.*3 layers 'model\.layers\.0' to",
        ),
        ({f"{UP}s": 2}, "rank", rf"did you mean '{UP}'\?\); its 21 matrices are"),
        (dict.fromkeys(UNITS, 1.5), "sparsity", r"sparsity of '.*\.0\.self_attn\.q_proj' must be a fraction"),
        ({"allocation": {**allocation().to_dict(), "source": ["a"]}}, "sparsity", r"allocation\.source in .*object of"),
        ({"allocation": {**allocation().to_dict(), "source": {"a": 1}}}, "sparsity", r"of texts; got \{'a': 1\}"),
    ],
)
def test_a_mixture_and_matrices_of_another_model_are_refused(tmp_path, content, kind, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content, kind=kind)


def test_layers_without_the_sizes_of_matrices_say_so(tmp_path):
    unsized = LayerMap(LAYERS.names, LAYERS.params, LAYERS.numel)
    with pytest.raises(ValueError, match="do not say how large each matrix is"):
        read(tmp_path, allocation().to_dict(), layers=unsized)
