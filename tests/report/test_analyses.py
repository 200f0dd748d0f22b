"""The mixed model recovers what was planted, a dendrogram knows no order of profiles, and little data gets neither."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from layerif.report.clusters import tree
from layerif.report.mixed import TooLittle, mixed_model
from layerif.report.report import write_report
from tests.records import record, written

ARMS = {"uniform": 0.5, "datainf": 0.56, "exact": 0.5}


def planted(*, num_tasks: int = 6, num_seeds: int = 5, noise: float = 0.01, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    of_task, of_seed = rng.normal(0, 0.1, num_tasks), rng.normal(0, 0.03, num_seeds)
    rows = [
        {"arm": arm, "task": f"t{t}", "seed": str(s), "value": mean + of_task[t] + of_seed[s] + rng.normal(0, noise)}
        for (arm, mean), t, s in itertools.product(ARMS.items(), range(num_tasks), range(num_seeds))
    ]
    return pd.DataFrame(rows)


def test_planted_effects_and_spreads_are_recovered():
    found = mixed_model(planted(num_tasks=8, num_seeds=6))
    assert found.table["to"].tolist() == ["datainf", "exact"]
    assert set(found.table["from"]) == {"uniform"}
    assert found.table["difference"].tolist() == pytest.approx([0.06, 0.0], abs=0.006)
    first, second = found.table.to_dict("records")
    assert first["p Holm"] < 1e-6
    assert second["low"] < 0 < second["high"]
    assert found.spreads["task"] == pytest.approx(0.1, rel=0.6)
    assert found.spreads["seed"] == pytest.approx(0.03, rel=0.6)
    assert found.spreads["rest"] == pytest.approx(0.01, rel=0.15)


def test_a_balanced_design_gives_paired_differences_and_the_exact_interval():
    """Of equal numbers, differences are those of the means, and errors those of the residual of arm + task + seed."""
    runs: Any = planted()
    found, means = mixed_model(runs), runs.groupby("arm")["value"].mean()
    assert found.df == 3 * 6 * 5 - (3 + 5 + 4)
    expected = [means["datainf"] - means["uniform"], means["exact"] - means["uniform"]]
    assert found.table["difference"].tolist() == pytest.approx(expected, abs=1e-6)
    rest = runs["value"] - sum(runs.groupby(by)["value"].transform("mean") for by in ("arm", "task", "seed"))
    error = np.sqrt(2 / 30 * ((rest + 2 * runs["value"].mean()) ** 2).sum() / found.df)
    half = (found.table["high"] - found.table["low"]) / 2
    assert half.tolist() == pytest.approx([1.9908471 * error] * 2, rel=1e-3)  # Student's t with 78 degrees of freedom


def test_intervals_hold_zero_where_nothing_was_planted():
    wrong = sum(
        not (row["low"] < 0 < row["high"])
        for seed in range(8)
        for row in mixed_model(planted(num_tasks=3, num_seeds=3, noise=0.05, seed=seed)).table.to_dict("records")[1:]
    )
    assert wrong <= 2


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (planted(num_tasks=2), "there are 2 tasks, and the spread of tasks needs at least 3"),
        (planted(num_seeds=1), "there is 1 seed, and the spread of seeds needs at least 3"),
        (planted().query("arm == 'exact'"), "there is one arm"),
        (planted().assign(value=0.5), "all runs have the same value"),
    ],
)
def test_too_little_says_so_in_plain_words(runs, message):
    with pytest.raises(TooLittle, match=message):
        mixed_model(runs)


def profiles(num: int = 7) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    groups = rng.random((2, 12))
    return {f"profile {n}": (groups[n % 2] + 0.05 * rng.random(12)).tolist() for n in range(num)}


def test_a_dendrogram_does_not_depend_on_the_order_of_its_profiles():
    given = profiles()
    expected = tree(given)
    assert sorted(expected.leaves) == list(range(7))
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(list(given))
        again = tree({name: given[name] for name in order})
        assert again.names == expected.names
        assert again.leaves == expected.leaves
        assert np.array_equal(again.joins, expected.joins)
    # Profiles of one group stand together, and join before the groups do.
    groups = [place % 2 for place in expected.leaves]
    assert groups == sorted(groups) or groups == sorted(groups, reverse=True)
    assert expected.joins[-1, 2] > 5 * expected.joins[-2, 2]
    first, second, alike = expected.closest()
    assert int(first[-1]) % 2 == int(second[-1]) % 2
    assert alike > 0.9


def test_equally_distant_profiles_join_in_a_stable_order():
    tied = {name: list(values) for name, values in zip("dcba", itertools.permutations([1.0, 2.0, 3.0]), strict=False)}
    assert np.array_equal(tree(tied).joins, tree(dict(sorted(tied.items()))).joins)
    turned = tree({"up": [1, 2, 3], "down": [3, 2, 1]})
    assert turned.joins[0, 2] == 2


def runs_of_sweep(num_tasks: int, num_seeds: int):
    rng = np.random.default_rng(0)
    return [
        record(
            arm,
            (rng.random(10) < mean + 0.08 * task).tolist(),
            task=f"task{task}",
            seed=seed,
            decision={"scores": rng.permutation([1.0, 2, 3, 4]).tolist()} if arm != "uniform" else {"scores": ()},
        )
        for (arm, mean), task, seed in itertools.product(list(ARMS.items())[:2], range(num_tasks), range(num_seeds))
    ]


def test_a_report_of_enough_runs_has_a_mixed_model_and_a_dendrogram(tmp_path):
    write_report(written(tmp_path, runs_of_sweep(3, 3)), Console(quiet=True))
    said = (tmp_path / "report.md").read_text()
    assert "## Mixed model: accuracy" in said
    assert "between tasks" in said
    assert "No mixed model" not in said
    assert "No dendrogram" not in said
    assert (tmp_path / "clusters.png").read_bytes().startswith(b"\x89PNG")
    assert "Clusters of layer profiles" in (tmp_path / "report.html").read_text()


def test_a_report_of_few_runs_says_why_it_has_neither(tmp_path):
    runs = runs_of_sweep(1, 3)
    for one in runs[1:]:
        one.decision = runs[-1].decision
    write_report(written(tmp_path, runs), Console(quiet=True))
    said = (tmp_path / "report.md").read_text()
    assert "## Mixed model" not in said
    assert "No mixed model is fitted: there is 1 task, and the spread of tasks needs at least 3." in said
    assert not (tmp_path / "clusters.png").exists()
