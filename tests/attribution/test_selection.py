"""Every selection spends its budget exactly, whatever the order of the rows, and sees no test row; values are dense."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from layerif.adapt.data import TaskDataModule
from layerif.app.schema import from_conf
from layerif.attribution.selection import Pool, RankedSelection, within
from layerif.attribution.selection.ifd import Ifd, difficulty
from layerif.attribution.selection.influence import InfluentialRows
from layerif.attribution.selection.loss import HighestLoss
from layerif.attribution.selection.mastery import SENTENCES, Fact, MasteredRows, fact_of, holds, level_of
from layerif.attribution.selection.random import RandomRows
from layerif.data.cities import Cities
from layerif.data.countries import KINDS
from layerif.data.render import Example
from layerif.data.rows import CompletionExample, TextExample
from layerif.data.task import Splits
from layerif.estimators.cosine import Cosine
from layerif.estimators.datainf import DataInf
from layerif.estimators.grad_dot import GradDot
from layerif.estimators.tracin import TracIn
from layerif.files import conf_folder
from layerif.models.pretrained import LocalModel
from layerif.probe.grams.request import Grams
from layerif.probe.settings import Probe
from layerif.probe.store import Store, Unstored
from tests.tiny import shipped_task

CHOICES = sorted(file.stem for file in (conf_folder() / "selection").glob("*.yaml"))
RANKED = [name for name in CHOICES if name != "all"]
QUICK: dict[str, list[str]] = {  # little to generate; the tiny model masters nothing
    "mastery": ["selection.level=0", "selection.num_completions=2", "selection.max_new_tokens=2"]
}
NUM_ROWS = 12


@cache
def selection(choice: str) -> Any:
    return from_conf(f"selection={choice}", "seed=3", *QUICK.get(choice, []))


def splits_of(task: str = "capital") -> Splits:
    splits = shipped_task(task).load()
    return Splits(splits.train[:NUM_ROWS], splits.validation[:4], ())


@pytest.fixture
def pool(decider) -> Callable[..., Pool]:
    """Makes the pool of the train rows of some splits; the tiny model computes in float64."""

    def make(splits: Splits | None = None, *, model: Any = None, **probe: Any) -> Pool:
        splits = splits or splits_of()
        settings = Probe(num_validation=4, **probe)
        model = model or replace(decider.model, dtype="float64")
        data = TaskDataModule(splits, decider.tokenizer, template="plain", max_length=96)
        measured = replace(decider, splits=splits, probe=settings, model=model)
        return Pool(measured, data.train, data.template, data.max_length)

    return make


def taken(choice: Any, pool: Pool) -> Any:
    choice.check(pool)
    return choice(pool, pool.measurements.model.load)


# Laws of every selection, found by its YAML


# The random model finds no help in most questions, so that few rows have an IFD below 1, which has tests of its own.
MOST = [name for name in RANKED if name != "ifd"]


@pytest.mark.parametrize("choice", MOST)
def test_a_budget_of_rows_is_met_exactly_and_a_smaller_one_takes_a_part(choice, pool):
    given, before = pool(), ()
    for budget, number in ((1, 1), (0.25, 3), (5, 5)):
        found = taken(replace(selection(choice), budget=budget), given)
        assert len(found.rows) == len({*found.rows}) == number
        assert replace(selection(choice), budget=budget).expected(given) == number
        assert found.rows[: len(before)] == before
        before = found.rows


@pytest.mark.parametrize("choice", MOST)
def test_a_budget_of_tokens_is_never_exceeded_and_the_next_row_would(choice, pool):
    given = pool()
    costs = given.num_tokens
    everything = taken(replace(selection(choice), budget=1.0), given).rows
    for budget in (min(costs) + 40, 200, sum(costs) - 1, sum(costs)):
        found = taken(replace(selection(choice), budget=budget, unit="tokens"), given).rows
        spent = sum(costs[row] for row in found)
        assert 0 < spent <= budget
        assert found == everything[: len(found)]
        assert spent == sum(costs) or spent + costs[everything[len(found)]] > budget


@pytest.mark.parametrize("choice", CHOICES)
def test_the_order_of_the_rows_does_not_matter(choice, pool):
    splits = splits_of()
    order = [7, 2, 11, 0, 5, 1, 10, 3, 9, 4, 8, 6]
    turned = replace(splits, train=tuple(splits.train[row] for row in order))
    chosen = selection(choice) if choice == "all" else replace(selection(choice), budget=1 if choice == "ifd" else 5)
    found = []
    for each in (splits, turned):
        given = pool(each, model=LocalModel(path=pool().measurements.model.path, dtype="float64"))
        rows = [given.rows[row].id for row in taken(chosen, given).rows]
        found.append({*rows} if choice == "all" else rows)
    assert found[0] == found[1]


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_stored_gives_the_same_rows_and_needs_no_model(choice, pool):
    given = pool()
    chosen = selection(choice) if choice == "all" else replace(selection(choice), budget=1)
    first = chosen(given, given.measurements.model.load)

    def unloaded() -> Any:
        raise AssertionError("the model was loaded again")

    assert chosen(given, unloaded) == first
    assert bool(given.measurements.store.taken) == chosen.measures


@pytest.mark.parametrize("choice", RANKED)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 13}, r"^selection\.budget=13 is more than the 12 train rows; use at most 12, or"),
        ({"budget": 0.01}, r"^selection\.budget=0\.01 of the 12 train rows leaves none; use a larger"),
        ({"budget": 1.5}, r"^selection\.budget=1\.5 is neither a whole number nor a share of the 12 train rows"),
        ({"budget": 9, "unit": "tokens"}, r"^selection\.budget=9 leaves no row: it is 9 tokens, and the shortest"),
        ({"budget": 10**6, "unit": "tokens"}, r"^selection\.budget=1000000 is more than the [\d,]+ tokens of"),
    ],
)
def test_a_budget_that_cannot_be_spent_is_refused_before_any_work(choice, changes, message, pool):
    with pytest.raises(ValueError, match=message):
        replace(selection(choice), **changes).check(pool())


@pytest.mark.parametrize("choice", RANKED)
@pytest.mark.parametrize("wrong", [{"budget": 0}, {"budget": -1}, {"budget": math.nan}, {"unit": "row"}, {"seed": -1}])
def test_settings_outside_their_range_are_refused(choice, wrong):
    with pytest.raises(ValueError, match=rf"^selection\.{next(iter(wrong))}=\S+ is not allowed; allowed: "):
        replace(selection(choice), **wrong)


# Values


@pytest.fixture
def alone(pool):
    """Computes the losses of token ids by a plain forward pass of one row."""
    model = pool().measurements.model.load()

    def losses(ids: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        return -logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    return losses


@pytest.mark.usefixtures("softmax_in_the_models_dtype")
def test_loss_is_that_of_a_loop_over_single_rows(pool, alone):
    given = pool()
    found = HighestLoss(budget=4)(given, given.measurements.model.load)
    expected = [float(alone(sample.input_ids).mean()) for sample in given.encodings]
    assert found.values == pytest.approx(expected, rel=1e-10)
    assert found.rows == tuple(sorted(range(NUM_ROWS), key=lambda row: -expected[row])[:4])


@pytest.mark.usefixtures("softmax_in_the_models_dtype")
@pytest.mark.parametrize("ratio", ["loss", "perplexity"])
def test_ifd_is_that_of_a_loop_over_single_rows(ratio, pool, alone):
    given, tokenizer = pool(), pool().measurements.tokenizer
    values = Ifd(ratio=ratio).values(given, given.measurements.model.load)
    for row, value in zip(given.rows, values, strict=True):
        question = tokenizer(f"{row.instruction}").input_ids
        ids = tuple(tokenizer(f"{row.instruction} {row.output}").input_ids)
        pairs = zip([*question, None], ids, strict=False)
        start = next(place for place, (one, other) in enumerate(pairs) if one != other)
        asked, without = float(alone(ids)[start - 1 :].mean()), float(alone((0, *ids[start:])).mean())
        assert value == pytest.approx(asked / without if ratio == "loss" else math.exp(asked - without), rel=1e-9)


def test_ifd_takes_the_highest_below_one(pool, monkeypatch):
    values = [0.2, 1.0, 0.9, 1.4, 0.99, 0.5, *[2.0] * 6]
    monkeypatch.setattr(Ifd, "values", lambda *_: values)
    assert Ifd(budget=3)(pool(), lambda: None).rows == (4, 2, 5)  # type: ignore[arg-type, return-value]
    with pytest.raises(
        ValueError,
        match=r"an IFD below 1 .* \(it is 1 or above in 8 rows, and 0 are cut\) leaves",
    ):
        Ifd(budget=5)(pool(), lambda: None)  # type: ignore[arg-type, return-value]


def test_rows_that_are_cut_have_no_difficulty(pool):
    given, choice = pool(), Ifd(budget=1)
    longest = max(len(sample) for sample in choice._samples(given)[0])
    values = choice.values(replace(given, max_length=longest - 1), given.measurements.model.load)
    assert 0 < sum(value is None for value in values) < len(values)


def test_an_answer_that_stands_in_the_question_has_a_low_difficulty():
    assert difficulty(0.1, 4.0, "loss") == pytest.approx(0.025)
    assert difficulty(2.0, 2.0, "perplexity") == 1.0
    assert all(math.isfinite(difficulty(1e4, 0.0, ratio)) for ratio in ("loss", "perplexity"))


@pytest.mark.parametrize(
    "row", [TextExample("t1", "the cat runs over the red hill"), CompletionExample("t1", " ", "the cat runs over")]
)
def test_rows_without_an_answer_have_no_difficulty(row, pool):
    splits = splits_of()
    with pytest.raises(ValueError, match=r"^row t1 has no answer apart from a question, .*; use a task of"):
        Ifd(budget=1).check(pool(replace(splits, train=(*splits.train[:3], row))))


@pytest.mark.parametrize("estimator", [DataInf(), GradDot(), Cosine(), DataInf(granularity="block")])
@pytest.mark.parametrize("whole_model", [False, True])
def test_influence_is_the_mean_over_validation_rows_of_what_the_grams_give(estimator, whole_model, pool):
    given = pool(num_train=5, scope="mlp")  # the selection measures every train row
    chosen = InfluentialRows(budget=4, estimator=estimator, whole_model=whole_model)
    found = taken(chosen, given)
    everything = replace(given.measurements, probe=replace(given.measurements.probe, num_train=NUM_ROWS))
    grams = list(Grams().take(everything, lambda: None)[0].in_float64.grams.values())  # type: ignore[arg-type, return-value]
    if whole_model:
        grams = [sum(grams[1:], grams[0])]
    elif estimator.granularity == "block":
        grams = [sum(grams[1 + 3 * block : 3 + 3 * block], grams[3 * block]) for block in range(3)]
    expected: Any = -sum(estimator.influence(gram).mean(0) for gram in grams)
    assert found.values == pytest.approx(expected.tolist(), rel=1e-9)
    assert found.rows == tuple(expected.argsort(descending=True)[:4].tolist())
    upside_down = taken(replace(chosen, reversed=True), given)
    assert upside_down.rows == tuple(expected.argsort()[:4].tolist())
    assert upside_down.values == found.values


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (TracIn(checkpoints=["a"], learning_rates=[0.1]), r"estimator=tracin gives no influence of rows from Gra"),
        (DataInf(aggregation="top25"), r"aggregation=top25 adds rows up to a score of a layer, .*; use all"),
    ],
)
def test_influence_takes_estimators_on_grams_alone(estimator, message):
    with pytest.raises(ValueError, match=message):
        InfluentialRows(estimator=estimator)


def test_random_rows_depend_on_the_seed_and_on_their_content_alone(pool):
    given = pool()
    found = [taken(RandomRows(budget=6, seed=seed), given) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    renamed = replace(splits_of(), train=tuple(replace(row, id=f"r{n}") for n, row in enumerate(splits_of().train)))
    assert taken(RandomRows(budget=6), pool(renamed)).rows == found[0].rows


def test_costs_within_a_budget():
    assert [within(budget, [3, 1, 5]) for budget in (2, 3, 8, 9, 100)] == [0, 1, 2, 3, 3]


# Mastery


@pytest.mark.parametrize(
    ("relation", "of"), [*((kind, kind) for kind in KINDS), pytest.param("city", "city", marks=pytest.mark.slow)]
)
def test_the_fact_of_every_row_is_read_back(relation, of):
    for row in shipped_task(of).load().train[:40]:
        fact = fact_of(row)
        assert (fact.relation, fact.object) == (relation, row.labels[row.answer])
        assert fact.subject in row.instruction
        assert "{" not in fact.subject


def test_every_relation_has_at_least_six_sentences_that_end_where_the_object_begins():
    assert {*SENTENCES} == {*KINDS, "city"}
    for sentences in SENTENCES.values():
        assert len({*sentences}) == len(sentences) >= 6
        assert all("{subject}" in each and each == each.rstrip() and not each.endswith(".") for each in sentences)
    assert Cities().rows("train")


@pytest.mark.parametrize(
    ("text", "object", "is_held"),
    [
        (" Paris, of course", "Paris", True),
        (" comparison", "Paris", False),
        (" sao tome", "São Tomé", True),
        (" all of the money", "ALL", False),
        (" (ALL)", "ALL", True),
        (" the USA.", "United States", True),
        (" in us", "United States", False),
        ("", "Rome", False),
    ],
)
def test_a_completion_holds_an_object_as_a_whole_word(text, object, is_held):
    assert holds(text, object) == is_held


def test_levels_are_quarters_above_nought():
    assert [level_of(right / 12) for right in range(13)] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_rows_of_one_level_are_taken_and_others_are_counted_in_the_message(pool, monkeypatch):
    right = iter([0, 1, 2, 3, 4, 4, 2, 2, 0, 1, 1, 1])
    monkeypatch.setattr(MasteredRows, "complete", lambda self, fact, *_, **__: [fact.object] * next(right) + [""] * 4)
    given, chosen = pool(), MasteredRows(budget=3, level=2, num_completions=4)
    found = taken(chosen, given)
    assert {*found.rows} == {2, 6, 7}
    assert found.values == [0, 0.25, 0.5, 0.75, 1, 1, 0.5, 0.5, 0, 0.25, 0.25, 0.25]
    with pytest.raises(ValueError, match=r"leaves 3 of them in 3 rows; use selection\.budget<=3") as refused:
        taken(replace(chosen, budget=4), given)
    assert "2 of level 0, 4 of level 1, 3 of level 2, 1 of level 3, 2 of level 4" in str(refused.value)


def test_a_cap_bounds_the_rows_that_are_looked_at_and_an_interrupted_count_is_taken_up(pool, monkeypatch):
    asked: list[Fact] = []

    def completing(self, fact, *_, **__):
        asked.append(fact)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [fact.object]

    monkeypatch.setattr(MasteredRows, "complete", completing)
    given, chosen = pool(), MasteredRows(budget=2, level=4, num_completions=1, max_rows=5)
    with pytest.raises(KeyboardInterrupt):
        taken(chosen, given)
    found = taken(chosen, given)
    assert len(asked) == 5 + 1
    assert asked[2] == asked[3]
    assert sum(value is not None for value in found.values) == 5
    assert taken(replace(chosen, seed=9), given).values == found.values  # the mastery is the model's, not the seed's
    with pytest.raises(ValueError, match=r"asks for 6 rows, and selection\.max_rows=5 looks at fewer; raise"):
        replace(chosen, budget=6).check(given)


def test_completions_of_a_row_do_not_depend_on_the_others(pool):
    given = pool()
    chosen = MasteredRows(num_completions=4, max_new_tokens=4)
    model, tokenizer = given.measurements.model.load(), given.measurements.tokenizer
    state = torch.get_rng_state()
    first, again, other = (chosen.complete(fact_of(given.rows[0]), model, tokenizer, seed=seed) for seed in (5, 5, 6))
    assert first == again != other
    assert len(first) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_that_ask_for_another_fact_are_refused(pool):
    splits = splits_of()
    odd = Example("q7", "Question: How many legs has a spider?\n", ("Answer: 8.", "Answer: 6."), ("8", "6"), 0)
    with pytest.raises(ValueError, match=r"^row q7 asks for no fact that selection=mastery .*; use the"):
        MasteredRows(budget=1).check(pool(replace(splits, train=(*splits.train[:3], odd))))


def test_nothing_is_written_where_there_is_no_store(pool):
    given = pool()
    given = replace(given, measurements=replace(given.measurements, store=Unstored()))
    chosen = MasteredRows(budget=1, level=0, num_completions=1, max_new_tokens=1)
    assert len(taken(chosen, given).rows) == 1
    assert issubclass(MasteredRows, RankedSelection)
    assert Store
