"""A command that is killed anywhere and given again ends with the bits of an undisturbed one, whatever was damaged."""

from __future__ import annotations

from random import Random

import pytest

from tests.kills import WORKS, Work

MANY = {"fit": 23, "prune": 23, "probe": 23, "sweep": 23, "diagnose": 8}

FEW = ("fit", "prune", "probe", "sweep")


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


@pytest.mark.parametrize("name", FEW)
def test_killed_once_and_given_again_the_result_is_the_same(undisturbed, tmp_path, name, record_property):
    survives(undisturbed(name), tmp_path, f"{name} once", record_property, most=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_killed_anywhere_and_given_again_the_result_is_the_same(undisturbed, tmp_path, name, record_property):
    survives(undisturbed(name), tmp_path, name, record_property)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "number"), [(name, number) for name, many in MANY.items() for number in range(many)])
def test_killed_often(undisturbed, tmp_path, name, number, record_property):
    survives(undisturbed(name), tmp_path, f"{name} {number}", record_property, damage=number % 2 == 1)


def survives(undisturbed, tmp_path, seed, record_property, *, damage=False, most=3):
    work, expected, points = undisturbed
    found, kills = work.killed(tmp_path / "killed", points, Random(seed), damage=damage, most=most)
    # Curves go with their file, as the run says. A measurement is checked where it is read, and maybe nobody reads it.
    lost = tuple(damaged for damaged in kills if damaged.startswith("store"))
    lost += ("metrics.csv", "routing.csv") if any("curves.jsonl" in damaged for damaged in kills) else ()
    found, expected = (
        {name: value for name, value in each.items() if not name.endswith(lost or ("\0",))}
        for each in (found, expected)
    )
    assert found == expected, kills
    record_property("kills", len(kills))
