"""Laws of reading records: what is written is read again, and a damaged file is refused with its name."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerif.record.record import (
    FILE,
    AllocationRecord,
    DecisionRecord,
    RunRecord,
    ScoresRecord,
)

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "v0.1.0" / "runs").glob(f"*/{FILE}"))
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
fractions = st.floats(0, 1)
leaves = st.none() | st.booleans() | st.integers(-9, 9) | fractions | words
nested = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2))


@st.composite
def decisions(draw: st.DrawFn) -> DecisionRecord:
    names = draw(st.lists(words, min_size=1, max_size=4, unique=True))
    given = draw(st.sampled_from(["experts", "sparsity"]))
    values = st.integers(1, 9) if given == "experts" else fractions
    numbers = draw(st.lists(values, min_size=len(names), max_size=len(names)))
    scores = draw(st.lists(fractions, min_size=len(names), max_size=len(names)))
    intervals = draw(st.sampled_from([None, [(value - 1, value) for value in scores]]))
    scored = ScoresRecord(layers=names, values=scores, higher_means="important", intervals=intervals)
    return DecisionRecord(
        source=draw(words),
        allocation=AllocationRecord(kind=given, units=names, values=numbers, budget=draw(values)),
        scores=draw(st.sampled_from([None, scored])),
        reliability=draw(st.none() | fractions),
    )


runs = st.builds(
    RunRecord,
    name=words,
    seed=st.integers(0, 9),
    choices=st.dictionaries(words, words, max_size=3),
    config=st.dictionaries(words, nested, max_size=3),
    overrides=st.lists(words, max_size=3),
    decision=st.none() | decisions(),
    metrics=st.dictionaries(words, fractions, max_size=3),
    answers=st.dictionaries(words, st.dictionaries(words, st.booleans(), max_size=2), max_size=2),
    losses=st.dictionaries(words, st.dictionaries(words, st.floats(-9, 9), max_size=2), max_size=2),
    context_free=st.dictionaries(words, fractions, max_size=2),
    sparsity=st.dictionaries(words, fractions, max_size=2),
    notes=st.lists(words, max_size=2),
    git_sha=st.none() | words,
)


@FEW
@given(runs)
def test_what_is_written_is_read_again(tmp_path, record):
    record.write(tmp_path)
    assert asdict(RunRecord.read(tmp_path)) == asdict(record)


@FEW
@given(record=runs, cut=fractions)
def test_a_record_that_ends_early_is_refused_with_its_name(tmp_path, record, cut):
    file = record.write(tmp_path)
    content = file.read_bytes().rstrip()
    file.write_bytes(content[: math.floor(cut * (len(content) - 1))])
    with pytest.raises(ValueError, match=f"{FILE} is not a readable record of layerif"):
        RunRecord.read(tmp_path)


@FEW
@given(file=st.sampled_from(GOLDEN), other=nested, data=st.data())
def test_a_changed_value_is_read_or_refused_and_never_an_error_of_its_own(tmp_path, file, other, data):
    content: dict[str, Any] = json.loads(file.read_text())
    key = data.draw(st.sampled_from(sorted(content)))
    content[key] = other
    (tmp_path / FILE).write_text(json.dumps(content))
    try:
        read = RunRecord.read(tmp_path)
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
        read.write(tmp_path)
        assert asdict(RunRecord.read(tmp_path)) == asdict(read)
    assert not refused or f"{FILE} is not a readable record of layerif: " in refused
