"""Fixtures for the tests of the metrics."""

from __future__ import annotations

import pytest


@pytest.fixture
def lm_eval_without_pip(monkeypatch):
    """Keeps lm-eval from listing the installed packages beside every result, for which it starts pip."""
    import lm_eval.evaluator

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
