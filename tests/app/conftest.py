"""Runs draw no pictures here, except where a test asks for `drawn`."""

from __future__ import annotations

import pytest


@pytest.fixture
def drawn():
    """Lets a test look at pictures."""


@pytest.fixture(autouse=True)
def _undrawn(request):
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("undrawn")
