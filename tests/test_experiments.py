"""The figures experiments report: accuracy over seeds, differences paired by question, and profiles side by side."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import timing
from experiments.benchmark_scoring import datainf_loop
from layerif.app.schema import check, register
from layerif.evidence import LayerGrams, MatrixGram
from layerif.files import conf_folder
from layerif.layers import LayerMap
from layerif.record.record import AllocationRecord, DecisionRecord, RunRecord
from tests.records import choices_of, decision_of, record, written
from tests.tiny import tiny_model

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
LAYERS = [f"model.layers.{number}" for number in range(6)]


def plot_of(experiment: str) -> ModuleType:
    return loaded(experiment, "plot")


def loaded(experiment: str, file: str) -> ModuleType:
    path = EXPERIMENTS / experiment / f"{file}.py"
    spec = importlib.util.spec_from_file_location(f"{file}_of_{experiment}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, name: str, *, seed: int = 0, task: str = "currency", **options: Any) -> RunRecord:
    method = options.pop("method", "lora_moe")
    config = {
        "estimator": {},
        "task": {"name": task},
        "method": {"r": 8} if method else {},
        "model": {"adapter": options.pop("adapter", None)},
    }
    rng = np.random.default_rng(seed + len(name))
    decision = {"scores": rng.random(6).tolist(), "source": name, "higher_means": "important"}
    for key in (*decision, "reliability"):
        decision |= {key: options.pop(key)} if key in options else {}
    fields: dict[str, Any] = {
        "choices": choices_of(options.pop("estimator", "uniform"), task=task, method=method or "none"),
        "decision": decision_of(range(1, 7), layers=LAYERS, budget=21, **decision),
        "fingerprint": name,
        "seconds": {"evidence": 2.0, "score": 0.5},
    }
    record = RunRecord(name=name, seed=seed, config=config, overrides=[], **(fields | options))
    (folder / f"{name}-{task}-{seed}").mkdir(parents=True)
    record.write(folder / f"{name}-{task}-{seed}")
    return record


def plot_records(folder: Path) -> list[RunRecord]:
    return [RunRecord.read(file.parent) for file in sorted(folder.glob("*/record.json"))]


def answers(right: list[bool]) -> dict[str, dict[str, bool]]:
    return {"options": {f"q{number}": bool(answer) for number, answer in enumerate(right)}}


def composed(*overrides: str, hydra: bool = False) -> Any:
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", [*overrides, "outputs=/nowhere", "logger=none"], return_hydra_config=hydra)
    if not hydra:
        check(config)
    return config


def test_every_arm_composes_and_binds():
    arms = loaded("expert_allocation_smollm2", "run").ARMS
    configs = [composed("experiment=expert_allocation_smollm2", *arm, "seed=2") for arm in arms]
    assert len({str(OmegaConf.to_container(config, resolve=True)) for config in configs}) == len(arms) == 10
    assert [config.estimator.seed for config in configs if "seed" in config.estimator] == [2]


@pytest.mark.parametrize("experiment", ["sparsity_smollm2", "sparsity_7b"])
def test_every_arm_of_pruning_composes_and_binds(experiment):
    command = (EXPERIMENTS / "sparsity_smollm2" / "run.sh").read_text()
    swept = composed(f"experiment={experiment}", hydra=True).hydra.sweeper.params
    texts = [
        swept.arm,
        *re.findall(r"arms?=(?:\$arms)?([a-z_,]+)", command if experiment == "sparsity_smollm2" else ""),
    ]
    arms = sorted({arm for text in texts for arm in text.split(",") if arm})
    configs = [composed(f"experiment={experiment}", f"arm={arm}") for arm in arms]
    assert len({str(OmegaConf.to_container(config, resolve=True)) for config in configs}) == len(arms) > 7
    for config in configs:
        assert config.method._target_.endswith("Prune")
        assert config.allocator._target_.rpartition(".")[2] in ("Sparsity", "Depth", "WaterFilling", "Knapsack")


def test_every_arm_of_layers_to_train_composes_and_has_its_own_layers():
    run = loaded("layers_to_train_smollm2", "run")
    assert len(run.ARMS) == 13
    found = {}
    for arm, settings in run.ARMS.items():
        config = composed("experiment=layers_to_train_smollm2", *(each.format(runs="/runs") for each in settings))
        found[arm] = config
        share = {"all": 1.0, "half": 0.5, "quarter": 0.25}[arm.split()[1]]
        assert (config.allocator.keep, type(config.allocator.keep)) == (share, float)
        assert config.method._target_.endswith("Lora" if arm.startswith("lora") else "Full")
        assert config.method.get("equal_parameters", True)
    assert len({str(OmegaConf.to_container(config, resolve=True)) for config in found.values()}) == 13
    compared = {arm for pair in loaded("layers_to_train_smollm2", "results").AMONG for arm in pair}
    assert compared < set(found)


def test_losses_of_some_layers_are_held_against_those_of_all_by_the_stated_rule(tmp_path):
    results = loaded("layers_to_train_smollm2", "results")
    rng = np.random.default_rng(0)
    loss = {f"q{number}": float(value) for number, value in enumerate(rng.normal(2, 1, 40))}
    beyond = {"lora all": 0.0, "lora half last": 0.3, "lora half layerif": 0.01}
    by_arm = {}
    for arm, more in beyond.items():
        for seed in range(3):
            rows = {row: value + more + 0.001 * float(rng.normal()) for row, value in loss.items()}
            name, metrics = f"{arm.replace(' ', '_')}-{seed}", {"loss": float(np.mean(list(rows.values())))}
            training = {"seconds_per_step": 1.0 + more, "memory_gb": 2.0, "memory_of": "process"}
            more_fields: dict[str, Any] = {"losses": {"loss": rows}, "metrics": metrics | {"accuracy": 0.5}}
            written = write(
                tmp_path / "made", arm, seed=seed, parameters={"trainable": 9}, training=training, **more_fields
            )
            (tmp_path / "runs" / name).mkdir(parents=True)
            written.write(tmp_path / "runs" / name)
    untouched = write(tmp_path / "made", "untouched", metrics={"before/loss": metrics["loss"] + 1.0})
    (tmp_path / "runs" / "untouched").mkdir()
    untouched.write(tmp_path / "runs" / "untouched")
    by_arm, before = results.read(tmp_path / "runs")
    assert results.costs(by_arm).set_index("arm")["s a step"].to_dict() == {a: 1.0 + m for a, m in beyond.items()}
    table = results.compared(by_arm, before).set_index(["arm", "against"])
    assert set(table.index) == {
        ("lora half last", "lora all"),
        ("lora half layerif", "lora all"),
        ("lora half layerif", "lora half last"),
    }
    assert table.loc[("lora half last", "lora all"), "difference"] == pytest.approx(0.3, abs=0.01)
    assert table["as good"].tolist()[:2] == [False, True]
    assert table["differs"].all()


def test_the_profiles_are_of_every_estimator_that_needs_no_more():
    run = loaded("layer_profiles", "run")
    files = {file.stem: file.read_text() for file in conf_folder().glob("estimator/*.yaml")}
    to_fill_in = {name for name, text in files.items() if "???" in text}
    assert set(run.ESTIMATORS) == set(files) - to_fill_in - set(run.APART)
    assert {"datainf", "alpha", "outlier", "random"} <= set(run.ESTIMATORS)
    assert composed("experiment=layer_profiles", "task=region", "estimator=ila").method._target_.endswith("ScoresOnly")


def test_allocations_are_compared_by_question_over_seeds(tmp_path):
    plot = plot_of("expert_allocation_smollm2")
    rng = np.random.default_rng(0)
    expected = []
    for seed in range(3):
        uniform = (rng.random(80) < 0.5).tolist()
        better = [answer or bool(rng.random() < 0.6) for answer in uniform]
        alike = rng.permutation(uniform).tolist()
        sizes = {"trainable": 100, "total": 1000}
        write(tmp_path / "runs", "uniform", seed=seed, answers=answers(uniform), parameters=sizes)
        better_one = {"estimator": "random", "answers": answers(better), "parameters": sizes}
        write(tmp_path / "runs", "random", seed=seed, **better_one)
        shape = {"scores": [], "source": "shape(2-4-6-8)", "answers": answers(alike), "parameters": sizes}
        write(tmp_path / "runs", "shape", seed=seed, **shape)
        plain = {"method": "lora_equal", "answers": answers(uniform), "parameters": {"trainable": 99}}
        write(tmp_path / "runs", "plain", seed=seed, **plain)
        expected.append(np.mean(better) - np.mean(uniform))
    before = {"before/options": answers([False] * 80)["options"]}
    write(tmp_path / "runs", "before", method=None, answers=before)
    plot.draw(tmp_path / "runs", tmp_path)
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert (tmp_path / "allocations.png").stat().st_size > 10_000
    table = plot.results(plot_records(tmp_path / "runs"))
    rows = {row["arm"]: row for row in table.to_dict("records")}
    assert set(rows) == {"before", "uniform", "random", "shape(2-4-6-8)", "plain LoRA, equal size"}
    assert rows["random"]["difference"] == pytest.approx(np.mean(expected))
    assert rows["random"]["difference low"] > 0
    assert rows["random"]["p Holm"] < 0.05
    assert rows["shape(2-4-6-8)"]["p Holm"] > 0.05
    assert rows["shape(2-4-6-8)"]["difference low"] < 0 < rows["shape(2-4-6-8)"]["difference high"]
    assert (rows["plain LoRA, equal size"]["difference"], rows["plain LoRA, equal size"]["p"]) == (0, 1)
    said = {name: row["against uniform"] for name, row in rows.items()}
    assert (said["random"], said["shape(2-4-6-8)"], said["uniform"]) == ("higher", "not distinguishable", "")
    assert 0 < rows["shape(2-4-6-8)"]["smallest found"] < 0.5
    assert rows["before"]["accuracy"] == 0
    assert {row["seeds"] for name, row in rows.items() if name != "before"} == {3}
    again = write(tmp_path / "again", "uniform", seed=2, answers=answers([True] * 80))
    with pytest.raises(SystemExit, match="uniform was run twice with seed 2"):
        plot.results([*plot_records(tmp_path / "runs"), again])
    odd = write(tmp_path / "odd", "uniform", seed=9, estimator="avss", answers=answers([True] * 79))
    reference = write(tmp_path / "reference", "uniform", seed=9, answers=answers([True] * 80))
    with pytest.raises(SystemExit, match="did not answer the same questions"):
        plot.results([odd, reference])


STORED = "scores from the store: this model and task were measured before"


def test_profiles_are_correlated_over_blocks_and_their_costs_shared(tmp_path):
    plot = plot_of("layer_profiles")
    rising, falling = list(range(6)), list(range(6, 0, -1))
    for task in ("capital", "currency"):
        pass_of: dict[str, Any] = {"method": None, "task": task, "fingerprint": task}
        of = {"dlp": rising, "avss": falling, "outlier": falling[::-1]}
        for name, scores in of.items():
            seconds = {"seconds": {"evidence": 9.0, "score": 0.1}}
            paid: dict[str, Any] = seconds if name == "dlp" else {"notes": [STORED]}
            write(tmp_path / "runs", name, estimator=name, scores=scores, **pass_of | paid)
        # Of weights alone, and in the store before any of these runs.
        alpha: dict[str, Any] = {"estimator": "alpha", "fingerprint": "weights", "notes": [STORED]}
        write(tmp_path / "runs", "alpha", task=task, method=None, **alpha)
        ila: dict[str, Any] = {"estimator": "ila", "fingerprint": f"{task} gates", "adapter": "adapter"}
        write(tmp_path / "runs", "ila", task=task, method=None, reliability=0.5, **ila)
        write(tmp_path / "runs", "trained", task=task, seconds={"fit": 70.0})  # no profile
        write(tmp_path / "runs", "random", task=task, method=None, estimator="random", fingerprint="none")
    plot.draw(tmp_path / "runs", tmp_path)
    assert (tmp_path / "profiles.png").stat().st_size > 10_000
    profiles = plot.read(tmp_path / "runs")
    assert plot.estimators_alike(profiles).loc["dlp", "avss"] == pytest.approx(-1)
    tasks = plot.across_tasks(profiles)
    assert tasks.loc["dlp", ["between tasks", "highest, capital", "highest, currency"]].tolist() == [1, 5, 5]
    assert tasks["between halves"].dropna().to_dict() == {"ila": 0.5}
    costs = plot.costs(profiles, plot.trainings(tmp_path / "runs"))
    assert costs["evidence s"].drop("alpha").to_dict() == {"avss": 9, "dlp": 9, "outlier": 9, "ila": 2, "random": 0}
    assert np.isnan(costs.loc["alpha", "evidence s"])
    assert costs["shared by"].to_dict() == {"avss": 3, "dlp": 3, "outlier": 3, "alpha": 1, "ila": 1, "random": 0}
    assert costs["training s"].to_dict() == {name: 70 * (name == "ila") for name in costs.index}
    assert costs.loc["avss", "score s"] == pytest.approx(0.5)


def test_estimators_are_ordered_by_direction_and_then_by_likeness(tmp_path):
    plot = plot_of("layer_profiles")
    rising, falling = list(range(6)), list(range(6, 0, -1))
    for name, scores, means in (
        ("exact", rising, "undertrained"),
        ("alpha", falling, "undertrained"),
        ("lissa", rising, "undertrained"),
        ("dlp", falling, "important"),
    ):
        options: dict[str, Any] = {"estimator": name, "scores": scores, "higher_means": means}
        write(tmp_path, name, method=None, **options)
    names = plot.order(plot.read(tmp_path))
    assert names[0] == "dlp"
    assert abs(names.index("exact") - names.index("lissa")) == 1
    write(tmp_path, "again", method=None, estimator="dlp")
    with pytest.raises(SystemExit, match="holds dlp twice for one task"):
        plot.read(tmp_path)


# The loops that DataInf is timed against


@pytest.mark.parametrize("loop", ["from_pair_loop", "from_loop", "from_dot_loop"])
def test_the_loops_are_the_definition_of_datainf(loop):
    train_NP, val_MP = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).split((5, 4))
    lam = datainf_loop.DAMPING * train_NP.square().mean()
    inverse_PP = sum(torch.linalg.inv(torch.outer(g_P, g_P) + lam * torch.eye(6)) for g_P in train_NP) / 5
    shape = (2, 3) if loop == "from_loop" else (6,)
    samples = [[{"q": row_P.view(shape)} for row_P in rows] for rows in (train_NP, val_MP)]
    scored = samples[:1] if loop == "from_pair_loop" else []
    found_MN = getattr(datainf_loop, loop)(*samples, *scored)["q"]
    torch.testing.assert_close(found_MN, -val_MP @ inverse_PP @ train_NP.T, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("undrawn")
def test_pruned_models_are_compared_with_uniform_at_the_same_calibration_choice(tmp_path):
    plot = plot_of("sparsity_smollm2")
    rng, ratios = np.random.default_rng(0), {}
    sweep, results = tmp_path / "sweep", tmp_path / "results"
    results.mkdir()

    def pruned(arm: str, seed: int, perplexity: float, *, m: int | None = None, **metrics: float) -> None:
        (folder := sweep / f"{arm}-{seed}-{m}").mkdir(parents=True)
        RunRecord(
            name="pruning",
            seed=seed,
            overrides=[],
            choices=choices_of("uniform", method="prune", arm=arm),
            config={
                "allocator": {"target": 0.6},
                "pruner": {"m": m},
                "method": {"calibration": {"num_windows": 16}},
                "task": {"name": "city"},
            },
            decision=decision_of([0.4, 0.6, 0.8], scores=(), layers=["0", "1", "2"], kind="sparsity", budget=0.6),
            metrics={"perplexity_256": perplexity, **metrics},
        ).write(folder)

    for seed in range(5):
        uniform, ratios[seed] = 80 + 10 * rng.random(), 0.7 + 0.02 * rng.random()
        pruned("uniform", seed, uniform, loss=6.0 + seed)
        pruned("curves", seed, uniform * ratios[seed], loss=5.5 + seed + 0.01 * rng.random())
        pruned("random", seed, uniform * (0.9 + 0.2 * rng.random()), loss=6.0 + seed + rng.normal())
    pruned("uniform", 0, 50.0, m=4)
    pruned("curves", 0, 40.0, m=4)
    plot.draw([sweep], results)
    assert {file.name for file in results.iterdir()} == {"runs.csv", "results.md", "results.png", "sparsity.png"}
    runs = pd.read_csv(results / "runs.csv")
    (main, few), found = zip(*plot.families(runs), strict=True)
    assert main == plot.MAIN == "wanda, 60 %, city"
    by = {(each.arm, each.metric): each for each in plot.compared(found[0], "uniform")}
    logs = np.log(list(ratios.values()))
    half = 2.776 * logs.std(ddof=1) / np.sqrt(5)
    expected = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
    assert by["curves", "documentation"].cell == "{:.2f} ({:.2f} to {:.2f}) *".format(*expected)
    assert by["curves", "loss"].cell.startswith("-0.49 (") or by["curves", "loss"].cell.startswith("-0.50 (")
    assert not by["random", "documentation"].cell.endswith("*")
    (alone,) = plot.compared(found[1], "uniform")
    assert (few, alone.setting, alone.cell) == ("other pruners, sparsities and windows", "wanda, n of 4, 60 %", "0.80")
    # A later piece on another machine adds its runs, and a run that is there anew replaces the earlier one.
    (tmp_path / "sweep").rename(tmp_path / "earlier")
    pruned("curves", 0, 44.0, m=4)
    plot.draw([sweep], results)
    later = pd.read_csv(results / "runs.csv").set_index(plot.KEYS)["value"].to_dict()
    assert len(later) == len(runs)
    assert later["wanda, n of 4, 60 %", "curves", 0, "documentation"] == 44.0


# Whose scores place the experts


def specific(task: str, scores: str, seed: int, right: int) -> RunRecord:
    """`right` of 20 questions answered under the experts that a task's scores ask for."""
    settings = {"score_task": {"name": scores}} if scores != "uniform" else {}
    options: dict[str, Any] = {"task": task, "seed": seed, "settings": settings}
    return record("datainf" if settings else "uniform", [number < right for number in range(20)], **options)


# Right answers at seeds 0, 1 and 2, of 20.
RIGHT = {
    ("a", "a"): (16, 17, 18),
    ("a", "b"): (14, 15, 14),
    ("a", "c"): (16, 15, 14),
    ("a", "uniform"): (15, 15, 15),
    ("b", "a"): (8, 9, 10),
    ("b", "b"): (10, 10, 10),
    ("b", "c"): (10, 9, 8),
    ("b", "uniform"): (11, 11, 12),
    ("c", "a"): (12, 12, 12),
    ("c", "b"): (14, 14, 14),
    ("c", "c"): (13, 13, 15),
    ("c", "uniform"): (10, 10, 10),
}


def test_own_scores_are_held_against_the_mean_of_the_others_at_each_seed(tmp_path):
    plot = plot_of("task_specificity")
    jobs = [specific(*key, seed, right) for key, counts in RIGHT.items() for seed, right in enumerate(counts)]
    plot.draw(written(tmp_path / "sweep_small", jobs), tmp_path)
    assert (tmp_path / "matrix.png").stat().st_size > 10_000
    text = (tmp_path / "results.md").read_text()
    assert "| a | 20 | **0.850 (0.726 to 0.974)** | 0.717 (0.645 to 0.788) |" in text
    assert "small variant" in text
    grid = plot.read(tmp_path / "sweep_small")
    others, uniform = plot.differences(grid.accuracy_TCS).values()
    np.testing.assert_allclose(others * 20, [[1, 2, 4], [1, 1, 1], [0, 0, 2]], atol=1e-9)
    np.testing.assert_allclose(uniform * 20, [[1, 2, 3], [-1, -1, -2], [3, 3, 5]], atol=1e-9)
    rows = {(row["difference"], row["trained for"]): row for row in plot.contrasts(grid).to_dict("records")}
    own, column = "own − mean of the others'", "mean and 95 % interval"
    # (2/3, 1, 7/3) of 20: mean 4/3, standard error √(7/9)/√3; t of two degrees of freedom 4.303
    half = 4.303 * np.sqrt(7 / 9 / 3) / 20
    mean = 4 / 3 / 20
    assert rows[own, "mean of tasks"][column] == f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
    assert [rows[own, "a"][f"seed {seed}"] for seed in range(3)] == ["+0.050", "+0.100", "+0.200"]
    assert rows[own, "b"][column] == "+0.050 (at every seed)"
    assert rows["own − uniform", "mean of tasks"][column].startswith(f"{13 / 9 / 20:+.3f} (")


def test_an_incomplete_grid_is_refused_or_cut_to_its_whole_seeds(tmp_path):
    plot = plot_of("task_specificity")
    jobs = [specific(*key, seed, right) for key, counts in RIGHT.items() for seed, right in enumerate(counts)]
    without = [job for job in jobs if (job.seed, plot.scores_of(job), job.config["task"]["name"]) != (2, "b", "a")]
    cut = plot.read(written(tmp_path / "cut", without))
    assert (cut.seeds, cut.accuracy_TCS.shape, cut.is_small) == ([0, 1], (3, 4, 2), False)
    assert "Other seeds are left out, because they lack a by scores of b, seed 2." in plot.said(cut)
    with pytest.raises(SystemExit, match=r"no seed has all 3 × 4 cells.*missing: a by uniform, seed 0; b by uniform"):
        plot.read(written(tmp_path / "none", [job for job in jobs if plot.scores_of(job) != "uniform"]))
    with pytest.raises(SystemExit, match="a by scores of a, seed 0 was run twice"):
        plot.read(written(tmp_path / "twice", [*jobs, jobs[0]]))
    with pytest.raises(SystemExit, match="holds 0 tasks"):
        plot.read(tmp_path / "empty")


# What benchmarks refuse to print


def test_a_figure_that_cannot_be_right_stops_the_benchmark():
    timing.check_plausible("solve", 0.2, least=0.1)
    for measured in (0.1, 0.0, float("nan")):
        with pytest.raises(SystemExit, match=r"solve: .* cannot be right, because it must be above 0.1"):
            timing.check_plausible("solve", measured, least=0.1)


def test_fresh_grams_are_equal_and_share_no_memory():
    layers = LayerMap(("a",), (("a.weight",),), (3,))
    gram = MatrixGram(torch.eye(2), torch.ones(1, 2), torch.ones(1), 3)
    given = LayerGrams(layers, {"a.weight": gram}, "x")
    copied = timing.fresh(given).grams["a.weight"]
    assert torch.equal(copied.train_train, gram.train_train)
    assert copied.train_train.data_ptr() != gram.train_train.data_ptr()


# Depth


def depth_record(arm: str, kept: list[int], losses: dict[str, dict[str, float]] | None = None) -> RunRecord:
    prices = dict(zip(LAYERS, [0.1, 0.5, 0.2, 0.3, 0.6, 0.4], strict=True))
    return RunRecord(
        name="depth",
        seed=0,
        overrides=[],
        config={"task": {"name": "city"}, "allocator": {"keep": 0.5}},
        choices=choices_of("uniform", arm=arm),
        losses=losses or {},
        decision=DecisionRecord(
            source=arm,
            allocation=AllocationRecord(kind="blocks", units=LAYERS, values=kept, budget=sum(kept)),
            curves={"prices": prices} if arm == "skip_curve" else None,
        ),
    )


def test_depth_pairs_windows_and_compares_with_the_greedy_order():
    intervals = loaded("depth_smollm2", "intervals")
    others_W = np.linspace(3.0, 4.0, 12)
    same = intervals.ratio(others_W + 0.1, others_W)
    assert (same.value, same.low, same.high) == pytest.approx((np.exp(0.1),) * 3)
    assert intervals.ratio(others_W).low < np.exp(others_W.mean()) < intervals.ratio(others_W).high
    runs = [
        depth_record("spaced_blocks", [1, 0, 1, 0, 1, 0], losses={"loss": {"a": 1.0, "b": 3.0}}),
        depth_record("skip_curve", [0, 1, 0, 0, 1, 1]),
        depth_record("greedy", [0, 1, 0, 1, 1, 0]),
    ]
    shown = intervals.table(runs, {id(run): others_W for run in runs})
    assert shown["ratio to spaced_blocks"].tolist() == ["1.00 (1.00 to 1.00)"] * 3
    assert shown.set_index("arm")["loss of rows"]["spaced_blocks"].startswith("2.00 (1.00 to 3.00)")
    orders = {("city", 0.5): [LAYERS[0], LAYERS[2], LAYERS[5]]}
    agreed = intervals.agreement(runs, orders).set_index("arm")
    assert agreed["shared"].to_dict() == pytest.approx({"spaced_blocks": 1 / 3, "skip_curve": 2 / 3})
    assert agreed["rank correlation"]["skip_curve"] == pytest.approx(1.0)
    model = tiny_model("llama", num_hidden_layers=6)
    windows = torch.arange(3, 43).reshape(2, 20)
    with_all = intervals.window_losses(model, [], windows)
    without_some = intervals.window_losses(model, intervals.left_out(runs[0]), windows)
    assert with_all.shape == without_some.shape == (2,)
    assert not np.allclose(with_all, without_some)
    assert np.array_equal(intervals.window_losses(model, [], windows), with_all)
