"""Every exported name of the package stands for one thing, and imports overwrite none of them."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections import defaultdict
from pathlib import Path

import layerif
from layerif import PACKAGE
from layerif.targets import ENTRY_POINTS

# Every command has a `main`, and every metric has a `check` and a `run`, which the loop over metrics calls. `log` and
# the type variable `T` are the same thing in each file.
SHARED = {"main", "check", "run", "log", "T", "loss"}
# "Names others rely on": a module of one of these names would take the function's place in its package.
RELIED_ON = {
    "layerif": ["score", "curves", "prune", "rows"],
    "layerif.allocate": ["to_experts", "to_rank", "to_sparsity", "knapsack"],
}


def modules() -> list[str]:
    """Returns the names of all modules and packages, without the commands that run on import."""
    found = [module.name for module in pkgutil.walk_packages(layerif.__path__, "layerif.")]
    return [name for name in found if not name.endswith("__main__")]


def public_names(file: Path) -> set[str]:
    """Returns the classes, functions, constants and type aliases that a file defines at its top level."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_every_exported_name_stands_for_one_thing():
    where = defaultdict(list)
    for file in sorted(PACKAGE.rglob("*.py")):
        for name in public_names(file):
            where[name].append(str(file.relative_to(PACKAGE)))
    assert {name: files for name, files in where.items() if len(files) > 1 and name not in SHARED} == {}


def test_dotted_names_in_the_code_lead_somewhere():
    """A docstring that names `layerif.x.y` names what is there."""
    places = {place for file in PACKAGE.rglob("*.py") for place in re.findall(r"\blayerif(?:\.\w+)+", file.read_text())}
    assert {place for place in places - {ENTRY_POINTS} if not is_there(place)} == set()


def is_there(place: str) -> bool:
    try:
        pkgutil.resolve_name(place)
    except (ImportError, AttributeError):
        return False
    return True


def test_no_module_takes_the_place_of_a_function_that_others_rely_on():
    for package, functions in RELIED_ON.items():
        for function in functions:
            assert f"{package}.{function}" not in modules()


def test_functions_are_still_there_after_every_module_is_imported():
    for name in modules():
        importlib.import_module(name)
    for package, functions in RELIED_ON.items():
        parent = importlib.import_module(package)
        for function in functions:
            if hasattr(parent, function):
                assert callable(getattr(parent, function)), f"{package}.{function}"
    for function in ("datainf", "exact", "lissa", "grad_dot", "cosine", "tracin"):
        assert callable(getattr(importlib.import_module(f"layerif.estimators.{function}"), function))
    from layerif.moe import LoraMoeConfig
    from layerif.pruning.magnitude import magnitude_mask
    from layerif.pruning.sparsegpt import sparsegpt
    from layerif.pruning.wanda import wanda_mask
    from layerif.scores import aggregate, smooth

    assert all(map(callable, (LoraMoeConfig, magnitude_mask, sparsegpt, wanda_mask, aggregate, smooth)))
