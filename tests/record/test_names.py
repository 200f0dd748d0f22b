"""The names of choices in records are looked up among ours, and lead to no other file."""

import pytest

from layerif.record.names import name_in_conf, origins


def test_a_choice_is_followed_to_those_that_it_starts_from():
    assert origins("allocator", "experts_gemma") == ("experts_gemma", "experts")
    assert name_in_conf("model", "mistral_7b") == "mistralai/Mistral-7B-v0.1"


@pytest.mark.parametrize("choice", ["mine", "../task/cola", "x" * 5000, "", "\0"])
def test_any_other_choice_is_itself(choice):
    assert origins("model", choice) == (choice,)
    assert name_in_conf("model", choice) is None
