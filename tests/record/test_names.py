"""The names of choices in records are looked up among ours, and lead to no other file."""

import pytest

from layerif.record.names import arm_name, name_in_conf, origins
from layerif.record.record import Failure


def test_a_choice_is_followed_to_those_that_it_starts_from():
    assert origins("allocator", "experts_gemma") == ("experts_gemma", "experts")
    assert name_in_conf("model", "mistral_7b") == "mistralai/Mistral-7B-v0.1"


@pytest.mark.parametrize("choice", ["mine", "../task/cola", "x" * 5000, "", "\0"])
def test_any_other_choice_is_itself(choice):
    assert origins("model", choice) == (choice,)
    assert name_in_conf("model", choice) is None


@pytest.mark.parametrize(
    ("allocator", "settings", "name"),
    [
        ("position", {"keep": 0.5, "rule": "first", "kind": "layers"}, "first layers trained"),
        ("position", {"keep": 0.5, "rule": "but_spaced", "kind": "blocks"}, "all but spaced blocks kept"),
        ("depth", {"slope": None, "spare": 0}, "depth(slope=by trials, spare=0)"),
        ("depth", {"slope": 0.01, "spare": 1}, "depth(slope=0.01, spare=1)"),
    ],
)
def test_an_arm_without_scores_is_named_by_its_line_or_its_end(allocator, settings, name):
    choices = {"allocator": allocator, "estimator": "datainf", "method": "prune"}
    config = {"allocator": settings}
    job = Failure(name="", seed=0, config=config, overrides=[], error="", traceback="", choices=choices)
    assert arm_name(job) == name
