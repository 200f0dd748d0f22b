"""Tasks whose rows have no options run whole: scores, fine-tuning, the metric `loss`, pruning."""

from __future__ import annotations

import csv
import json

import pytest

from tests.command import layerif_here, run_layerif

TALK = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rows_of(kind: str, part: str, count: int) -> list[dict]:
    found = []
    for number in range(count):
        prompt, completion = f"what is {part} {number} plus one ?", f" it is {number + 1} ."
        found.append(
            {
                "text": {"text": prompt + completion},
                "prompt_completion": {"prompt": prompt, "completion": completion},
                "chat": {
                    "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                },
                "tokens": {"input_ids": [3 + number, 7, len(part), 9], "labels": [-100, -100, len(part), 9]},
            }[kind]
        )
    return found


def write(folder, kind, counts=(("train", 12), ("validation", 6), ("test", 6))):
    folder.mkdir(exist_ok=True)
    for part, count in counts:
        rows = rows_of(kind, part, count)
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture
def given(tiny_overrides, tmp_path):
    """Gives overrides of a tiny run on rows of a kind, with a chat template in the tokenizer."""
    import shutil

    def of(kind: str, *more: str) -> list[str]:
        source = next(each.partition("=")[2] for each in tiny_overrides if each.startswith("model.path="))
        if not (tmp_path / "model").exists():
            shutil.copytree(source, tmp_path / "model")
            (tmp_path / "model" / "chat_template.jinja").write_text(TALK)
        kept = [each for each in tiny_overrides if not each.startswith(("task", "model.path"))]
        folder = write(tmp_path / kind, kind)
        return [*kept, f"model.path={tmp_path / 'model'}", f"task={kind}", f"task.path={folder}", *more]

    return of


@pytest.mark.parametrize("kind", ["text", "prompt_completion", "chat", "tokens"])
def test_every_kind_of_row_is_scored_trained_on_and_evaluated(given, tmp_path, kind):
    record = run_layerif(given(kind, "evaluation.before=true", "method.r=2"), tmp_path)
    assert record.decision is not None
    assert record.decision.samples == {"train": 12, "validation": 6}
    assert {"loss", "loss_sum", "before/loss"} <= record.metrics.keys()
    assert not {"accuracy", "margin"} & record.metrics.keys()
    assert len(record.losses["loss"]) == 6


def test_prompts_are_answered_and_the_answer_is_found_by_the_pattern(given, tmp_path):
    asked = given("prompt_completion", "method=none", "evaluation.metrics=[loss,generation]", "evaluation.before=true")
    refused = layerif_here(asked, tmp_path)
    assert "task.pattern=null finds no answer" in refused.stderr
    record = run_layerif([*asked, "task.pattern='it is (\\d+)'", "evaluation.max_new_tokens=4"], tmp_path)
    assert {"before/generation_accuracy", "before/loss"} <= record.metrics.keys()
    assert "has no options to choose from" in layerif_here([*asked, "evaluation.metrics=[options]"], tmp_path).stderr


def test_a_chat_template_is_a_setting_that_probe_fit_and_evaluation_follow(given, tmp_path):
    shown = layerif_here(given("prompt_completion", "task.template=chat", "dry_run=true"), tmp_path)
    assert "<user>what is train 0 plus one ?<assistant> it is 1 ." in shown.stdout
    for name in ("plain", "chat"):
        (tmp_path / name).mkdir()
    plain = run_layerif(given("prompt_completion", "method=none"), tmp_path / "plain")
    chat = run_layerif(given("prompt_completion", "method=none", "task.template=chat"), tmp_path / "chat")
    assert plain.decision is not None
    assert chat.decision is not None
    assert chat.decision.scores != plain.decision.scores


def test_diagnose_and_prune_run_on_completions(given, tmp_path):
    record = run_layerif(
        given("prompt_completion", "method=prune", "allocator=sparsity", "allocator.smoothing=false",
              "method.calibration.num_windows=2", "method.calibration.window=32"), tmp_path)  # fmt: skip
    assert record.metrics["loss"] > 0
    small = ["method=diagnose", "method.num_train=12", "method.num_validation=6", "dry_run=true"]
    for kind in ("text", "prompt_completion", "chat", "tokens"):
        done = layerif_here(given(kind, *small), tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["parquet", "csv", "save_to_disk"])
def test_rows_come_from_files_of_other_forms(tmp_path, form):
    import datasets

    from tests.tiny import shipped_task

    for part, count in (("train", 4), ("validation", 2), ("test", 2)):
        rows = rows_of("prompt_completion", part, count)
        table = datasets.Dataset.from_list(rows)
        if form == "parquet":
            table.to_parquet(tmp_path / f"{part}.parquet")
        elif form == "csv":
            with (tmp_path / f"{part}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, ["prompt", "completion"])
                writer.writeheader()
                writer.writerows(rows)
        else:
            table.save_to_disk(tmp_path / part)
    of_form = shipped_task("prompt_completion", f"task.path={tmp_path}").load()
    lines = shipped_task("prompt_completion", f"task.path={write(tmp_path / 'lines', 'prompt_completion')}").load()
    assert of_form.train == lines.train[:4]
    assert [len(part) for part in (of_form.train, of_form.validation, of_form.test)] == [4, 2, 2]


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("text", {"body": "x"}, r"train.jsonl:1 has no column 'text' \(columns: body\)"),
        ("text", {"text": 3}, "train.jsonl:1: text must be a text, got 3"),
        ("tokens", {"input_ids": [5]}, "has no token to predict"),
        ("tokens", {"input_ids": [5, 99999]}, "the token id 99999 is beyond the vocabulary"),
        ("chat", {"messages": [{"content": "x"}]}, "train.jsonl:1: messages must hold messages"),
    ],
)
def test_an_odd_row_is_one_sentence_and_nothing_is_measured(given, tmp_path, kind, row, said):
    import re

    overrides = given(kind)
    file = tmp_path / kind / "train.jsonl"
    file.write_text(json.dumps(row) + "\n" + file.read_text())
    done = layerif_here([*overrides, "task.columns.id=null"], tmp_path)
    assert done.returncode == 1
    assert re.search(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_row_that_is_learned_and_evaluated_is_refused(given, tmp_path):
    overrides = given("text")
    file = tmp_path / "text" / "train.jsonl"
    file.write_text(file.read_text() + (tmp_path / "text" / "test.jsonl").read_text().splitlines()[0] + "\n")
    assert "1 of 13 rows of train" in layerif_here(overrides, tmp_path).stderr


def test_a_chat_template_that_is_not_used_is_a_note_and_the_record_names_the_rows_behind_the_scores(given, tmp_path):
    record = run_layerif(given("prompt_completion", "method=none", "probe.num_train=3"), tmp_path)
    assert sum("the tokenizer has a chat template, and task.template=plain" in note for note in record.notes) == 1
    assert record.decision is not None
    assert len(record.decision.rows["train"]) == 3
    assert record.decision.rows["validation"] == [f"validation-{number}" for number in range(1, 7)]


@pytest.mark.parametrize("kind", ["text", "prompt_completion"])
def test_the_scores_are_those_of_the_python_road_to_the_bit(given, tmp_path, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import layerif

    record = run_layerif(given(kind, "method=none", "estimator=datainf"), tmp_path)
    assert record.decision is not None
    model, tokenizer = (each.from_pretrained(tmp_path / "model") for each in (AutoModelForCausalLM, AutoTokenizer))
    train, validation = (rows_of(kind, part, count) for part, count in (("train", 12), ("validation", 6)))
    found = layerif.score(model, tokenizer, train, validation, progress=False)
    assert list(found.scores.values) == record.decision.scores.values
    assert found.reliability == record.decision.reliability
