"""Bad input is refused in one sentence that names what is wrong: no traceback, no silence, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from layerif.app.messages import explain, of_the_user
from layerif.app.schema import check, register
from layerif.app.setup import Setup
from layerif.data.render import Example
from layerif.data.task import Splits
from layerif.files import conf_folder
from layerif.report.reading import read_jobs
from layerif.report.report import write_report
from layerif.targets import allowed_target, build, nodes_with_target
from tests import bad_input
from tests.bad_input import Bad, Place
from tests.command import Done
from tests.records import record, written
from tests.tiny import tiny_tokenizer

OFTEN = [
    *bad_input.COMMANDS,
    *bad_input.LAYERS_TO_TRAIN,
    *bad_input.CURVES_AND_PRUNERS,
    *bad_input.STORES,
    *bad_input.ROWS[:20],
    *bad_input.SAVED[:12],
    *bad_input.MODELS[:8],
]
SELDOM = [
    *bad_input.MORE_COMMANDS,
    *bad_input.YAMLS,
    *bad_input.groups(),
    *bad_input.paths(),
    *bad_input.PROGRAMS,
    *bad_input.ROWS[20:],
    *bad_input.SAVED[12:],
    *bad_input.MODELS[8:],
]


@pytest.mark.parametrize("bad", OFTEN, ids=lambda bad: bad.name[:60])
def test_bad_input_is_refused_in_one_sentence(bad, model_folder, task_folder, tmp_path, record_property):
    refuse(bad, Place(tmp_path, model_folder, task_folder))
    record_property("bad inputs", 1)


@pytest.mark.soak
@pytest.mark.parametrize("bad", SELDOM, ids=lambda bad: bad.name[:60])
def test_much_bad_input_is_refused_in_one_sentence(bad, model_folder, task_folder, tmp_path, record_property):
    refuse(bad, Place(tmp_path, model_folder, task_folder))
    record_property("bad inputs", 1)


def refuse(bad: Bad, place: Place) -> None:
    """Gives a bad input and checks the answer."""
    said = sentence(lambda: bad.give(place))
    assert said is not None, "it was accepted"
    assert re.search(bad.says, said), said
    assert not list(_left(place.folder / "outputs"))


def sentence(give: Callable[[], object]) -> str | None:
    """The one sentence that answers what is given, by a command or as an error; None where it is accepted."""
    try:
        done = give()
    except Exception as error:
        if of_the_user(error) is not error:  # the command would show a traceback
            raise
        said = explain(error, [])
    else:
        if not isinstance(done, Done) or done.returncode == 0:
            return None
        assert done.returncode in (1, 2)
        (said,) = done.stderr.strip().splitlines()
        name, _, said = said.partition(": ")
        assert name in ("layerif", "layerif-report", "layerif-store", "layerif-export")
    assert "\n" not in said
    assert len(said) < 10_000
    return said


def _left(outputs: Path) -> Iterator[Path]:
    """The files of a run that began. Hydra keeps its own before the run does anything."""
    for file in outputs.rglob("*"):
        by_hydra = ".hydra" in file.parts or file.name in ("multirun.yaml", "failure.json") or file.suffix == ".log"
        if file.is_file() and not by_hydra:
            yield file


TRAIN, VALIDATION, TEST = (
    tuple(Example(f"{part}{n}", f"Which {part} {n}?", ("a", "b"), ("a", "b"), 0) for n in range(2)) for part in "xyz"
)
SPLITS = Splits(train=TRAIN, validation=VALIDATION, test=TEST)
ROOTS = ("probe", "fit", "evaluation", "data")
GROUPS = ("model", "task", "estimator", "allocator", "method", "pruner", "selection", "trainer")
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((conf_folder() / group).glob("*.yaml"))]
MISSING = {
    ("model", "local"): ["model.path=/somewhere"],
    ("model", "hub"): ["model.name=org/name"],
    ("estimator", "file"): ["estimator.path=scores.json"],
    ("estimator", "tracin"): ["estimator.checkpoints=[a]", "estimator.learning_rates=[1]"],
    ("allocator", "file"): ["allocator.path=allocation.json"],
}


def test_a_number_takes_nothing_else(record_property):
    config = composed()
    record_property("bad inputs", sum(num_refused(config[root], root) for root in ROOTS))


@pytest.mark.soak
@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_a_number_of_any_choice_takes_nothing_else(group, choice, record_property):
    config = composed(f"{group}={choice}", *MISSING.get((group, choice), []))
    record_property("bad inputs", num_refused(config[group], group))


def composed(*overrides: str) -> Any:
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", [*overrides, "outputs=/nowhere", "logger=none", "trainer.accelerator=cpu"])
    return OmegaConf.to_container(config, resolve=True)


def num_refused(node: Any, key: str) -> int:
    """Puts into each number of a key what no number is, and what some numbers may be, and counts the refusals."""
    refused, accepted = 0, []
    for setting in _numbers({key: node}):
        for name, value in {**bad_input.NO_NUMBERS, "-1": -1, "null": None}.items():
            config = OmegaConf.create({key: copy.deepcopy(node)})
            OmegaConf.update(config, setting, value)
            said = sentence(lambda config=config: (check(config), made(config, key)))
            if said is None:
                accepted += [(setting, name)] * (name in bad_input.NO_NUMBERS)
            else:
                assert setting.rpartition(".")[2] in said, (setting, name)
                refused += 1
    assert not accepted
    return refused


def made(config: Any, key: str) -> object:
    """Makes the object of a key as a run does."""
    if key == "trainer":
        setup = Setup.__new__(Setup)
        setup.config = config
        return setup.trainer([], Path())
    made = build(OmegaConf.to_container(config[key], resolve=True), key, [])
    return made(SPLITS, tiny_tokenizer()) if key == "data" else made


def _numbers(plain: Any) -> Iterator[str]:
    """The settings that are numbers by their values, or by their annotations where they are null."""
    for path, node in nodes_with_target(plain):
        target = allowed_target(node["_target_"], path)
        hints = typing.get_type_hints(target) if dataclasses.is_dataclass(target) else {}
        for name, value in node.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number or (value is None and {int, float} & set(_kinds(hints.get(name)))):
                yield f"{path}.{name}"


def _kinds(hint: Any) -> Iterator[Any]:
    yield hint
    for argument in typing.get_args(hint):
        yield from _kinds(argument)


def test_odd_records_are_named_and_left_out_and_the_page_is_written(tmp_path, undrawn, record_property):
    folder = written(tmp_path, [record("datainf", [True] * 3)])
    whole = json.loads((folder / "0" / "record.json").read_text())
    for number, (changes, _) in enumerate(bad_input.RECORDS, start=1):
        file = folder / str(number) / "record.json"
        file.parent.mkdir()
        file.write_bytes(bad_input.as_bytes(bad_input.changed_within(whole, changes)))
    (folder / "directory" / "record.json").mkdir(parents=True)
    (folder / "began" / ".hydra").mkdir(parents=True)
    (folder / "began" / ".hydra" / "overrides.yaml").write_bytes(b"\xff")
    console = Console(record=True, width=10_000)
    write_report(folder, console)
    said = console.export_text()
    for number, (_, reason) in enumerate(bad_input.RECORDS, start=1):
        assert f"left out: {folder / str(number) / 'record.json'} is not a readable record of layerif: {reason}" in said
    assert said.count("left out: ") == len(bad_input.RECORDS) + 1
    for name in ("report.html", "report.md", "report.csv"):
        assert (folder / name).stat().st_size
    record_property("bad inputs", len(bad_input.RECORDS) + 1)


ODD = [None, "x", "", 5, -1, 2.5, 10**400, float("nan"), True, [], {}, [None], {"a": {"b": [1]}}, "\ud800", "x" * 5000]


@pytest.mark.soak
@pytest.mark.parametrize("number", range(100))
def test_whatever_one_value_of_a_record_is_the_page_is_written(number, tmp_path, undrawn, record_property):
    """The value is read as it is, or the record is named."""
    chosen = Random(number)
    folder = written(tmp_path, [record("datainf", [True] * 3), record("uniform", [True] * 3)])
    file = folder / "1" / "record.json"
    whole = json.loads(file.read_text())
    path = chosen.choice(list(_paths(whole)))
    node = whole
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = chosen.choice(ODD)
    file.write_text(json.dumps(whole))
    console = Console(record=True, width=10_000)
    write_report(folder, console)
    is_read = len(read_jobs(folder).records) == 2
    assert is_read or f"left out: {file} is not a readable record of layerif: " in console.export_text(), path
    record_property("bad inputs", 1)


def _paths(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield (*above, key)
        yield from _paths(value, (*above, key))
