"""Pages that the manual makes at build time: every key, every module of the package, every experiment."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.utils import get_object

import layerif

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(layerif.__path__, "layerif.")
    if not any(part.startswith("_") for part in module.name.split("."))
)

GROUPS = {
    "model": "The model that is measured, and adapted or pruned.",
    "task": "The source of the rows: train and validation rows are scored and trained on, test rows are evaluated.",
    "estimator": "The way a layer is scored, or the levels of a matrix are priced.",
    "allocator": "The way scores or curves are spent.",
    "method": "The work that spends the allocation.",
    "pruner": "The way weights are chosen for removal; only `method=prune` looks at it.",
    "selection": "The train rows that fine-tuning learns from.",
    "trainer": "Lightning's trainer.",
    "logger": "The place where metrics go while a run trains.",
    "launcher": "The place where the jobs of a sweep run.",
    "sweeper": "The way the jobs of a sweep are chosen.",
    "experiment": "A change to all of the above: one question each.",
    "arm": "One column of an experiment's table.",
    "size": "The full or the small variant of an experiment; `small=true` chooses the small one.",
}


@dataclass(frozen=True)
class Key:
    """A key of a YAML file: its dotted path, its default as written, and its comment."""

    path: str
    default: str
    comment: str


def every_key() -> str:
    """Returns Markdown with the root keys, and every choice of every group with its keys."""
    parts = ["## Root keys\n", _table(keys_of((CONF / "config.yaml").read_text(), without=("hydra",)))]
    for group in sorted(_groups(), key=lambda name: (list(GROUPS).index(name) if name in GROUPS else 99, name)):
        parts.append(f"## `{group}`\n\n{GROUPS.get(group, '')}\n")
        for file in sorted((CONF / group).rglob("*.yaml")):
            text = file.read_text()
            choice = file.relative_to(CONF / group).with_suffix("")
            parts.append(f"### `{group}={choice}`\n")
            parts.append((" ".join(_head(text)) or summary(text)) + "\n")
            parts.append(_table(keys_of(text)))
    return "\n".join(parts)


def keys_of(text: str, without: Sequence[str] = ()) -> list[Key]:
    """Reads the keys of a YAML file in its order, with the comments that stand behind them.

    Args:
        text: the file.
        without: top-level keys to leave out; the defaults list is always left out.
    """
    keys: list[Key] = []
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = re.match(r"( *)([\w./@-]+):(?: +(.*))?$", line)
        if not found:
            continue
        indent, name, rest = len(found[1]), found[2], found[3] or ""
        above = [(depth, key) for depth, key in above if depth < indent] + [(indent, name)]
        if above[0][1] in ("defaults", *without):
            continue
        default, comment = _split(rest)
        keys.append(Key(".".join(key for _, key in above), default, comment))
    keys = list(_with_meanings(keys))
    parents = {key.path.rpartition(".")[0] for key in keys}
    return [key for key in keys if key.default or key.comment or key.path not in parents]


def meanings(target: str) -> dict[str, str]:
    """Returns what a class of this package says of its arguments, by name.

    Args:
        target: its dotted path; classes of other packages give nothing.
    """
    if not target.startswith("layerif."):
        return {}
    found: dict[str, str] = {}
    for kind in getattr(get_object(target), "__mro__", ()):
        for section in re.findall(
            r"^(?:Args|Attributes):\n((?:(?: .*)?\n?)*)", inspect.cleandoc(kind.__doc__ or ""), re.M
        ):
            for names, said in re.findall(r"^    ([\w, ]+)(?: \([^)]*\))?: ((?:.*\n?)(?:     .*\n?)*)", section, re.M):
                for name in names.split(", "):
                    found.setdefault(name, " ".join(said.split()))
    return found


def summary(text: str) -> str:
    """Returns the first sentence of the docstring of a choice's class, and nothing for a class of another package."""
    found = re.search(r"^_target_: (layerif\.\S+)", text, re.M)
    said = inspect.getdoc(get_object(found[1])) or "" if found else ""
    return " ".join(said.split("\n\n")[0].split())


def _with_meanings(keys: Sequence[Key]) -> Iterator[Key]:
    """Yields the keys, those without a comment with what the docstring of their class says."""
    targets = {key.path.removesuffix("_target_"): key.default for key in keys if key.path.endswith("_target_")}
    said = {place: meanings(target) for place, target in targets.items()}
    for key in keys:
        place, dot, name = key.path.rpartition(".")
        comment = key.comment or said.get(place + dot, {}).get(name, "")
        yield Key(key.path, key.default, comment)


def rooms() -> dict[str, str]:
    """Returns a page for every room: Markdown that asks autodoc for the room's modules."""
    pages: dict[str, str] = {}
    for module in MODULES:
        room = module.split(".")[1]
        title = "" if module == f"layerif.{room}" else f"{module}\n{'-' * len(module)}\n\n"
        pages.setdefault(f"{room}.md", f"# layerif.{room}\n")
        pages[f"{room}.md"] += f"\n```{{eval-rst}}\n{title}.. automodule:: {module}\n```\n"
    return pages


def experiments() -> dict[str, str]:
    """Returns the Markdown pages of `experiments/` by their path, with links to other files led there."""
    pages = {}
    for file in sorted((ROOT / "experiments").rglob("*.md")):
        path = file.relative_to(ROOT / "experiments")
        there = "../" * (len(path.parts) + 1) + "/".join(("experiments", *path.parts[:-1], ""))
        text = re.sub(r"\]\((?!http|#)(?![^)]*\.md[)#])", f"]({there}", file.read_text())
        pages[str(path)] = text if path.name == "README.md" else f"---\norphan: true\n---\n\n{text}"
    pages["README.md"] += "\n```{toctree}\n:hidden:\n:glob:\n\n*/README\n```\n"
    return pages


def escaped(lines: Sequence[str]) -> list[str]:
    """Escapes what reStructuredText would read as markup, and keeps tables and indented blocks as they are written.

    Args:
        lines: a docstring, Google style, with code in single backticks.
    """
    return list(_escaped(lines))


SECTIONS = re.compile(r"(Args|Attributes|Example|Examples|Note|Raises|Returns|Yields):")


def _escaped(lines: Sequence[str]) -> Iterator[str]:
    """Yields the lines of a docstring with `|`, `*` and a trailing `_` escaped outside of code."""
    where, previous = "text", ""  # text, section or literal
    for line in lines:
        is_table = re.match(r"\s*\|.*\|\s*$", line) is not None
        if not line.strip():
            yield line
        elif SECTIONS.fullmatch(line):
            where = "section"
            yield line
        elif is_table or (line.startswith(" ") and where != "section" and (where == "literal" or not previous.strip())):
            if where != "literal":
                yield from ("", "::", "")
            where = "literal"
            yield f"    {line}"
        else:
            if where == "literal" and previous.strip():
                yield ""
            where = "text" if not line.startswith(" ") else where
            parts = re.split(r"(`+[^`]*`+)", line if where == "section" else line.strip())
            yield "".join(part if part.startswith("`") else _plain(part) for part in parts)
        previous = line


def _plain(text: str) -> str:
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", re.sub(r"([|*])", r"\\\1", text))


def _groups() -> list[str]:
    return [folder.name for folder in CONF.iterdir() if folder.is_dir()]


def _head(text: str) -> list[str]:
    """The comment lines at the top of a YAML file."""
    head = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            head.append(line.lstrip("# "))
    return head


def _split(rest: str) -> tuple[str, str]:
    """A value and the comment behind it; a `#` inside quotes belongs to the value."""
    found = re.match(r"""((?:"[^"]*"|'[^']*'|[^#"']|(?<=\S)#)*?)(?:(?:^|\s+)#\s*(.*))?$""", rest)
    return (found[1].strip(), found[2] or "") if found else (rest.strip(), "")


def _table(keys: Sequence[Key]) -> str:
    if not keys:
        return ""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key in keys:
        default = f"`` {key.default} ``" if key.default else ""
        cells = (f"`{key.path}`", default, key.comment)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"
