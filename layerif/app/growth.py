"""The size of a configuration once its interpolations are spelt out, counted without spelling them out.

An interpolation costs a few bytes in a file and a copy of what it stands for, and OmegaConf resolves each copy anew. So
a short file in which every setting names the one before ten times would fill the memory, or never end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

# A setting as texts: a text, or a list or mapping of such settings.
Texts = str | Sequence["Texts"] | Mapping[str, "Texts"]

_MOST = 1_000_000  # characters; what layerif ships has about 7,000
_SHORT = 100  # characters of a setting that may be a part of another one's name
_KEY = r"[^\\{}():,\s'\"$]+"
_LOOKING_UP = r"(?:hydra|oc\.select|oc\.deprecated|oc\.dict\.keys|oc\.dict\.values)"
_OPENS = re.compile(r"\$\{\s*")
_SETTING = re.compile(rf"\$\{{\s*({_KEY})\s*\}}")
# Openings are followed by the name of a setting, a resolver that looks one up, or another resolver. Of the others
# `oc.decode` and `oc.create` read texts as interpolations, so theirs may come from the environment alone.
_NAMED = re.compile(rf"(?:({_LOOKING_UP})\s*:\s*['\"]?)?({_KEY})['\"]?\s*[,}}]")
_CALLED = re.compile(
    rf"(?!{_LOOKING_UP}\s*:|oc\.(?:decode|create)\s*:.*\$\{{\s*(?!oc\.env\s*:))[\w.-]+\s*:", flags=re.DOTALL
)


def check_growth(texts: Texts) -> None:
    """Refuses a configuration that would be too large once its interpolations are spelt out.

    Args:
        texts: the whole configuration, with interpolations as they are written.

    Raises:
        ValueError: it would be too large, or one of its interpolations does not say which setting it stands for.
    """
    try:
        size = _Sizes(texts).of(())
    except RecursionError as error:
        raise ValueError(
            "the configuration has too long a chain of interpolations; write the values themselves"
        ) from error
    if size > _MOST:
        raise ValueError(
            f"the configuration has {size:,} characters once its interpolations are spelt out; allowed: {_MOST:,}; "
            "write shorter values, or fewer interpolations of them"
        )


class _Sizes:
    """The sizes of settings in characters, each counted once."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.sizes: dict[tuple[str, ...], int] = {}
        self.spelt: dict[tuple[str, ...], str] = {}

    def of(self, path: tuple[str, ...]) -> int:
        """Counts a setting; one that lies within what an interpolation stands for counts as all of that."""
        node, path = self._find(path)
        if path not in self.sizes:
            self.sizes[path] = 0  # as a part of itself, which OmegaConf refuses
            if isinstance(node, str):
                size = len(node) + sum(map(self.of, self._named_in(node, path)))
            elif isinstance(node, Mapping):
                size = sum(len(key) + self.of((*path, key)) for key in node)
            else:
                size = sum(self.of((*path, str(index))) for index in range(len(node)))
            self.sizes[path] = 1 + size
        return self.sizes[path]

    def _find(self, path: tuple[str, ...]) -> tuple[Texts, tuple[str, ...]]:
        """Returns the setting of a path with its path, or the text in which the path ends before."""
        node = self.texts
        for depth, key in enumerate(path):
            if isinstance(node, str):
                return node, path[:depth]
            if isinstance(node, Mapping):
                node = node.get(key, "")
            else:
                node = node[int(key)] if key.isdecimal() and int(key) < len(node) else ""
        return node, path

    def _named_in(self, text: str, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        """Yields the paths of the settings that the interpolations of a text stand for."""
        spelt = self._with_short_ones(text, path) if "${" in text else text
        for opening in _OPENS.finditer(spelt):
            if named := _NAMED.match(spelt, opening.end()):
                yield _path_of(named[2], path, from_hydra=named[1] == "hydra")
            elif not _CALLED.match(spelt, opening.end()):
                raise ValueError(
                    f"{'.'.join(path)}={text!r:.80} does not say which setting it stands for; allowed: "
                    "${section.key}, in which a key may be ${another.key} that holds a name"
                )

    def _with_short_ones(self, text: str, path: tuple[str, ...]) -> str:
        """Spells out the interpolations of names, as in `${sizes.${size}}`."""
        if path not in self.spelt:
            self.spelt[path] = text  # within itself, which OmegaConf refuses
            before = ""
            while text != before and len(text) <= _MOST:
                before, text = text, _SETTING.sub(lambda found: self._short(found, path), text)
            self.spelt[path] = text
        return self.spelt[path]

    def _short(self, found: re.Match[str], path: tuple[str, ...]) -> str:
        node, where = self._find(named := _path_of(found[1], path))
        if where != named or not isinstance(node, str):
            return found[0]
        value = self._with_short_ones(node, where)
        return value if len(value) <= _SHORT and re.fullmatch(_KEY, value) else found[0]


def _path_of(key: str, path: tuple[str, ...], *, from_hydra: bool = False) -> tuple[str, ...]:
    """Returns the path that a key leads to from the setting at `path`; each dot at its start leads one step up."""
    inner = key.lstrip(".")
    ups = len(key) - len(inner)
    above = ("hydra",) if from_hydra else path[: max(0, len(path) - ups)] if ups else ()
    return (*above, *filter(None, re.split(r"[.\[\]]", inner)))
