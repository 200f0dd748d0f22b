"""The README and the manual: commands compose, links lead somewhere, code runs.

CONTRIBUTING.md says how pages mark what is run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from layerif.allocate.curves import Curves
from layerif.app.messages import first_of
from layerif.app.schema import check, register
from layerif.evidence import LayerGrams, MatrixGram
from layerif.files import conf_folder
from layerif.layers import LayerMap
from layerif.scores import LayerScores
from layerif.targets import ENTRY_POINTS, registered_modules
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE_AT_BUILD_TIME = {"_build", "api", "experiments"}
WRITTEN = [page for page in sorted(DOCS.rglob("*.md")) if not MADE_AT_BUILD_TIME & set(page.relative_to(DOCS).parts)]
PAGES = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *WRITTEN,
    )
}
FENCE = re.compile(r"(<!-- run -->\n)?^```([\w{}-]*).*?\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
BLOCKS = [(page, *found.groups()) for page, text in PAGES.items() for found in FENCE.finditer(text)]
EXAMPLE_PACKAGE = DOCS / "example_package"

# `layerif --help` shows commands, too.
HELP = yaml.safe_load((conf_folder() / "config.yaml").read_text())["hydra"]["help"]["template"]
HELP_COMMANDS = [
    re.split(r"\s{2,}", line.strip())[0]
    for line in HELP.splitlines()
    if line.startswith("  layerif") and "…" not in line
]


def commands(text: str, name: str = "layerif ") -> list[str]:
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.startswith(name)]


def overrides_of(command: str) -> tuple[str, ...]:
    return tuple(word for word in shlex.split(command)[1:] if "=" in word and not word.startswith("-"))


def code(language: str, containing: str) -> str:
    (found,) = [text for _, _, kind, text in BLOCKS if kind == language and containing in text]
    return found


@cache
def composed(overrides: tuple[str, ...]) -> DictConfig:
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("config", list(overrides))


SHOWN = [command for _, _, kind, text in BLOCKS if kind in ("sh", "") for command in commands(text)]
OVERRIDES = sorted({tuple(map(first_of, overrides_of(command))) for command in (*SHOWN, *HELP_COMMANDS)})
GROUPS = {folder.name for folder in conf_folder().iterdir() if folder.is_dir()}
# These change the choices of other groups.
ALONE = {"experiment", "arm", "recipe", "small"}


def choices_behind(overrides: tuple[str, ...]) -> dict[str, str | None]:
    """Returns by group the choice that decides which keys these overrides may name; None stands for the default."""
    pairs = [override.lstrip("+").partition("=")[::2] for override in overrides]
    named = {key: value for key, value in pairs if key in GROUPS or "@" in key}
    return dict.fromkeys(key.removeprefix("hydra.").partition(".")[0] for key, _ in pairs) | named


def together(commands: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Puts the overrides of commands that make no different choice into one, because each composition takes long."""
    found: list[tuple[dict[str, str | None], tuple[str, ...]]] = []
    for overrides in commands:
        choices = choices_behind(overrides)
        for place, (chosen, joined) in enumerate(found):
            agrees = all(chosen.get(group, name) == name for group, name in choices.items())
            if agrees and not ALONE & {*choices, *chosen}:
                found[place] = chosen | choices, tuple(dict.fromkeys((*joined, *overrides)))
                break
        else:
            found.append((choices, overrides))
    return [joined for _, joined in found]


@pytest.fixture(autouse=True)
def with_the_example_package(monkeypatch, tmp_path_factory):
    """Makes the example package look installed, with the entry points that its pyproject.toml gives it."""
    installed = tmp_path_factory.mktemp("installed")
    project = tomllib.loads((EXAMPLE_PACKAGE / "pyproject.toml").read_text())["project"]
    about = installed / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{name} = {module}" for name, module in project["entry-points"][ENTRY_POINTS].items()]
    (about / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINTS}]", *lines, ""]))
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.syspath_prepend(str(EXAMPLE_PACKAGE))
    registered_modules.cache_clear()
    yield installed
    registered_modules.cache_clear()


@pytest.mark.parametrize("overrides", together(OVERRIDES), ids=" ".join)
def test_every_command_composes(overrides):
    assert composed(overrides)


def test_commands_are_put_together_only_where_they_choose_the_same():
    given = [("estimator=exact", "seed=1"), ("estimator.damping=1",), ("task=cola", "estimator=exact"), ("seed=2",)]
    assert together(given) == [("estimator=exact", "seed=1", "task=cola", "seed=2"), ("estimator.damping=1",)]


def test_every_program_shown_is_installed():
    text = (ROOT / "pyproject.toml").read_text()
    shown = {word for _, _, kind, text in BLOCKS if kind == "sh" for word in re.findall(r"^layerif\S*", text, re.M)}
    assert shown > {"layerif"}
    assert all(re.search(rf"^{name} = ", text, re.M) for name in shown)


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_image_leads_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page].replace("\n", " ")):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_front_page_stays_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_every_page_is_in_the_manual():
    listed = {
        (ROOT / page).parent / f"{name}.md"
        for page, _, kind, text in BLOCKS
        if kind == "{toctree}"
        for name in text.split()
        if not name.startswith(":")
    }
    assert set(WRITTEN) - {DOCS / "index.md"} <= listed


@pytest.fixture
def settings_pages(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import settings_pages

    return settings_pages


def test_the_reference_shows_every_key(settings_pages):
    text = settings_pages.every_key()
    for file in (conf_folder() / "config.yaml", *conf_folder().glob("*/*.yaml")):
        content = yaml.safe_load(file.read_text()) or {}
        for key in set(content) - {"defaults", "hydra"}:
            assert f"`{key}" in text, f"{file}: {key}"
        if file.parent != conf_folder():
            assert f"### `{file.parent.name}={file.stem}`" in text


def test_keys_are_read_with_their_default_and_comment(settings_pages):
    text = 'a: 1 # first\nb: # parent\n  c: "x # y" # third\nd:\n  e: x#y\n'
    keys = [(key.path, key.default, key.comment) for key in settings_pages.keys_of(text)]
    assert keys == [("a", "1", "first"), ("b", "", "parent"), ("b.c", '"x # y"', "third"), ("d.e", "x#y", "")]


def test_keys_without_a_comment_say_what_the_docstring_says(settings_pages):
    text = settings_pages.meanings("layerif.allocate.allocation.Allocation")["values"]
    assert text.startswith("a count per unit")
    assert settings_pages.meanings("lightning.Trainer") == {}


def test_docstrings_are_safe_for_restructured_text(settings_pages):
    argument = ["Args:", "    x_: a", "        longer one."]
    lines = ["Scores |S| of a*b, see `x|y`.", "", *argument, "", "| a | b |", "", "End."]
    assert settings_pages.escaped(lines) == [
        r"Scores \|S\| of a\*b, see `x|y`.",
        *("", "Args:", r"    x\_: a", "        longer one.", ""),
        *("", "::", "", "    | a | b |", "", "End."),
    ]


@pytest.fixture
def module_of(monkeypatch):
    """Makes the module of a page's python block, under the name that its first line says."""

    def make(containing: str) -> types.ModuleType:
        text = code("python", containing)
        module = types.ModuleType(text.split()[1].removesuffix(".py").replace("/", "."))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(text, module.__dict__)
        return module

    return make


def fields_of(module: types.ModuleType, kind: str, text: str) -> dict:
    fields = yaml.safe_load(text)
    assert fields.pop("_target_") == f"{module.__name__}.{kind}"
    return fields


def test_the_estimator_example_is_a_working_estimator(module_of):
    module = module_of("class Squared")
    fields = fields_of(module, "Squared", code("yaml", "squared.Squared"))
    gram = some_gram()
    scores = module.Squared(**fields).score(grams_of(gram))
    assert scores.values == (25.0 + 4 + 4 + 1,)
    assert scores.source.startswith("squared(")
    single = MatrixGram(gram.train_train.float(), gram.val_train.float(), gram.val_norms.float(), 2)
    assert module.Squared(**fields).influence(single).dtype == torch.float64


def test_an_estimator_of_another_package_is_found_on_the_search_path():
    config = composed(("hydra.searchpath=[pkg://layerif_cubed.conf]", "estimator=cubed"))
    check(OmegaConf.create({"estimator": config.estimator, "seed": config.seed}))
    assert instantiate(config.estimator).score(grams_of(some_gram())).values == (125.0 + 8 + 8 + 1,)


def some_gram() -> MatrixGram:
    gradients = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    return MatrixGram(gradients @ gradients.T, gradients @ gradients.T, gradients.norm(dim=1), 2)


def grams_of(gram: MatrixGram) -> LayerGrams:
    return LayerGrams(LayerMap(("block.0",), (("block.0.q.weight",),), (2,)), {"block.0.q.weight": gram}, "none")


def test_the_allocator_example_is_a_working_allocator(module_of, decider):
    module = module_of("class Top")
    fields = fields_of(module, "Top", code("yaml", "top.Top"))
    layers = LayerMap(("a", "b", "c"), (("a.q",), ("b.q",), ("c.q",)), (4, 4, 4))
    scores = LayerScores(layers.names, (0.1, 3.0, 2.0), "undertrained", "test", "")
    top = module.Top(**fields | {"number": 2})
    assert top(scores, layers).values == (1, 5, 5)
    assert sorted(replace(decider, allocator=top)().allocation.values) == [1, 5, 5]


def some_curves() -> Curves:
    units = ("a.0.q", "a.0.k", "a.1.q")
    by_half = torch.tensor([[[0, 1, 2, 4.0], [0, 2, 4, 8], [0, 1, 3, 9]]] * 2, dtype=torch.float64)
    levels = (0.0, 0.3, 0.6, 0.9)
    sizes = torch.tensor([[10.0], [10], [20]]) * torch.tensor(levels)
    return Curves(units, levels, by_half.sum(0), sizes, source={"pruner": "wanda"}, by_half=by_half)


def test_the_example_of_an_estimator_of_curves_works(module_of, with_the_yaml_examples):
    module, curves = module_of("class Guarded"), some_curves()
    config = composed((with_the_yaml_examples, "method=prune", "estimator=guarded"))
    assert config.allocator._target_ == "layerif.allocate.curves.Knapsack"
    assert config.estimator._target_ == "layerif.estimators.guarded.Guarded"
    fields = {key: config.estimator[key] for key in ("form", "granularity", "tokens", "times")}
    guarded = module.Guarded(**fields)
    assert guarded.source.startswith("guarded(loss_curve(")
    priced = guarded.curves(curves)
    factors = torch.tensor([4.0, 4.0, 1.0])
    assert torch.equal(priced.costs, curves.costs * factors[:, None])
    assert priced.allocate(0.5).values[2] > curves.allocate(0.5).values[2]


def test_the_example_of_an_allocator_of_curves_works(module_of):
    module, curves = module_of("class Partway"), some_curves()
    partway = module.Partway(**fields_of(module, "Partway", code("yaml", "partway.Partway")))
    bought, got = curves.allocate(0.5), partway(curves)
    assert got.values == pytest.approx([(value + 0.5) / 2 for value in bought.values])
    assert got.source == {"pruner": "wanda"}


@pytest.fixture
def with_the_yaml_examples(tmp_path) -> str:
    """Writes the pages' YAML examples as a folder of choices, and returns the override that finds them."""
    for _, _, kind, text in BLOCKS:
        if kind == "yaml" and (named := re.match(r"# conf/(\S+\.yaml)", text)):
            file = tmp_path / "choices" / named[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return f"hydra.searchpath=[file://{tmp_path / 'choices'}]"


def test_the_task_and_model_examples_are_choices(with_the_yaml_examples):
    config = composed((with_the_yaml_examples, "task=quiz", "model=smollm2_360m"))
    for group in ("task", "model"):
        check(OmegaConf.create({group: config[group], "seed": config.seed}))
    assert config.task.columns.answer == "key"
    assert config.task.pattern  # of jsonl
    assert config.model.attention == "sdpa"


def test_the_source_example_is_a_working_source(module_of, with_the_yaml_examples):
    module_of("class Sums")
    config = composed((with_the_yaml_examples, "task=sums"))
    splits = instantiate(OmegaConf.create({"task": config.task, "seed": 0}), _convert_="all")["task"].load()
    assert len(splits.train) == len(splits.test) == 40
    assert splits.train[0].id != splits.train[1].id


def test_the_ranks_of_the_axolotl_example_are_those_of_the_adapter():
    """axolotl hands the patterns on to PEFT as they are."""
    given = yaml.safe_load(code("yaml", "lora_rank_pattern"))
    fields = {"r", "target_modules", "rank_pattern", "alpha_pattern"}
    settings = {name: given[f"lora_{name}"] for name in fields} | {"lora_dropout": given["lora_dropout"]}
    config = LoraConfig(lora_alpha=given["lora_alpha"], **settings)
    adapted = get_peft_model(tiny_model(), config)
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == 3 * 7
    for number, rank in enumerate((3, 8, 13)):
        of_block = [module for name, module in layers.items() if f"layers.{number}." in name]
        assert {(module.r["default"], module.scaling["default"]) for module in of_block} == {(rank, 2.0)}
    values = [*given["lora_rank_pattern"].values(), *given["lora_alpha_pattern"].values(), given["lora_alpha"]]
    assert all(isinstance(value, int) and value > 0 for value in values)  # axolotl takes no others


# What follows runs in `make test-docs`.

SCRIPTS = [text for _, _, kind, text in BLOCKS if kind == "python" and not text.startswith("# ")]
MARKED = [(page, text) for page, marked, kind, text in BLOCKS if marked and kind == "sh"]


@pytest.mark.docs
@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_every_script_runs_on_a_tiny_model(number, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    notes = [f"note {index} says that {index * index % 97} birds and {index} cats live here" for index in range(120)]
    (tmp_path / "notes.txt").write_text("\n\n".join(notes))
    script = SCRIPTS[number].replace('"model=smollm2"', f'"model=local", "model.path={model_folder}"')
    exec(script.replace("/models/mine", str(model_folder)), names)
    if "decision" in names:
        decision = names["decision"]
        assert sum(decision.allocation.values) == 150
        assert names["adapted"].peft_config["default"].num_experts == decision.allocation.by_name()


TINY = {
    "model": "local",
    "model.path": "/models/mine",
    "probe.num_train": "8",
    "probe.num_validation": "4",
    "probe.max_length": "64",
    "task.num_test": "4",
    "trainer.max_steps": "2",
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "data.batch_size": "4",
}
FOR_TEXT = {
    "method.calibration.num_windows": "4",
    "method.calibration.window": "16",
    "evaluation.num_windows": "4",
    "evaluation.window": "16",
}


def tiny(command: str) -> list[str]:
    """Returns the words of a command, with the settings of a tiny run where the command itself says nothing."""
    words = shlex.split(command)
    if words[0] != "layerif":
        return words
    given = {word.partition("=")[0] for word in words if "=" in word}
    settings = TINY | (FOR_TEXT if {"method=prune", "method=quantise"} & {*words} else {})
    if "method=adalora" in words:  # it needs three steps to choose ranks
        settings |= {"trainer.max_steps": "3"}
    if "allocator=sparsity" in words:  # it smooths seven blocks or more
        settings |= {"allocator.smoothing": "false"}
    # The tiny model has a tenth of the blocks.
    words = [
        f"allocator.budget={int(word[17:]) // 10}" if word.startswith("allocator.budget=") else word for word in words
    ]
    return [*words, *(f"{key}={value}" for key, value in settings.items() if key not in given)]


@pytest.mark.docs
def test_the_marked_commands_compose_as_tiny_runs():
    for command in {command for _, text in MARKED for command in commands(text)}:
        assert composed(tuple(map(first_of, overrides_of(shlex.join(tiny(command))))))


@pytest.mark.docs
@pytest.mark.parametrize("page", list(dict.fromkeys(page for page, _ in MARKED)))
def test_the_marked_commands_of_a_page_run(page, model_folder, task_folder, tmp_path, with_the_example_package):
    programs = {
        "layerif": "layerif",
        "layerif-report": "layerif.report",
        "layerif-store": "layerif.app.store",
        "layerif-export": "layerif.app.export",
    }
    places = (str(with_the_example_package), str(EXAMPLE_PACKAGE), str(ROOT), os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(filter(None, places))
    wide = tmp_path / "wide"  # the blocks of number formats divide its rows
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    for command in [command for other, text in MARKED if other == page for command in commands(text, "layerif")]:
        folder = wide if "method=quantise" in command else model_folder
        name, *words = (
            word.replace("/models/mine", str(folder)).replace("/data/mine", str(task_folder)) for word in tiny(command)
        )
        done = subprocess.run(
            [sys.executable, "-m", programs[name], *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=170,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
