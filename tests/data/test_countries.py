import importlib.util
from functools import cache

import pytest
import yaml

from layerif.data import countries
from layerif.data.countries import KINDS, SPLIT_BOUNDS, Countries
from layerif.files import conf_folder
from tests.tiny import shipped_task

SPLITS = tuple(SPLIT_BOUNDS)


@cache
def rows(kind, split, seed=0):
    return [row.fields for row in Countries(kind=kind, seed=seed).rows(split)]


def test_a_country_is_in_one_split_and_the_same_for_every_kind():
    split_of = {}
    for kind in KINDS:
        for split in SPLITS:
            for row in rows(kind, split):
                assert split_of.setdefault(row["id"], split) == split
    shares = [sum(split == wanted for split in split_of.values()) / len(split_of) for wanted in SPLITS]
    assert len(split_of) > 240
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_have_four_distinct_options_and_one_right_one(kind):
    for split in SPLITS:
        for row in rows(kind, split):
            assert len(set(row["options"])) == 4
            assert row["options"].count(row["answer"]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_options_are_other_countries_answers_of_the_same_split_and_never_right(kind):
    right = {code: values for code, _, values in countries._facts(KINDS[kind][0])}
    for split in SPLITS:
        questions = rows(kind, split)
        answers = {row["answer"] for row in questions}
        for row in questions:
            wrong = set(row["options"]) - {row["answer"]}
            assert wrong <= answers
            assert not wrong & set(right[row["id"]])


def test_the_seed_moves_options_and_nothing_else():
    first, again, other = rows("capital", "test"), rows.__wrapped__("capital", "test"), rows("capital", "test", seed=1)
    assert first == again
    assert [row["options"] for row in first] != [row["options"] for row in other]
    assert [(row["id"], row["answer"]) for row in first] == [(row["id"], row["answer"]) for row in other]


def test_the_right_option_has_no_favourite_place_or_frequency():
    places = [row["options"].index(row["answer"]) for kind in KINDS for split in SPLITS for row in rows(kind, split)]
    assert all(0.2 < places.count(place) / len(places) < 0.3 for place in range(4))
    euro = [row for row in rows("currency", "train") if "EUR" in row["options"]]
    assert sum(row["answer"] != "EUR" for row in euro) > len(euro) / 2  # common answers are common wrong options


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_tasks_load_and_their_questions_follow_no_other_setting(kind):
    example = shipped_task(kind).load().test[0]
    assert example.output == f"Answer: {example.labels[example.answer]}."
    assert example.instruction.startswith("Question: ")
    source = yaml.safe_load((conf_folder() / "task" / f"{kind}.yaml").read_text())["source"]
    assert source == {"_target_": "layerif.data.countries.Countries", "kind": kind}


def test_the_runs_seed_keeps_the_questions():
    assert shipped_task("capital", "seed=5").load() == shipped_task("capital").load()


def test_france():
    (france,) = [row for split in SPLITS for row in rows("capital", split) if row["id"] == "FRA"]
    assert (france["question"], france["answer"]) == ("What is the capital of France?", "Paris")


def test_wrong_kinds_and_splits_name_the_right_ones():
    with pytest.raises(ValueError, match="allowed: capital, region, currency, demonym"):
        Countries(kind="language")
    with pytest.raises(ValueError, match="allowed: train, validation, test"):
        list(Countries(kind="capital").rows("dev"))


def test_a_missing_package_gives_its_pip_command(monkeypatch):
    monkeypatch.setattr(countries, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install countryinfo==1.0.1"):
        list(Countries(kind="capital").rows("train"))


def test_the_package_is_never_imported():
    import sys

    assert importlib.util.find_spec("countryinfo") is not None
    list(Countries(kind="capital").rows("train"))
    assert "countryinfo" not in sys.modules
