"""Four-way questions on the countries of the world: the embedded tasks, which need neither hub nor account.

The facts come from the data files of the package `countryinfo` (MIT); its code is never imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from layerif.checks import check_choice
from layerif.data.source import Row

NUM_OPTIONS = 4

# By kind of question: the field of the data file and the wording.
KINDS: Mapping[str, tuple[str, str]] = {
    "capital": ("capital", "What is the capital of {country}?"),
    "region": ("region", "Which region of the world is {country} in?"),
    "currency": ("currencies", "What is the currency code of {country}?"),
    "demonym": ("demonym", "What is the nationality of people from {country}?"),
}

# A country's place on [0, 1) decides its split: below the first bound train, and so on.
SPLIT_BOUNDS: Mapping[str, tuple[float, float]] = {"train": (0.0, 0.5), "validation": (0.5, 0.7), "test": (0.7, 1.0)}


@dataclass(frozen=True, kw_only=True)
class Countries:
    """A source of rows `id, question, options (4 texts), answer (a text)` about one kind of fact.

    A hash of a country's code puts it into one split, the same for every kind: about 50 % train, 20 % validation and
    30 % test. Wrong options are the facts of three other countries of the same split, so that no split shows the
    answers of another. They are drawn by country: a value is a wrong option as often as it is a right one, and its
    frequency gives no cue. Countries without the fact are left out.

    Args:
        kind: the kind of fact, one of KINDS.
        seed: chooses the wrong options and the order. It belongs to the dataset and not to the run, so that runs with
            several seeds answer the same questions.
    """

    kind: str
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("task.source.kind", self.kind, KINDS)

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows in the order of the hash, which is as good as shuffled and never changes."""
        check_choice("a split of a country task in task.splits", split, SPLIT_BOUNDS)
        field, question = KINDS[self.kind]
        low, high = SPLIT_BOUNDS[split]
        facts = {
            code: (country, values)
            for code, country, values in sorted(_facts(field), key=lambda fact: _place(fact[0]))
            if low <= _place(code) < high
        }
        answers = [values[0] for _, values in facts.values()]
        for code, (country, values) in facts.items():
            random = Random(f"{self.seed} {self.kind} {code}")
            drawn = dict.fromkeys(random.sample(answers, len(answers)))  # distinct, in the order first drawn
            options = [values[0], *[value for value in drawn if value not in values][: NUM_OPTIONS - 1]]
            random.shuffle(options)
            yield Row(
                f"{self.kind} of {country}",
                {"id": code, "question": question.format(country=country), "options": options, "answer": values[0]},
            )

    def files(self) -> list[Path]:
        return sorted(_data_folder().glob("*.json"))


def _facts(field: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yields code, name and right answers of every country that has the field, once per code."""
    seen = set()
    for file in sorted(_data_folder().glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        code = record["ISO"]["alpha3"]
        values = _texts(record.get(field))
        if values and code not in seen:
            seen.add(code)
            yield code, record["name"], values


def _texts(value: Any) -> list[str]:
    """Returns the non-empty texts of a field that is a text, a list of texts, or missing."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


def _place(code: str) -> float:
    """Returns a number in [0, 1) that depends on the code alone."""
    return int.from_bytes(sha256(code.encode()).digest()[:6], "big") / 2**48


def _data_folder() -> Path:
    spec = find_spec("countryinfo")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "data"
        if folder.is_dir():
            return folder
    raise ValueError(
        "the tasks capital, region, currency and demonym read the package countryinfo, which is not installed; "
        "run: pip install countryinfo==1.0.1"
    )
