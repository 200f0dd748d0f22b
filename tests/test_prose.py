"""Laws of the prose in the code: how docstrings and comments open, what messages say, and who has a docstring.

An override says what its base says, and an implementation of a protocol what the protocol says: they need no docstring.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from layerif import PACKAGE

FILES = sorted(PACKAGE.rglob("*.py"))
OPENINGS = re.compile(r"(what|of|whether|how|whatever|that which)\b", re.IGNORECASE)
# "there is no room" and "is no longer" are English; "x is no folder" is not.
DENIALS = re.compile(r"(?<!there )\b(is|are) no (?!longer\b)")

VERB = re.compile(r"[A-Z][a-z-]*s\b(?!')")
# What is allowed, or what to do next.
ADVICE = re.compile(r"; |\b(allowed|must|needs|give|use|pass|run|set|say)\b")
# Reasons that end another message, which says what to do.
REASONS = {"record/record.py", "report/reading.py"}

every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Gives every docstring with the line that it begins on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Gives the first line of every comment, with its number."""
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 or token.line[: token.start[1]].strip():
                yield token.start[0], token.string.lstrip("#! ")
            last = token.start[0]


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Gives every text of a module that is not a docstring; an f-string is one text, with … for its fields."""
    told = {text for _, text in docstrings(tree)}
    within = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif node not in within and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from [] if inspect.cleandoc(node.value) in told else [(node.lineno, node.value)]


@every_file
def test_docstrings_and_comments_open_with_a_verb_or_a_noun(file):
    opened = [*docstrings(parsed(file)), *comments(file.read_text())]
    assert not [f"{line}: {text.splitlines()[0]}" for line, text in opened if OPENINGS.match(text)]


@every_file
def test_docstrings_of_functions_begin_with_a_verb_in_the_third_person(file):
    """Those of properties name the value, and an override or a nested function may have another."""
    told = [(node, ast.get_docstring(node)) for node in functions(parsed(file))]
    assert not [f"{node.lineno}: {text.splitlines()[0]}" for node, text in told if text and not VERB.match(text)]


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Gives the public functions and methods of a module without its properties."""
    for parent in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for node in parent.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            if not any("property" in ast.unparse(each) for each in node.decorator_list):
                yield node


@every_file
def test_messages_say_is_not_a(file):
    said = messages(parsed(file))
    assert not [f"{line}: {text}" for line, text in said if DENIALS.search(text)]


@every_file
def test_errors_say_what_is_allowed_or_what_to_do(file):
    if str(file.relative_to(PACKAGE)) in REASONS:
        return
    texts = [(line, text) for line, text in refusals(parsed(file)) if not text.startswith(("it ", "its "))]
    # A text that ends with a field ends with another message, or with advice.
    assert not [f"{line}: {text}" for line, text in texts if not text.endswith("…") and not ADVICE.search(text)]


def refusals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Gives the text of every ValueError that a module raises, as `messages` does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc and ast.unparse(node.exc).startswith("ValueError("):
            assert isinstance(node.exc, ast.Call)
            if isinstance(
                node.exc.args[0], ast.Constant | ast.JoinedStr | ast.BinOp
            ):  # and not another function's words
                yield node.lineno, " ".join(text for _, text in messages(ast.Module([ast.Expr(node.exc)], [])))


@every_file
def test_public_names_have_docstrings(file):
    if any(part.startswith("_") and part != "__init__.py" for part in file.relative_to(PACKAGE).parts):
        return
    assert not list(undocumented(file))


def undocumented(file: Path) -> Iterator[str]:
    """Gives the public functions, classes and methods of a module that have no docstring and need one."""
    name = ".".join(["layerif", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    module = importlib.import_module(name)
    for node in parsed(file).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield f"{node.lineno}: {node.name}"
        if isinstance(node, ast.ClassDef):
            inherited = inherited_by(getattr(module, node.name))
            methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
            for method in methods:
                is_setter = any(ast.unparse(decorator).endswith(".setter") for decorator in method.decorator_list)
                is_own = not method.name.startswith("_") and method.name not in inherited and not is_setter
                if is_own and ast.get_docstring(method) is None:
                    yield f"{method.lineno}: {node.name}.{method.name}"


def inherited_by(cls: type) -> set[str]:
    """Gives the names that a class has from its bases, or from a protocol that it implements."""
    names = {name for base in cls.__mro__[1:] for name in vars(base)}
    own = set(dir(cls)) | {name for base in cls.__mro__ for name in inspect.get_annotations(base)}
    for protocol in protocols():
        members = members_of(protocol)
        if protocol is not cls and members <= own:
            names |= members
    return names


def members_of(protocol: Any) -> set[str]:
    """Gives the public names that a protocol asks for."""
    return {name for name in {*vars(protocol), *inspect.get_annotations(protocol)} if not name.startswith("_")}


@cache
def protocols() -> list[type]:
    """Gives the protocols of the package."""
    found = []
    for file in FILES:
        names = [node.name for node in parsed(file).body if isinstance(node, ast.ClassDef)]
        if names and not file.name.startswith("__main__"):
            path = ".".join(["layerif", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
            module = importlib.import_module(path)
            found += [getattr(module, name) for name in names if getattr(getattr(module, name), "_is_protocol", False)]
    return found
