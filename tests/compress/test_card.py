"""The model card says what the record says, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from layerif.compress.card import Base, card, intervals
from layerif.compress.outcome import EXPORTS
from layerif.record.record import AllocationRecord, DecisionRecord, RunRecord, ScoresRecord

BASE = Base(name="org/tiny", is_on_hub=True, licence="apache-2.0", revision="0a1b2c")


def record(**fields: Any) -> RunRecord:
    given = AllocationRecord(kind="rank", units=["a", "b"], values=[3, 4], budget=7)
    scores = ScoresRecord(layers=["a", "b"], values=[0.1, 0.2], higher_means="undertrained")
    decision = DecisionRecord(source="datainf(damping=0.1)", allocation=given, scores=scores)
    choices = {"method": "lora", "estimator": "datainf", "allocator": "rank", "pruner": "wanda"}
    metrics = {"accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75, "perplexity": 12345.6, "said": "much"}
    settings: dict[str, Any] = {
        "config": {"task": {"name": "city"}},
        "choices": choices,
        "decision": decision,
        "metrics": metrics,
        "parameters": {"total": 1234567},
    }
    return RunRecord(name="test", seed=3, overrides=[], **(settings | fields))


@pytest.mark.parametrize("form", EXPORTS)
def test_the_card_has_what_was_done_the_result_and_how_to_load(form):
    page = card(record(notes=["cut <b>here</b>"]), BASE, form, name="tiny", remarks=["A remark."])
    _, header, text = page.split("---\n", 2)
    expected = {"base_model": "org/tiny", "license": "apache-2.0"}
    libraries = {"merged": "transformers", "peft": "peft", "gguf": "gguf"}
    assert yaml.safe_load(header) == expected | ({"library_name": libraries[form]} if form in libraries else {})
    facts = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, flags=re.MULTILINE))
    assert facts["base model"] == "org/tiny at 0a1b2c"
    assert facts["licence of the base model"] == "apache-2.0"
    assert (facts["method"], facts["estimator"], facts["allocator"]) == ("lora", "datainf", "rank")
    assert (facts["decided by"], facts["budget of rank"]) == ("datainf(damping=0.1)", "7")
    assert (facts["task"], facts["seed"], facts["parameters, total"]) == ("city", "3", "1,234,567")
    assert "pruner" not in facts
    assert "| accuracy | 0.500 | 0.250 to 0.750 |" in text
    assert "A remark." in text
    assert "- cut &lt;b>here&lt;/b>" in text
    assert ("```python" in text) == (form in libraries)
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        compile(code, "card", "exec")


def test_what_nobody_knows_is_not_said():
    bare = RunRecord(name="test", seed=0, config={}, overrides=[], choices={"method": "full"})
    page = card(bare, Base(name="mine", is_on_hub=False, licence=None), "merged", name="mine")
    assert "base_model:" not in page
    assert "license:" not in page
    assert "| licence of the base model | unknown |" in page
    for word in ("estimator", "allocator", "budget", "recovered", "Notes"):
        assert word not in page


def test_an_estimator_that_was_not_asked_is_not_named():
    of_file = record().decision
    of_file.scores, of_file.source = None, "file(ranks.json)"
    page = card(record(decision=of_file), BASE, "merged", name="tiny")
    assert "estimator" not in page
    assert "| allocator | rank |" in page
    of_file.source = "method.allocation"
    assert "| allocator |" not in card(record(decision=of_file), BASE, "merged", name="tiny")


def test_results_are_numbers_with_their_intervals():
    assert list(intervals(record().metrics)) == [("accuracy", "0.500", "0.250 to 0.750"), ("perplexity", "12,346", "")]
    assert list(intervals({"x_low": 1.5})) == [("x_low", "1.500", "")]
