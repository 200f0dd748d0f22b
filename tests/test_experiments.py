"""The figures experiments report: accuracy over seeds, differences paired by question, and profiles side by side."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import arms, comparing, timing
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


@pytest.mark.parametrize(
    ("experiment", "kinds"), [("capacity_smollm2", {"Lora", "AdaLora"}), ("mixture_smollm2", {"LoraMoe", "EqualLora"})]
)
def test_every_arm_of_the_rivals_composes_and_binds(experiment, kinds):
    command = (EXPERIMENTS / experiment / "run.sh").read_text()
    named = re.findall(r'(?:arms|shapes)="?(?:\$arms)?,?([a-z_0-9, ]+)', command)
    arms = sorted({arm for text in named for arm in re.split("[, ]", text) if arm})
    configs = {arm: composed(f"experiment={experiment}", f"arm={arm}") for arm in arms}
    assert len({str(OmegaConf.to_container(config, resolve=True)) for config in configs.values()}) == len(arms) > 3
    assert {config.method._target_.rpartition(".")[2] for config in configs.values()} == kinds
    assert {config.objective for config in configs.values()} == {"validation/loss"}


def tuned_run(folder: Path, arm: str, rate: float, seed: int, loss: float, **options: Any) -> None:
    """Writes a run whose loss on the rows is about `loss`, on test and on validation rows."""
    rows = options.pop("rows", [f"city {number}" for number in range(40)])
    task, budget = options.pop("task", "mixed"), options.pop("budget", 240)
    noise = np.random.default_rng([seed, budget]).normal(1, 0.1, len(rows))
    losses = {row: float(loss + value) for row, value in zip(rows, noise, strict=True)}
    config = {
        "task": {"name": task},
        "method": {"learning_rate": rate},
        "allocator": {"budget": budget},
        "estimator": {},
    }
    record = RunRecord(
        name="n",
        seed=seed,
        choices={**choices_of("uniform", task=task, method="lora"), "arm": arm},
        config={**config, "estimator": {}},
        overrides=[],
        metrics={"loss": float(np.mean(list(losses.values()))), "validation/loss": loss, "accuracy": 0.5},
        losses={"loss": losses},
        **{"parameters": {"trainable": 1000}, "seconds": {"fit": 60.0}, **options},
    )
    place = folder / f"{task}-{arm}-{budget}-{rate}-{seed}"
    place.mkdir(parents=True)
    record.write(place)


def test_each_arm_is_compared_at_the_rate_that_validation_chose(tmp_path, capsys):
    for rate, loss in ((1e-4, 2.0), (1e-3, 1.0), (1e-2, 3.0)):
        tuned_run(tmp_path, "uniform", rate, 0, loss)
        tuned_run(tmp_path, "eva", rate, 0, loss - 10 * rate)
    for seed in (1, 2):
        tuned_run(tmp_path, "uniform", 1e-3, seed, 1.0)
        tuned_run(tmp_path, "eva", 1e-3, seed, 0.5, parameters={"trainable": 1020})
    groups = arms.by_arm(arms.read(tmp_path))
    assert arms.chosen_rate(groups["uniform"]) == 1e-3
    assert not arms.is_at_the_edge(groups["uniform"])
    assert {arm: sorted(runs) for arm, runs in arms.tuned(groups).items()} == {"uniform": [0, 1, 2], "eva": [0, 1, 2]}
    (row,) = arms.compared(arms.tuned(groups), [("eva", "uniform"), ("adalora", "uniform")]).to_dict("records")
    assert row["difference"] == pytest.approx((-0.01 - 0.5 - 0.5) / 3)
    assert (row["seeds"], row["p"]) == (3, row["p Holm"])
    table = arms.arms(groups)
    assert table["rate"].tolist() == ["0.001", "0.001"]
    with pytest.raises(SystemExit, match="run the sweep over learning rates first"):
        arms.chosen_rate([])


def test_arms_are_compared_where_more_rank_pays(tmp_path):
    plot, sweep = plot_of("capacity_smollm2"), tmp_path / "capacity_smollm2_ranks"
    losses = {"mixed": (2.0, 1.5, 1.0), "city": (2.0, 1.5, 1.5), "city_large": (1.0, 1.0, 1.0)}
    for task, of_rank in losses.items():
        for rank, loss in zip((1, 8, 64), of_rank, strict=True):
            for rate in (1e-3, 3e-3):
                tuned_run(sweep, "uniform", rate, 0, loss + rate, task=task, budget=30 * rank)
            for seed in (1, 2):
                tuned_run(sweep, "uniform", 1e-3, seed, loss + 1e-3, task=task, budget=30 * rank)
    ranks = plot.by_task(arms.read(sweep))
    assert plot.settings(ranks) == [("mixed", 8, "1,2,3,4"), ("city", 2, "1,2")]
    tuned_run(tmp_path / "capacity_smollm2", "uniform", 1e-3, 0, 1.5)
    tuned_run(tmp_path / "capacity_smollm2", "eva", 1e-3, 0, 1.2)
    plot.draw(ranks, plot.by_task(arms.read(tmp_path / "capacity_smollm2")), tmp_path)
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert "Against uniform on mixed" in (tmp_path / "results.md").read_text()


def test_the_mixture_is_shown_by_task_with_its_routing(tmp_path):
    plot = plot_of("mixture_smollm2")
    tasks = {task: {"load": [0.5, 0.5], "entropy": np.log(2) / 2} for task in ("city", "region")}
    routing = {"model.layers.0": {"load": [0.75, 0.25], "entropy": np.log(2), "tasks": tasks, "between_tasks": 0.3}}
    rows = [f"{task} {number}" for task in tasks for number in range(20)]
    for arm, used in (("plain_lora", {}), ("uniform", routing)):
        for seed in range(2):
            tuned_run(tmp_path, arm, 1e-3, seed, 1.0, rows=rows, routing=used)
    records = arms.read(tmp_path)
    (row,) = plot.experts(arms.tuned(arms.by_arm(records))).to_dict("records")
    assert row == pytest.approx(
        {"most used": 1.5, "entropy": 1, "between tasks": 0.3, "entropy city": 0.5, "entropy region": 0.5}
        | {"arm": "uniform"}
    )
    plot.draw(records, tmp_path)
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert "| city | region |" in (tmp_path / "results.md").read_text()


ALLOCATORS = {
    "Prune": ("Sparsity", "Depth", "WaterFilling", "Knapsack"),
    "Drop": ("Blocks", "Position"),
    "Quantise": ("Bits", "Knapsack"),
}


@pytest.mark.parametrize(
    ("experiment", "method"),
    [("sparsity_smollm2", "Prune"), ("sparsity_7b", "Prune"), ("depth_smollm2", "Drop"), ("bits_smollm2", "Quantise")],
)
def test_every_arm_that_an_experiment_sweeps_composes_and_binds(experiment, method):
    command = EXPERIMENTS / experiment / "run.sh"
    swept = composed(f"experiment={experiment}", hydra=True).hydra.sweeper.params
    texts = [swept.arm, *re.findall(r"arms?=(?:\$arms)?([a-z_,]+)", command.read_text() if command.exists() else "")]
    arms = sorted({arm for text in texts for arm in text.split(",") if arm})
    configs = [composed(f"experiment={experiment}", f"arm={arm}") for arm in arms]
    assert len({str(OmegaConf.to_container(config, resolve=True)) for config in configs}) == len(arms) > 3
    for config in configs:
        assert config.method._target_.endswith(method)
        assert config.allocator._target_.rpartition(".")[2] in ALLOCATORS[method]


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
    results.draw(tmp_path / "runs", tmp_path)
    arms = pd.read_csv(tmp_path / "arms.csv").set_index("arm").drop(index="untouched")
    assert arms["s a step"].to_dict() == pytest.approx({arm: 1.0 + more for arm, more in beyond.items()})
    assert arms["seeds"].tolist() == [3, 3, 3]
    table: Any = pd.read_csv(tmp_path / "comparisons.csv").set_index(["arm", "against"])
    assert set(table.index) == {
        ("lora half last", "lora all"),
        ("lora half layerif", "lora all"),
        ("lora half layerif", "lora half last"),
    }
    assert table.loc[("lora half last", "lora all"), "difference"] == pytest.approx(0.3, abs=0.01)
    assert table["as good"].tolist()[:2] == [False, True]
    assert table["differs"].all()
    # Another machine adds a seed, and this one's stay.
    shutil.rmtree(tmp_path / "runs")
    for arm in beyond:
        name = f"{arm.replace(' ', '_')}-3"
        (tmp_path / "runs" / name).mkdir(parents=True)
        write(tmp_path / "made", arm, seed=3, **more_fields).write(tmp_path / "runs" / name)
    results.draw(tmp_path / "runs", tmp_path)
    assert pd.read_csv(tmp_path / "comparisons.csv")["seeds"].tolist() == [4, 4, 4]


@pytest.mark.slow
def test_every_arm_of_rows_composes_and_binds_and_has_a_reference():
    lines = (EXPERIMENTS / "rows_smollm2" / "run.sh").read_text().replace("\\\n", " ").splitlines()
    of_text = " ".join(lines).split("text() {")[1].split('"$@"')[0]
    shared = {"sweep": [], "text": [word for word in of_text.split() if "=" in word and "experiment" not in word]}
    full = re.findall(r'^full="(.*)"', "\n".join(lines), flags=re.MULTILINE)[0]
    found = set()
    for line in lines:
        name = line.split(" ")[0]
        if name not in shared:
            continue
        given = [word for word in line.replace("$full", full).split() if "=" in word]
        for choice in itertools.product(*(expanded(each) for each in (*shared[name], *given))):
            config = composed("experiment=rows_smollm2", *(each for each in choice if not each.startswith("name=")))
            assert (config.trainer.max_steps, config.evaluation.metrics) == (45, ["loss", "perplexity"])
            assert config.task.name == ("text" if name == "text" else "city_large")
            found.add(str(OmegaConf.to_container(config, resolve=True)))
    assert len(found) == 1 + 1 + 3 * 2 + 2 + 5 + 1 + 4 + 2


def expanded(override: str) -> list[str]:
    key, _, values = override.partition("=")
    return [f"{key}={value}" for value in values.split(",")] if key != "seed" else ["seed=0"]


@pytest.mark.usefixtures("undrawn")
def test_rows_are_compared_by_the_stated_rule(tmp_path):
    plot = loaded("rows_smollm2", "plot")
    rng = np.random.default_rng(0)
    loss = {f"q{number}": float(value) for number, value in enumerate(rng.normal(2, 1, 40))}
    beyond = {"all": 0.0, "random 60": 0.5, "influence 60": 0.2, "reversed 60": 0.9, "mastery 1": 0.5}
    of_text = {"none": 0.0, "low_perplexity": 0.3, "full none": 0.0, "full spider": 0.0}
    for sweep, losses in (("rows_smollm2", beyond), ("rows_smollm2_text", of_text)):
        for arm, more in losses.items():
            for seed in range(3):
                rows = {row: value + more + 0.001 * float(rng.normal()) for row, value in loss.items()}
                metrics = {"loss": float(np.mean(list(rows.values()))), "perplexity_256": 20 * float(np.exp(-more))}
                name, _, number = arm.partition(" ")
                choice = {"reversed": "influence", "mastery": "mastery", "influence": "influence", "random": "random"}
                selection = {"level": int(number)} if name == "mastery" else {"reversed": name == "reversed"}
                selection |= {"budget": int(number)} if number.isdigit() else {}
                is_text, is_full = sweep.endswith("text"), name == "full"
                made = write(tmp_path / "made", f"{sweep} {arm}", seed=seed, metrics=metrics, losses={"loss": rows})
                made.choices = {"method": "full" if is_full else "lora", "selection": choice.get(name, "all")}
                made.config = {
                    "selection": selection,
                    "task": {"name": "text" if is_text else "city_large"},
                    "data": {"token_filter": name},
                    "method": {"protect": number},
                }
                (tmp_path / "sweeps" / sweep / f"{arm}-{seed}").mkdir(parents=True)
                made.write(tmp_path / "sweeps" / sweep / f"{arm}-{seed}")
    plot.main(tmp_path, tmp_path)
    table = pd.read_csv(tmp_path / "results.csv").set_index(["arm", "against", "metric"])
    assert {(arm, other) for arm, other, _ in table.index} == {
        ("influence 60", "random 60"),
        ("reversed 60", "random 60"),
        ("mastery 1", "random 60"),
        ("random 60", "all"),
        ("low_perplexity", "none"),
        ("full spider", "full none"),
    }
    assert table.loc[("influence 60", "random 60", "loss"), "difference"] == pytest.approx(-0.3, abs=0.01)
    assert table.loc[("reversed 60", "random 60", "perplexity"), "difference"] == pytest.approx(-0.4, abs=0.01)
    assert table["differs"].xs("loss", level="metric").to_dict() == {
        ("influence 60", "random 60"): True,
        ("reversed 60", "random 60"): True,
        ("mastery 1", "random 60"): False,
        ("random 60", "all"): True,
        ("low_perplexity", "none"): True,
        ("full spider", "full none"): False,
    }
    assert "mastery 1" in (tmp_path / "results.md").read_text()


def test_the_profiles_are_of_every_estimator_that_needs_no_more():
    run = loaded("layer_profiles", "run")
    files = {file.stem: file.read_text() for file in conf_folder().glob("estimator/*.yaml")}
    to_fill_in = {name for name, text in files.items() if "???" in text}
    assert set(run.ESTIMATORS) == set(files) - to_fill_in - set(run.APART)
    assert {"datainf", "alpha", "outlier", "random"} <= set(run.ESTIMATORS)
    assert composed("experiment=layer_profiles", "task=region", "estimator=ila").method._target_.endswith("ScoresOnly")


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
    later = pd.read_csv(results / "runs.csv").set_index(comparing.KEYS)["value"].to_dict()
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


def depth_record(arm: str, kept: list[int], metrics: dict[str, float] | None = None) -> RunRecord:
    prices = dict(zip(LAYERS, [0.1, 0.5, 0.2, 0.3, 0.6, 0.4], strict=True))
    return RunRecord(
        name="depth",
        seed=0,
        overrides=[],
        config={
            "task": {"name": "city"},
            "allocator": {"keep": 0.5},
            "evaluation": {"first_window": 24, "num_windows": 2},
        },
        choices=choices_of("uniform", method="drop", arm=arm),
        metrics=metrics or {},
        decision=DecisionRecord(
            source=arm,
            allocation=AllocationRecord(kind="blocks", units=LAYERS, values=kept, budget=sum(kept)),
            curves={"prices": prices} if arm == "skip_curve" else None,
        ),
    )


def test_depth_pairs_windows_and_compares_with_the_greedy_order(tmp_path, monkeypatch):
    results = loaded("depth_smollm2", "results")
    others_W = np.linspace(3.0, 4.0, 12)
    same = results.ratio(others_W + 0.1, others_W)
    assert (same.value, same.low, same.high) == pytest.approx((np.exp(0.1),) * 3)
    assert results.ratio(others_W).low < np.exp(others_W.mean()) < results.ratio(others_W).high
    model = tiny_model("llama", num_hidden_layers=6)
    windows = torch.arange(3, 43).reshape(2, 20)
    monkeypatch.setattr(results.Dense, "loaded", (model, None))
    monkeypatch.setattr(results, "test_windows", lambda *_: windows)
    metrics = {"loss": 2.0, "loss_low": 1.0, "loss_high": 3.0}
    runs = [
        depth_record("spaced_blocks", [1, 0, 1, 0, 1, 0], metrics),
        depth_record("skip_curve", [0, 1, 0, 0, 1, 1]),
        depth_record("greedy", [0, 1, 0, 1, 1, 0]),
    ]
    for run in runs:
        (folder := tmp_path / "sweep" / run.choices["arm"]).mkdir(parents=True)
        run.write(folder)
    order = [LAYERS[0], LAYERS[2], LAYERS[5]]
    (tmp_path / "sweep" / "greedy" / results.SEARCH).write_text(json.dumps({"dropped": order}))
    results.draw(tmp_path / "sweep", tmp_path)
    found = results.by_run(pd.read_csv(tmp_path / "runs.csv"))
    values = {arm: found["city, 50 %", arm, 0] for arm in ("spaced_blocks", "skip_curve", "greedy")}
    expected = results.window_losses(model, [LAYERS[1], LAYERS[3], LAYERS[5]], windows)
    assert results.windows_of(values["spaced_blocks"]) == pytest.approx(expected, rel=1e-4)
    assert not np.allclose(results.window_losses(model, [], windows), expected)
    shown = results.table(found).set_index("arm")
    assert shown["ratio to spaced_blocks"]["spaced_blocks"] == "1 (1 to 1)"
    assert shown["loss of rows"].to_dict() == {
        "spaced_blocks": "2.000 (1.000 to 3.000)",
        "skip_curve": "–",
        "greedy": "–",
    }
    agreed = results.agreement(found).set_index("arm")
    assert agreed["shared"].to_dict() == pytest.approx({"spaced_blocks": 1 / 3, "skip_curve": 2 / 3})
    assert agreed["rank correlation"]["skip_curve"] == pytest.approx(1.0)
    # Windows that were measured before are not measured again, and runs of another machine stay.
    shutil.rmtree(tmp_path / "sweep" / "skip_curve")
    monkeypatch.setattr(results, "window_losses", lambda *_: pytest.fail("it was measured again"))
    results.draw(tmp_path / "sweep", tmp_path)
    assert results.by_run(pd.read_csv(tmp_path / "runs.csv")).keys() == found.keys()


# Bits


def test_formats_are_compared_with_one_that_ran_once_beside_every_choice(tmp_path):
    results = loaded("bits_smollm2", "results")
    (tmp_path / "sweep").mkdir()
    for seed in range(4):
        for arm in ("uniform", "curves")[seed > 0 :]:
            perplexity = 30.0 if arm == "uniform" else 24.0 + 0.1 * seed
            (folder := tmp_path / "sweep" / f"{arm}-{seed}").mkdir()
            RunRecord(
                name="bits",
                seed=seed,
                overrides=[],
                config={"allocator": {"target": 4.5}},
                choices=choices_of("uniform", method="quantise", arm=arm),
                metrics={"perplexity_256": perplexity, "bits": 4.5},
            ).write(folder)
    results.draw(tmp_path / "sweep", tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"sweep", "runs.csv", "results.md", "results.png"}
    (found,) = results.against(pd.read_csv(tmp_path / "runs.csv"), "uniform")
    assert (found.setting, found.arm, found.metric, found.found.num_seeds) == (
        "4.5 bits",
        "curves",
        "documentation",
        4,
    )
    assert found.cell.startswith("0.80 (")
    assert found.cell.endswith("*")
