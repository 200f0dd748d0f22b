"""`method=rows` tells which rows help and harm, finds planted wrong answers, and answers a query from an index."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from layerif.app.methods.rows import Rows
from layerif.estimators.tracin import TracIn
from layerif.estimators.uniform import Uniform
from tests.app.methods.runs import pruned as run
from tests.command import layerif_here, run_layerif

SMALL = ["method=rows", "probe.num_train=12", "probe.num_validation=6", "probe.max_length=64"]


def evaluated_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "test.jsonl").read_text().splitlines()[0])


def test_planted_wrong_answers_end_with_an_auc_and_its_interval(tiny_overrides, tmp_path):
    record = run_layerif([*tiny_overrides, *SMALL, "method.flipped=0.25", "logger=none"], tmp_path)
    metrics = record.metrics
    assert 0 <= metrics["mislabel_auc_low"] <= metrics["mislabel_auc"] <= metrics["mislabel_auc_high"] <= 1
    rows, pairs = (pd.read_parquet(tmp_path / "run" / f"{name}.parquet") for name in ("rows", "pairs"))
    assert (len(rows), len(pairs), list(rows["flipped"]).count(True)) == (12, 72, 3)
    page = (tmp_path / "run" / "rows.html").read_text()
    assert f"an AUC of {metrics['mislabel_auc']:.2f} (95 % interval" in page
    assert record.decision is None
    worst = rows.nlargest(3, "influence")
    assert metrics["mislabel_found"] == pytest.approx(worst["flipped"].mean())
    assert metrics["harmful"] == pytest.approx((rows["influence"] > 0).mean())
    evaluated = {json.loads(line)["question"] for line in (Path(record.config["task"]["path"]) / "test.jsonl").open()}
    assert not any(question in text for question in evaluated for text in [*rows["text"], page])


def test_a_pair_is_split_over_tokens_on_the_page(setup_of, tmp_path):
    setup = setup_of(*SMALL)
    splits = setup.decider.splits
    train, validation = (
        tuple(replace(each, id=str(n)) for n, each in enumerate(part)) for part in (splits.train, splits.validation)
    )
    decider = replace(setup.decider, splits=replace(splits, train=train, validation=validation))
    setup.decider, first = decider, [int(decider.chosen(part)[1].id) for part in ("train", "validation")]
    setup.method = Rows(pair=first)  # ids that look like numbers are numbers on the command line
    run(setup, tmp_path / "run")
    assert f"Tokens of {first[0]}, on {first[1]}" in (tmp_path / "run" / "rows.html").read_text()


@pytest.fixture
def query(tmp_path) -> Path:
    file = tmp_path / "query.jsonl"
    file.write_text('{"text": "the cat runs"}\n{"prompt": "Which of", "completion": " these?"}\n')
    return file


def test_a_query_is_answered_from_the_store_with_its_fidelity(setup_of, tmp_path, query):
    asked = [*SMALL, f"method.query={query}", "probe.fidelity_samples=8"]
    coarse = run(setup_of(*asked, "method.index_gb=1e-5"), tmp_path / "coarse")
    assert any("gradients projected to" in note for note in coarse.notes)
    assert coarse.metrics["fidelity"] < 1
    assert "rank the train rows alike by Spearman" in (tmp_path / "coarse" / "rows.html").read_text()
    whole = run(setup_of(*asked), tmp_path / "whole")
    assert "an index of whole gradients" in whole.notes
    assert "fidelity" not in whole.metrics
    pairs = pd.read_parquet(tmp_path / "whole" / "pairs.parquet")
    assert list(pairs["validation"].unique()) == ["query 0", "query 1"]
    again = setup_of(*asked, f"method.index={setup_of(*asked).store.files(whole.fingerprint)[0]}")
    run(again, tmp_path / "again")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "again" / "pairs.parquet"), pairs, rtol=1e-6)


def test_what_cannot_be_done_is_said_before_the_work(setup_of, query, task_folder, tmp_path):
    setup = setup_of(*SMALL)

    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=match):
            Rows(**settings).check(setup)

    refused(r"method\.index serves a query; set method\.query=/file", index="a")
    refused(r"without method\.flipped, which needs validation rows", query=str(query), flipped=0.1)
    refused(r"method\.flipped=0\.99 of 12 train rows leaves no right answer", flipped=0.99)
    refused(r"must name a train row and a validation row: \[ID,ID\]", pair=["a"])
    refused("there is no train row 'a' among the 12 that are measured", pair=["a", "b"])
    refused("cannot be read: No such file or directory", query=str(tmp_path / "x.txt"))
    refused("is not an index", query=str(query), index=str(query))
    query.write_text(json.dumps(evaluated_in(task_folder)))
    refused("query 0 of method.query is the evaluated row test-1; a row that is evaluated", query=str(query))
    setup.decider = replace(setup.decider, estimator=Uniform())
    refused("estimator=uniform gives none; use estimator=datainf, exact, lissa")
    setup.decider = replace(setup.decider, estimator=TracIn(checkpoints=["a"], learning_rates=[1.0]))
    query.write_text('{"text": "the cat runs"}')
    refused("method.query needs an estimator on the Grams of one model, got tracin", query=str(query))


def test_a_dry_run_tells_the_pairs_or_the_query(tiny_overrides, setup_of, tmp_path, query):
    said = layerif_here([*tiny_overrides, *SMALL, "method.flipped=0.25", "dry_run=true"], tmp_path).stdout
    assert "12 × 6 train and validation rows" in said
    assert "3 train rows" in said
    assert not list(tmp_path.rglob("*.safetensors"))
    setup = setup_of(*SMALL, f"method.query={query}")
    assert setup.method.preview(setup) == {"query": f"2 rows of {query}; the index: the store, of at most 1 GB"}


def test_other_content_of_a_query_is_another_job(setup_of, query):
    first = setup_of(*SMALL, f"method.query={query}").inputs()
    query.write_text('{"text": "a dog"}\n')
    assert setup_of(*SMALL, f"method.query={query}").inputs() != first
