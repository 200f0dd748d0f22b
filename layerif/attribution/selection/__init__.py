"""Selections choose the train rows that fine-tuning learns from. Each has one file, and one YAML in `conf/selection/`.

A selection is a frozen keyword-only dataclass whose fields are its settings. All but `all` derive from
`RankedSelection`: they give each row a value, and take the rows of the highest priority until the budget is spent.
Nothing is registered: the `_target_` of its YAML finds it. A selection is given a `Pool`, which has no test row, so an
evaluated row is never looked at.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from hashlib import sha256
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt

from layerif.checks import Seed, check_fields, how_many
from layerif.data.batches import Encodings
from layerif.data.render import Template
from layerif.data.rows import AnyExample
from layerif.probe.measurements import Load, Measurements

BudgetUnit = Literal["rows", "tokens"]
Budget = Annotated[float, Gt(0), "a whole number is a number of rows or tokens, and a fraction a share of them"]
Values = Sequence[float | None]


@dataclass(frozen=True)
class Pool:
    """The train rows that a selection chooses from, with what it may look at.

    Attributes:
        measurements: the model, the train and validation rows (no test row), and the store.
        encodings: the train rows as fine-tuning reads them, in their order.
        template: the text around a prompt in fine-tuning.
        max_length: the most tokens of a row in fine-tuning.
    """

    measurements: Measurements
    encodings: Encodings
    template: Template
    max_length: int

    @property
    def rows(self) -> Sequence[AnyExample]:
        """The train rows."""
        return self.measurements.splits.train

    @property
    def num_tokens(self) -> list[int]:
        """The number of tokens of each row in fine-tuning."""
        return [len(sample) for sample in self.encodings]


@dataclass(frozen=True, kw_only=True)
class Selected:
    """The rows that a selection took.

    Attributes:
        rows: their positions in the pool, the first taken first.
        values: of every row of the pool; None for a row without one, and None where the selection gives no values.
    """

    rows: tuple[int, ...]
    values: Values | None = None


class Selection(ABC):
    """A choice of train rows.

    Attributes:
        measures: the model is asked about the rows.
    """

    measures: ClassVar[bool] = True

    def check(self, pool: Pool) -> None:  # noqa: B027 - taking all rows has nothing to refuse
        """Refuses what cannot be selected, before any pass over the data.

        Raises:
            ValueError: says which setting does not fit.
        """

    def expected(self, pool: Pool) -> int:
        """Gives the number of rows that will be taken, or the most where only the selection itself tells."""
        return len(pool.rows)

    @abstractmethod
    def __call__(self, pool: Pool, load: Load) -> Selected:
        """Selects rows.

        Args:
            pool: the rows.
            load: gives the model on its device, and is called only if something is measured.

        Raises:
            ValueError: fewer rows can be taken than the budget asks for.
        """


@dataclass(frozen=True, kw_only=True)
class RankedSelection(Selection):
    """Takes the rows of the highest priority.

    Rows of equal priority come in an order that is drawn by the seed and their content. So the order of the rows does
    not matter, and a smaller budget takes a part of the rows of a larger one.

    Attributes:
        budget: a whole number of rows or tokens, or a share of those in the train rows; 1 is one, and 1.0 all. Rows are
            met exactly. Tokens are never exceeded: the first row that does not fit is the end.
        unit: `rows`, or `tokens` as fine-tuning reads them.
        seed: of the draw.
    """

    budget: Budget = 0.5
    unit: BudgetUnit = "rows"
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "selection")

    @abstractmethod
    def values(self, pool: Pool, load: Load) -> Values | None:
        """Gives the value of every row; None for a row that is not looked at, or where rows have none."""

    def priority(self, value: float) -> float | None:
        """Gives the priority of a row with this value; None where it is not to be taken."""
        return value

    def expected(self, pool: Pool) -> int:
        return self.spent(pool) if self.unit == "rows" else len(pool.rows)

    def check(self, pool: Pool) -> None:
        number = self.spent(pool)
        if self.unit == "tokens" and number < min(pool.num_tokens):
            raise ValueError(
                f"selection.budget={self.budget} leaves no row: it is {how_many(number, 'token')}, and the shortest "
                f"train row has {min(pool.num_tokens)}; use selection.budget>={min(pool.num_tokens)}"
            )

    def spent(self, pool: Pool) -> int:
        """Gives the budget as a number of rows or tokens.

        Raises:
            ValueError: it is less than one, or more than there are.
        """
        total = len(pool.rows) if self.unit == "rows" else sum(pool.num_tokens)
        there = f"the {total:,} {'train rows' if self.unit == 'rows' else 'tokens of the train rows'}"
        if isinstance(self.budget, int):
            number = self.budget
        elif self.budget > 1:
            raise ValueError(
                f"selection.budget={self.budget} is neither a whole number nor a share of {there}; use 1 to {total}, "
                "or a fraction up to 1.0"
            )
        else:  # the decimal that was given, exactly; halves up
            number = math.floor(Fraction(str(self.budget)) * total + Fraction(1, 2))
        if number < 1:
            raise ValueError(f"selection.budget={self.budget} of {there} leaves none; use a larger share, or a number")
        if number > total:
            raise ValueError(
                f"selection.budget={self.budget} is more than {there}; use at most {total}, or selection=all"
            )
        return number

    def __call__(self, pool: Pool, load: Load) -> Selected:
        values = self.values(pool, load)
        given: Values = [0.0] * len(pool.rows) if values is None else values
        ranked = by_priority([None if value is None else self.priority(value) for value in given], pool.rows, self.seed)
        costs = [1] * len(pool.rows) if self.unit == "rows" else pool.num_tokens
        number, available = self.spent(pool), sum(costs[row] for row in ranked)
        if number > available:
            fewer = f"use selection.budget<={available}, or another selection" if available else "use another selection"
            raise ValueError(
                f"selection.budget={self.budget} asks for {number:,} {self.unit}, and {self.limit(given)} leaves "
                f"{available:,} of them in {how_many(len(ranked), 'row')}; {fewer}"
            )
        taken = within(number, [costs[row] for row in ranked])
        if not taken:
            raise ValueError(
                f"selection.budget={self.budget} leaves no row: the first one has {costs[ranked[0]]} tokens; use "
                f"selection.budget>={costs[ranked[0]]}"
            )
        return Selected(rows=tuple(ranked[:taken]), values=values)

    def limit(self, values: Values) -> str:
        """Names, for a message, what leaves fewer rows than there are."""
        return "this selection"


def by_priority(priorities: Values, rows: Sequence[AnyExample], seed: int) -> list[int]:
    """Orders rows by their priority, the highest first, and equal ones by a draw that depends on their content.

    Args:
        priorities: one for each row; None leaves a row out.
        rows: the rows.
        seed: of the draw.

    Returns:
        The positions of the rows.
    """
    left = [row for row, priority in enumerate(priorities) if priority is not None]
    return sorted(left, key=lambda row: (-priorities[row], draw(rows[row], seed)))  # type: ignore[operator]


def draw(row: AnyExample, seed: int) -> str:
    """Gives a text as good as random, by the seed and the content of a row without its id."""
    content = {name: value for name, value in asdict(row).items() if name != "id"}
    return sha256(f"{seed} {json.dumps(content, sort_keys=True, default=str)}".encode()).hexdigest()


def within(budget: int, costs: Sequence[int]) -> int:
    """Counts the first costs whose sum is within a budget."""
    total = 0
    for number, cost in enumerate(costs):
        total += cost
        if total > budget:
            return number
    return len(costs)
