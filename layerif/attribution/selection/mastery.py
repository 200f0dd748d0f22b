"""`selection=mastery`: rows by how well the model knows their fact already (Ye et al., 2409.15825).

A fact is a subject, a relation and an object: the questions of the country and city tasks. The model completes
sentences about the subject, and the share of completions that hold the object is the row's mastery R. Level 0 is R = 0,
and level i of 1 to 4 is R in ((i − 1)/4, i/4].
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from layerif.attribution.selection import Budget, Pool, RankedSelection, Values, by_priority, draw
from layerif.checks import Count, Positive
from layerif.data.batches import Encoded, collate, padding_id
from layerif.data.cities import QUESTION, unaccented
from layerif.data.countries import KINDS
from layerif.data.render import Example
from layerif.data.rows import AnyExample
from layerif.data.tokens import token_ids
from layerif.models.blocks import device_of
from layerif.models.contexts import evaluating
from layerif.probe.measurements import Load, hash_of
from layerif.probe.store import MeasurementKind
from layerif.progress import progress
from layerif.versions import VERSIONS

MASTERY: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("mastery", "generations")

_SEED = 0  # the mastery of a row belongs to the model, so that runs of several seeds measure it once

# By relation: the beginnings of sentences that the model completes.
SENTENCES: Mapping[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {subject} is",
        "The capital city of the country {subject} is called",
        "The government of {subject} sits in the city of",
        "If you visit the capital of {subject}, you are in",
        "Question: Which city is the capital of {subject}?\nAnswer:",
        "A list of countries and their capitals: {subject} –",
    ),
    "region": (
        "{subject} is located in",
        "On a map of the world, you find {subject} in",
        "The continent that {subject} belongs to is",
        "{subject} is a country in the region of",
        "Question: Which part of the world is {subject} in?\nAnswer:",
        "A list of countries and their regions: {subject} –",
    ),
    "currency": (
        "The ISO code of the currency of {subject} is",
        "Banks abbreviate the currency of {subject} as",
        "The three letters that stand for the money of {subject} are",
        "Prices in {subject} are given in the currency with the code",
        "Question: Which code does the currency of {subject} have?\nAnswer:",
        "A list of countries and the codes of their currencies: {subject} –",
    ),
    "demonym": (
        "A person from {subject} is called",
        "The nationality of somebody born in {subject} is",
        "The people of {subject} are known as the",
        "Somebody with a passport of {subject} is",
        "Question: How are people from {subject} called?\nAnswer:",
        "A list of countries and the nationalities of their people: {subject} –",
    ),
    "city": (
        "The city of {subject} is in the country of",
        "{subject} is a large city in",
        "Whoever lives in {subject} lives in the country",
        "On a map of the world, you find the city of {subject} in",
        "Question: Which country does the city of {subject} belong to?\nAnswer:",
        "A list of cities and their countries: {subject} –",
    ),
}
_ASKED = {relation: wording for relation, (_, wording) in KINDS.items()} | {"city": QUESTION}
# Other names of an object that count as well.
_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "United States": ("USA", "U.S.", "US", "America"),
    "United Kingdom": ("UK", "U.K.", "Britain", "England", "Scotland", "Wales"),
    "United Arab Emirates": ("UAE", "Emirates"),
    "Czechia": ("Czech Republic",),
    "Ivory Coast": ("Côte d'Ivoire",),
    "Myanmar": ("Burma",),
    "Turkey": ("Türkiye",),
    "Democratic Republic of the Congo": ("DR Congo", "DRC", "Congo-Kinshasa"),
    "Republic of the Congo": ("Congo-Brazzaville",),
    "Americas": ("America", "North America", "South America", "Central America"),
}


class Fact(NamedTuple):
    """A relation between a subject and an object, as the question of a row asks for it."""

    relation: str
    subject: str
    object: str


@dataclass(frozen=True, kw_only=True)
class MasteredRows(RankedSelection):
    """Takes rows of one level of mastery, drawn by the seed. The value of a row is its mastery R.

    The published figures take 210 completions a row. Generation takes the time: a few completions tell the levels apart
    roughly, and `max_rows` bounds the rows that are looked at.

    Attributes:
        level: 0 (the model never says it) to 4 (in more than three quarters of the completions).
        num_completions: of each row, dealt out over the sentences of its relation.
        max_rows: the most rows that are looked at, the same ones whatever the seed; None: all.
        temperature: of the sampling.
        max_new_tokens: of a completion.
    """

    budget: Budget = 60
    level: Annotated[int, Ge(0), Le(4)] = 2
    num_completions: Count = 12
    max_rows: Count | None = None
    temperature: Positive = 0.7
    max_new_tokens: Count = 32

    def check(self, pool: Pool) -> None:
        super().check(pool)
        for row in pool.rows:
            fact_of(row)
        if self.unit == "rows" and self.max_rows is not None and self.spent(pool) > self.max_rows:
            raise ValueError(
                f"selection.budget={self.budget} asks for {self.spent(pool)} rows, and "
                f"selection.max_rows={self.max_rows} looks at fewer; raise selection.max_rows, or set it to null"
            )
        padding_id(pool.measurements.tokenizer)

    def values(self, pool: Pool, load: Load) -> list[float | None]:
        looked_at = sorted(by_priority([0.0] * len(pool.rows), pool.rows, _SEED)[: self.max_rows])
        measured, rows = pool.measurements, [pool.rows[row] for row in looked_at]
        description = {
            "model": measured.model.fingerprint(),
            "mastery": VERSIONS["mastery"],
            "completions": [self.num_completions, self.temperature, self.max_new_tokens],
            "seed": _SEED,
            "facts": hash_of([fact_of(row) for row in rows]),
            "sentences": hash_of(SENTENCES),
        }

        def measure(key: str) -> dict[str, Tensor]:
            return {"right": torch.tensor(self._right(rows, pool, measured.merged(load), measured.store.partial(key)))}

        found, _ = measured.store.kept(MASTERY, description, measure, about=measured.about())
        right = dict(zip(looked_at, found["right"].tolist(), strict=True))
        return [right[row] / self.num_completions if row in right else None for row in range(len(pool.rows))]

    def priority(self, value: float) -> float | None:
        return 0.0 if level_of(value) == self.level else None

    def limit(self, values: Values) -> str:
        counts = Counter(level_of(value) for value in values if value is not None)
        found = ", ".join(f"{counts[level]} of level {level}" for level in range(5))
        return f"selection.level={self.level} (rows found: {found})"

    def _right(self, rows: Sequence[AnyExample], pool: Pool, model: nn.Module, partial: Path | None) -> list[int]:
        """Counts the completions of each row that hold its object; what an interrupted count found is taken up."""
        file = None if partial is None else partial / "mastery.jsonl"
        known = dict(_counted(file))
        found = []
        for row in progress(rows, "rows completed"):
            name = draw(row, _SEED)
            if name not in known:
                fact = fact_of(row)
                texts = self.complete(fact, model, pool.measurements.tokenizer, seed=int(name[:8], 16))
                known[name] = sum(holds(text, fact.object) for text in texts)
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with file.open("a", encoding="utf-8") as opened:
                        opened.write(json.dumps([name, known[name]]) + "\n")
            found.append(known[name])
        return found

    def complete(self, fact: Fact, model: nn.Module, tokenizer: Any, *, seed: int) -> list[str]:
        """Lets a model complete the sentences of a fact's relation.

        Args:
            fact: names the subject.
            model: a causal language model.
            tokenizer: its tokenizer.
            seed: of the sampling, so that a row's completions do not depend on other rows.
        """
        from transformers import GenerationConfig

        sentences = SENTENCES[fact.relation]
        given = [
            sentences[number % len(sentences)].format(subject=fact.subject) for number in range(self.num_completions)
        ]
        prompts = [Encoded(ids, len(ids)) for ids in token_ids(tokenizer, given, None, special=True)]
        # Every setting is given, because a model's own generation settings may cut or penalise.
        settings = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=padding_id(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
        )
        device = device_of(model)
        batch = collate(prompts, padding_id(tokenizer), side="left")
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
        with (
            evaluating(model),
            torch.inference_mode(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(seed)
            outputs_BT = model.generate(**inputs, generation_config=settings)  # type: ignore[operator]
        return tokenizer.batch_decode(outputs_BT[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def fact_of(row: AnyExample) -> Fact:
    """Reads the fact that a row asks for.

    Raises:
        ValueError: the row asks for none of the relations that have sentences.
    """
    if isinstance(row, Example):
        for relation, wording in _ASKED.items():
            before, _, after = re.sub(r"\{\w+\}", "\0", wording).partition("\0")
            asked = re.search(f"{re.escape(before)}(.+?){re.escape(after)}", row.instruction)
            if asked:
                return Fact(relation, asked[1], row.labels[row.answer])
    raise ValueError(
        f"row {row.id} asks for no fact that selection=mastery has sentences for; use the tasks {', '.join(_ASKED)} or "
        "city_large, or another selection"
    )


def holds(text: str, object: str) -> bool:
    """Tells if a text holds an object or a synonym of it as whole words.

    Case and accents do not count, except those of a code such as EUR, which would be found in other words.
    """
    for name in (object, *_SYNONYMS.get(object, ())):
        is_code = name.isupper()
        within, wanted = (text, name) if is_code else (unaccented(text), unaccented(name))
        if re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", within):
            return True
    return False


def level_of(mastery: float) -> int:
    """Gives the level of a row: 0 where R is 0, and otherwise 1 to 4 by quarters."""
    return math.ceil(4 * mastery)


def _counted(file: Path | None) -> Iterator[tuple[str, int]]:
    """Reads the rows that an interrupted count is done with; a line that was cut off is left out."""
    if file is None or not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            name, right = json.loads(line)
        except ValueError:
            continue
        yield name, right
