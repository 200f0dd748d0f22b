import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerif.data.task import Task
from tests.tiny import shipped_task

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "prompts.json").read_text(encoding="utf-8"))


def rows_of(*numbers):
    return [{"q": f"What is {n}?", "o": ["one", "two", "three"], "a": "ABC"[n % 3]} for n in numbers]


def write(folder: Path, **splits) -> str:
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def task(path: str, **fields: Any) -> Task:
    settings: dict[str, Any] = {
        "name": "mine",
        "path": path,
        "columns": {"question": "q", "options": "o", "answer": "a"},
        "instruction": "Question: {{ question }}\n",
        "output": "Answer: {{ label }}.",
        "labels": "letters",
        "answer": "answer",
        "pattern": "Answer: (.)",
        "splits": {"train": "train", "validation": "validation", "test": "test"},
    }
    return Task(**{**settings, **fields})


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, train=rows_of(*range(40)), validation=rows_of(*range(40, 50)), test=rows_of(*range(50, 60)))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["task"])
def test_the_papers_prompts_are_reproduced_exactly(tmp_path, golden):
    shipped = shipped_task(golden["task"])
    names = {split for split in shipped.splits.values() if split}
    others = json.loads(json.dumps(golden["row"]))
    text = next(key for key in ("question", "question_stem", "sentence", "sentence1") if key in others)
    column = shipped.columns.get("id") or "id"
    write(tmp_path, **{name: [{**others, text: f"{name} {n}", column: n} for n in range(3)] for name in names})
    write(tmp_path, **{shipped.splits["test"]: [golden["row"]]})
    (example,) = replace(shipped, path=str(tmp_path)).load().test
    assert example.instruction == golden["instruction"]
    assert example.output == golden["output"]
    assert example.labels[example.answer] == golden["label"]
    assert len(example.options) == len(set(example.options)) == len(example.labels)


def test_hidden_test_labels_never_make_validation_the_test_split():
    for name in ("cola", "commonsense_qa"):
        assert shipped_task(name).splits == {"train": "train", "validation": None, "test": "validation"}


def test_a_users_own_columns_are_named_on_the_command_line(folder):
    mine = ["task.columns.question=q", "task.columns.options=o", "task.columns.answer=a"]
    splits = shipped_task("jsonl", f"task.path='{folder}'", *mine).load()
    assert splits.test[0].instruction == "Question: What is 50?\nOptions: (A) one (B) two (C) three\n"
    assert splits.test[0].output == "Answer: The answer is C."
    assert splits.test[0].id == "test-1"


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        (["x", "y"], "B", 1),
        (["x", "y"], 1, 1),
        (["x", "y"], "y", 1),
        (["B", "A"], "A", 0),  # a letter before a text
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
        ([{"text": "x", "label": "1"}, {"text": "y", "label": "2"}], "2", 1),
    ],
)
def test_answers_and_options_in_every_shape(tmp_path, options, answer, expected):
    row = {"q": "?", "o": options, "a": answer}
    path = write(tmp_path, train=[{**row, "q": "1"}], validation=[{**row, "q": "2"}], test=[row])
    assert task(path).load().test[0].answer == expected


NUMERALS = {"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]}


@pytest.mark.parametrize("answer", [1, 3, 4])
def test_a_number_that_is_an_index_and_another_label_is_no_answer_until_said_which(tmp_path, answer):
    row = {"q": "?", "o": NUMERALS, "a": answer}
    path = write(tmp_path, train=[{**row, "q": "1"}], validation=[{**row, "q": "2"}], test=[row])
    with pytest.raises(ValueError, match=r"jsonl:1: the answer . is a whole number .*'\(answer\)\|string', or"):
        task(path).load()
    assert replace(task(path), answer="(answer)|string").load().test[0].answer == answer - 1
    if answer < 4:
        assert replace(task(path), answer="(letters)[answer]").load().test[0].answer == answer


def test_a_number_is_an_index_where_the_options_are_numbers_too(tmp_path):
    """As hub datasets have it (MMLU, ScienceQA): an answer that is an option's text is a text."""
    for answer, expected in ((1, 1), ("1", 3)):
        row = {"q": "?", "o": ["3", "5", "7", "1"], "a": answer}
        path = write(tmp_path, train=[{**row, "q": "1"}], validation=[{**row, "q": "2"}], test=[row])
        assert task(path).load().test[0].answer == expected


@pytest.mark.parametrize("answer", ["D", "", 3, -1, True, None, "twice"])
def test_an_answer_outside_the_options_names_file_and_line(tmp_path, answer):
    bad = {"q": "?", "o": ["one", "twice", "twice"], "a": answer}
    path = write(tmp_path, train=rows_of(1), validation=rows_of(2), test=[*rows_of(3), bad])
    with pytest.raises(ValueError, match=r"test.jsonl:2: the answer .* labels \['A', 'B', 'C'\].*task.splits"):
        task(path).load()


@pytest.mark.parametrize("options", ["one", ["one"], [], ["one", 2], {"text": ["a", "b"], "label": ["A"]}, None])
def test_unusable_options_name_file_and_line(tmp_path, options):
    path = write(tmp_path, train=rows_of(1), validation=rows_of(2), test=[{**rows_of(3)[0], "o": options}])
    with pytest.raises(ValueError, match=r"test.jsonl:1: the options .* list of 2 to 26 texts"):
        task(path).load()


def test_nested_columns_are_reached_by_dots_and_missing_ones_named(tmp_path, folder):
    nested = [{"in": {"q": n}, "o": ["x", "y"], "a": "A"} for n in "123"]
    path = write(tmp_path / "", train=nested[:1], validation=nested[1:2], test=nested[2:])
    columns = {"question": "in.q", "options": "o", "answer": "a"}
    assert task(path, columns=columns).load().test[0].instruction == "Question: 3\n"
    with pytest.raises(
        ValueError, match=r"test.jsonl:1 has no column 'in.none' \(columns: in, o, a\); set task.columns.q"
    ):
        task(path, columns={**columns, "question": "in.none"}).load()


def test_keep_filters_rows_and_must_leave_some(folder):
    kept = task(folder, keep="answer == 'A'").load()
    assert {example.answer for part in (kept.train, kept.validation, kept.test) for example in part} == {0}
    with pytest.raises(ValueError, match=r"nothing is left of the 10 rows of split 'test' after task.keep"):
        task(folder, keep="answer == 'Z'").load()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instruction": "{{ question"}, "task.instruction=.* is not Jinja"),
        ({"labels": "letters +"}, "task.labels=.* is not Jinja"),
        ({"template": "chatml"}, "task.template='chatml' is not allowed; allowed: plain, alpaca, chat"),
        ({"splits": {"train": "train", "test": "test"}}, "exactly train, validation and test"),
        ({"splits": {"train": "train", "validation": None, "test": None}}, "task.splits.test is empty"),
        ({"pattern": "("}, "task.pattern='\\(' is not a regular expression"),
        ({"pattern": "Answer"}, "task.pattern='Answer' has no group"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_row_is_read(fields, message):
    with pytest.raises(ValueError, match=message):
        task("/nowhere", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"instruction": "{{ qestion }}"},
            r"task.instruction cannot be filled in: 'qestion' is undefined. Known names:",
        ),
        ({"answer": "anser"}, "task.answer cannot be filled in: 'anser' uses an unknown name"),
        ({"instruction": "{{ question.__class__.__mro__ }}"}, "task.instruction cannot be filled in"),
        ({"labels": "question"}, "; give a list of texts"),
        ({"labels": "['A', 'A']"}, "repeat"),
    ],
)
def test_a_template_that_cannot_be_filled_names_row_and_field(folder, fields, message):
    with pytest.raises(ValueError, match=rf"test.jsonl:1: .*{message}"):
        task(folder, **fields).load()


def test_a_task_without_rows_asks_for_a_folder():
    with pytest.raises(ValueError, match=r"task jsonl has no rows to read; set task.path=/folder.*train.jsonl"):
        shipped_task("jsonl").load()


@pytest.mark.parametrize(("first", "second"), [("train", "test"), ("validation", "test"), ("train", "validation")])
def test_one_split_in_two_parts_is_refused(first, second):
    splits = {"train": "a", "validation": "b", "test": "c"}
    with pytest.raises(ValueError, match=f"task.splits.{first} and task.splits.{second} are both 'x'"):
        task("/nowhere", splits={**splits, first: "x", second: "x"})


def test_evaluated_rows_among_the_influence_rows_are_refused_or_dropped(tmp_path):
    path = write(tmp_path, train=rows_of(1, 2, 3, 4), validation=rows_of(5, 6), test=rows_of(3, 4, 5, 7))
    with pytest.raises(
        ValueError,
        match=r"2 of 4 rows of train \(split 'train'\) ask what rows of test .*drop_overlap=true",
    ):
        task(path).load()
    splits = task(path, drop_overlap=True).load()
    assert splits.num_dropped == 3
    assert not {e.instruction for e in (*splits.train, *splits.validation)} & {e.instruction for e in splits.test}
    assert len(splits.test) == 4
    write(tmp_path, validation=rows_of(3, 4))
    with pytest.raises(ValueError, match="every row of validation is also in test"):
        task(path, drop_overlap=True).load()


@pytest.mark.parametrize(
    "copy",
    [
        {"a": "B"},  # relabelled
        {"o": ["three", "one", "two"]},  # reshuffled
        {"o": {"label": ["C", "B", "A"], "text": ["three", "two", "one"]}},
        {"q": " what  IS 7? "},
    ],
)
@pytest.mark.parametrize("shows_options", [True, False])
@pytest.mark.parametrize(("part", "other"), [("train", "test"), ("validation", "test"), ("train", "validation")])
def test_a_question_in_two_parts_is_found_whatever_its_label_and_order(tmp_path, copy, shows_options, part, other):
    rows = {"train": rows_of(1, 2), "validation": rows_of(3, 4), "test": rows_of(5, 6)}
    rows[other] += rows_of(7)
    rows[part].append({**rows_of(7)[0], **copy})
    instruction = "{{ question }}{% for option in options %} ({{ letters[loop.index0] }}) {{ option }}{% endfor %}"
    mine = {"instruction": instruction if shows_options else "{{ question }}"}
    path = write(tmp_path, **rows)
    with pytest.raises(ValueError, match=rf"1 of 3 rows of {part} \(split .* ask what rows of {other} .*drop_overlap"):
        task(path, **mine).load()
    splits = task(path, **mine, drop_overlap=True).load()
    assert splits.num_dropped == 1
    assert (len(getattr(splits, part)), len(getattr(splits, other))) == (2, 3)


def test_the_same_words_over_other_options_are_another_question(tmp_path):
    """As in openbookqa: "A desert environment is" is in train and in test, over different options."""
    same = {"q": "A desert is", "a": "A"}
    path = write(
        tmp_path,
        train=[{**same, "o": ["frigid", "parched"]}],
        validation=rows_of(1),
        test=[{**same, "o": ["lush", "arid"]}],
    )
    shown = "{{ question }} {{ options | join(' ') }}"
    assert len(task(path, instruction=shown).load().train) == 1
    with pytest.raises(ValueError, match="1 of 1 rows of train"):  # the prompts are the same
        task(path, instruction="{{ question }}").load()


def test_statements_without_options_are_compared_whatever_their_label(tmp_path):
    cola = [{"sentence": f"Sentence {n}.", "label": n % 2, "idx": n} for n in range(30)]
    path = write(tmp_path, train=cola, validation=[{**cola[3], "label": 0}])
    with pytest.raises(ValueError, match=r"1 of 30 rows of train \(split 'train'\) ask what rows of test"):
        replace(shipped_task("cola"), path=path).load()


def test_an_id_twice_in_a_part_names_both_rows(tmp_path):
    columns = {"id": "id", "question": "q", "options": "o", "answer": "a"}
    test = [{**row, "id": id} for row, id in zip(rows_of(1, 2, 3), ("x", "y", "x"), strict=True)]
    others = [{**row, "id": "x"} for row in rows_of(4, 5)]  # each part counts for itself
    path = write(tmp_path, train=others[:1], validation=others[1:], test=test)
    with pytest.raises(ValueError, match=r"test.jsonl:1 and .*test.jsonl:3 have the same id 'x'; .*task.columns.id"):
        task(path, columns=columns).load()
    assert len(task(path, columns={**columns, "id": None}).load().test) == 3


def test_a_limit_on_the_test_rows_does_not_weaken_the_guard(tmp_path):
    path = write(tmp_path, train=rows_of(1, 2, 3), validation=rows_of(5), test=rows_of(3, *range(10, 30)))
    for seed in range(3):
        with pytest.raises(ValueError, match="1 of 3 rows of train"):
            task(path, num_test=1, seed=seed).load()


def test_held_out_validation_and_train_are_a_partition(folder):
    splits = {"train": "train", "validation": None, "test": "test"}
    whole = task(folder).load().train
    for num, expected in ((None, 4), (7, 7)):
        held = task(folder, splits=splits, num_validation=num, seed=1).load()
        assert len(held.validation) == expected
        assert sorted((*held.train, *held.validation), key=whole.index) == list(whole)
    again, other = (task(folder, splits=splits, seed=seed).load().validation for seed in (1, 2))
    assert again == task(folder, splits=splits, seed=1).load().validation != other
    with pytest.raises(ValueError, match="leaves none to train on"):
        task(folder, splits=splits, num_validation=40).load()


def test_copies_of_a_question_are_held_out_together(tmp_path):
    path = write(tmp_path, train=[row for n in range(10) for row in rows_of(n) * (1 + n % 3)], test=rows_of(99))
    splits = {"train": "train", "validation": None, "test": "test"}
    for seed in range(5):
        held = task(path, splits=splits, num_validation=5, seed=seed).load()
        assert len(held.validation) == 5
        assert not {e.instruction for e in held.train} & {e.instruction for e in held.validation}
    write(tmp_path, train=rows_of(1, 2) * 3)
    with pytest.raises(ValueError, match=r"repeat each question at least 3 times.*task.num_validation>=3"):
        task(path, splits=splits, num_validation=2).load()


def test_limits_are_seeded_nested_and_keep_the_order(folder):
    whole = task(folder).load().train
    few, more, other = (task(folder, num_train=n, seed=s).load().train for n, s in ((5, 0), (20, 0), (5, 1)))
    assert len(few) == 5
    assert set(few) < set(more) < set(whole)
    assert few != other
    assert list(more) == sorted(more, key=whole.index)
    assert task(folder, num_train=1000).load().train == whole


def test_rows_are_read_once_until_their_files_change(folder, tmp_path):
    first = task(folder).load()
    assert task(folder).load() is first
    assert task(folder, instruction="{{ question }}\n").load() != first
    write(tmp_path, train=rows_of(*range(39)))
    second = task(folder).load()
    assert len(second.train) == 39
    assert second.fingerprint != first.fingerprint


def test_the_fingerprint_of_rows_follows_every_field_of_an_example(folder):
    splits = task(folder).load()
    example = splits.train[0]
    changes = [{"id": "x"}, {"instruction": "x"}, {"labels": ("x", "y", "z")}, {"answer": 2 - example.answer}]
    changed = [replace(splits, train=(replace(example, **change), *splits.train[1:])) for change in changes]
    assert len({each.fingerprint for each in (splits, *changed)}) == len(changed) + 1
    assert replace(splits).fingerprint == splits.fingerprint


def test_a_null_that_a_template_would_write_is_refused_with_its_line_and_column(tmp_path):
    rows = rows_of(*range(3))
    rows[1]["q"] = None
    path = write(tmp_path, train=rows_of(*range(5, 8)), validation=rows_of(9), test=rows)
    with pytest.raises(ValueError, match=r"test\.jsonl:2: task\.instruction cannot be filled in: q, question is null"):
        task(path).load()
    assert len(task(path, keep="question is not none").load().test) == 2
    shown = "Question: {% if question %}{{ question }}{% else %}nothing{% endif %}"
    assert task(path, instruction=shown).load().test[1].instruction == "Question: nothing"


@pytest.mark.parametrize("options", [None, ["one", None, "three"]])
def test_null_options_are_refused_with_their_line(tmp_path, options):
    path = write(tmp_path, train=rows_of(5), validation=rows_of(9), test=[*rows_of(0), {**rows_of(1)[0], "o": options}])
    with pytest.raises(ValueError, match=r"test\.jsonl:2: the options .*None.* are not usable"):
        task(path).load()
