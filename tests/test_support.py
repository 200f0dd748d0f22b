"""The page of families says what happens to a tiny model of each."""

from __future__ import annotations

import pytest

from tests.families import CONFIGS, each_family
from tests.support import HEADER, NAMES, PAGE, row, table_of
from tests.tiny import FAMILIES, FURTHER


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    return table_of(PAGE.read_text())


def test_every_family_of_the_tests_has_its_line(table):
    assert list(table) == ["family", "---", *NAMES.values()]
    assert table["family"] == HEADER
    assert {*NAMES} == {*FAMILIES, *FURTHER, *CONFIGS}


@pytest.mark.parametrize("family", each_family(NAMES))
def test_a_family_is_supported_as_the_page_says(table, family):
    assert row(family) == table[NAMES[family]]
