"""The task `mixed` has equally many rows of each source, and no row of a source's other splits."""

from __future__ import annotations

from collections import Counter

import pytest

from layerif.data.cities import Cities
from layerif.data.countries import Countries
from layerif.data.mixed import Mixed
from tests.tiny import shipped_task

SOURCES = {"city": Cities(), "region": Countries(kind="region")}


def test_each_source_gives_as_many_rows_in_turn_and_a_row_names_its_source():
    task = shipped_task("mixed")
    splits = task.load()
    for part, number in (("train", 60), ("validation", 48), ("test", 76)):
        rows = getattr(splits, part)
        names = [task.source.source_of(row.id) for row in rows]
        assert Counter(names) == dict.fromkeys(("city", "region", "currency", "demonym"), number)
        assert len(set(names[:4])) == 4
    of_region = shipped_task("region").load()
    learned = {row.question for row in splits.train if row.id.startswith("region ")}
    assert learned <= {row.question for row in of_region.train}
    assert splits.num_dropped == 0


def test_more_rows_than_a_source_has_and_other_splits_are_refused():
    with pytest.raises(ValueError, match=r"task.source.train=200 asks for more rows than region has, which are 1"):
        list(Mixed(sources=SOURCES, train=200).rows("train"))
    with pytest.raises(ValueError, match=r"has no split 'tran'"):
        list(Mixed(sources=SOURCES).rows("tran"))
    with pytest.raises(ValueError, match=r"sources is empty"):
        Mixed(sources={})
    with pytest.raises(ValueError, match=r"'a b' is not a name"):
        Mixed(sources={"a b": Cities()})
