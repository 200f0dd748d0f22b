"""Runs draw no pictures here: the tests of plots and of the trust report do."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _undrawn(undrawn):
    pass
