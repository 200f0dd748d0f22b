"""Laws of names and ranges: a wrong value is refused with the allowed ones, and asking costs no heavy import."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Ge, Gt, Le, Lt

import layerif.allocate
import layerif.estimators
from layerif.checks import Count, check_arguments, check_choice, did_you_mean
from layerif.probe.settings import Probe

# Fields without a default, and settings that belong together.
GIVEN: dict[str, dict[str, Any]] = {
    "TracIn": {"checkpoints": ["a"], "learning_rates": [0.1]},
    "SavedAllocation": {"path": "saved.json"},
    "Shape": {"shape": 2468},
}


def test_an_unknown_choice_is_refused_with_the_allowed_and_the_nearest():
    check_choice("aggregation", "all", ("all", "positive"))
    message = r"aggregation='postive' is not allowed; allowed: all, positive \(did you mean 'positive'\?\)"
    with pytest.raises(ValueError, match=message):
        check_choice("aggregation", "postive", ("all", "positive"))


def test_only_a_near_name_is_suggested():
    assert did_you_mean("datinf", ("lissa", "datainf")) == " (did you mean 'datainf'?)"
    assert did_you_mean("wanda", ("lissa", "datainf")) == did_you_mean("wanda", ()) == ""


def test_names_import_nothing_heavy():
    code = "import sys, layerif.checks; sys.exit(bool({'torch', 'numpy', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def settings_classes() -> Iterator[tuple[str, Any]]:
    """Every estimator, every allocator and the probe, with the key that their settings stand under."""
    yield "probe", Probe
    for key, package in (("estimator", layerif.estimators), ("allocator", layerif.allocate)):
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.startswith("_") or module.name == "allocation":
                continue
            found = importlib.import_module(f"{package.__name__}.{module.name}")
            for _, cls in inspect.getmembers(found, is_dataclass):
                is_settings = all(each.kw_only for each in fields(cls))  # curves and requests for evidence are not
                if cls.__module__ == found.__name__ and is_settings:
                    yield key, cls


def just_outside(hint: Any) -> list[Any]:
    """Values that the annotation of a field refuses; none where it is open."""
    if get_origin(hint) in (Union, UnionType):
        return next(filter(None, map(just_outside, get_args(hint))), [])
    if get_origin(hint) is Literal:
        return [f"{get_args(hint)[0]}x"]
    if get_origin(hint) in (list, Sequence):
        return [[wrong] for wrong in just_outside(get_args(hint)[0])]
    if get_origin(hint) is not Annotated:
        return [math.nan, math.inf] if hint is float else []
    kind, *bounds = get_args(hint)
    step = 1 if kind is int else 0.125
    wrong: list[Any] = [0.5, True] if kind is int else [math.nan, math.inf]
    beyond: dict[type, tuple[str, float]] = {Ge: ("ge", -step), Gt: ("gt", 0), Le: ("le", step), Lt: ("lt", 0)}
    for bound in bounds:
        if type(bound) in beyond:
            name, by = beyond[type(bound)]
            wrong.append(getattr(bound, name) + by)
    return wrong


CASES = [
    pytest.param(key, cls, name, wrong, id=f"{cls.__name__}.{name}={wrong}")
    for key, cls in settings_classes()
    for name, hint in get_type_hints(cls, include_extras=True).items()
    if name in {field.name for field in fields(cls)}
    for wrong in just_outside(hint)
]


@pytest.mark.parametrize(("key", "cls", "name", "wrong"), CASES)
def test_a_value_outside_its_range_is_refused_in_the_same_words_everywhere(key, cls, name, wrong):
    value = repr(wrong) if isinstance(wrong, str) else wrong[0] if isinstance(wrong, list) else wrong
    with pytest.raises(ValueError, match=re.escape(f"{key}.{name}={value} is not allowed; allowed: ")):
        cls(**{**GIVEN.get(cls.__name__, {}), name: wrong})


def test_the_law_covers_the_ranges_of_every_kind_of_setting():
    covered = {(case.values[1].__name__, case.values[2]) for case in CASES}  # type: ignore[attr-defined]
    assert {
        ("Probe", "num_train"),
        ("Probe", "memory_gb"),
        ("Exact", "damping"),
        ("Exact", "damping_rule"),
        ("Cosine", "granularity"),
        ("Ekfac", "aggregation"),
        ("Lissa", "num_steps"),
        ("Lissa", "step_size"),
        ("TracIn", "learning_rates"),
        ("Alpha", "fit"),
        ("Outlier", "multiple"),
        ("Dlp", "centre"),
        ("Avss", "epsilon"),
        ("LinearProbe", "folds"),
        ("LinearProbe", "classes"),
        ("Cca", "sets"),
        ("Ila", "num_steps"),
        ("Ila", "start"),
        ("GradNorm", "normalisation"),
        ("Experts", "beta"),
        ("Experts", "rounding"),
        ("Rank", "budget"),
        ("Sparsity", "max_sparsity"),
        ("Sparsity", "rule"),
        ("SavedAllocation", "kind"),
        ("Shape", "kind"),
    } <= covered


def test_arguments_of_a_function_are_refused_like_the_fields_of_a_dataclass():
    def make(size: Count, text: str = "") -> None: ...

    check_arguments(make, "data", size=1, text="")
    with pytest.raises(ValueError, match=r"data\.size=0 is not allowed; allowed: a whole number of at least 1"):
        check_arguments(make, "data", size=0)
