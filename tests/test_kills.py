"""A command that is killed anywhere and given again ends with the bits of an undisturbed one, whatever was damaged."""

from __future__ import annotations

from random import Random

import pytest

from tests.kills import WORKS, Work

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 26))]


@pytest.fixture(scope="module")
def undisturbed(model_folder, task_folder, tmp_path_factory):
    """Makes the work of a name, with its undisturbed result and the number of its points, once."""
    known = {}

    def of(name: str):
        if name not in known:
            given = [
                "model=local",
                f"model.path={model_folder}",
                "task=jsonl",
                f"task.path={task_folder}",
                "trainer.accelerator=cpu",
                "trainer.enable_progress_bar=false",
                "data.batch_size=4",
            ]
            work = Work([*given, *WORKS[name].overrides], WORKS[name].swept)
            known[name] = (work, *work.undisturbed(tmp_path_factory.mktemp(name) / "whole"))
        return known[name]

    return of


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_anywhere_and_given_again_the_result_is_the_same(undisturbed, tmp_path, name, seed, record_property):
    work, expected, points = undisturbed(name)
    found, kills = work.killed(tmp_path / "killed", points, Random(f"{name} {seed}"), damage=seed % 2 == 1)
    assert found == expected, kills
    record_property("kills", len(kills))
