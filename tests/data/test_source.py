from pydoc_data.topics import topics

import datasets
import pytest

from layerif.data.source import Folder, HubDataset
from layerif.data.text import documentation_text


def write(folder, text, name="train.jsonl"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Folder(path=str(folder))


def test_jsonl_gives_every_row_with_its_line(tmp_path):
    source = write(tmp_path, '{"a": 1}\n\n{"a": "\u2028"}')  # a blank line, a Unicode line separator, no last newline
    rows = list(source.rows("train"))
    assert [row.fields for row in rows] == [{"a": 1}, {"a": "\u2028"}]
    assert rows[1].where == f"{tmp_path / 'train.jsonl'}:3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.jsonl is empty"),
        ('{"a": 1}\n{"a": 2, "b', r"train.jsonl:2 is not valid JSON.*truncated"),
        ('{"a": 1}\n[1, 2]\n', r"train.jsonl:2 is not a JSON object"),
        (b'{"a": "\xff"}\n', "train.jsonl is not UTF-8"),
    ],
)
def test_a_broken_file_names_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        list(write(tmp_path, text).rows("train"))


def test_a_missing_split_file_names_the_files_there_are(tmp_path):
    source = write(tmp_path, "{}", name="dev.jsonl")
    with pytest.raises(ValueError, match=r"validation.jsonl does not exist; the folder holds dev.jsonl.*task.splits"):
        list(source.rows("validation"))
    with pytest.raises(ValueError, match="is not a folder"):
        list(Folder(path=str(tmp_path / "none")).rows("train"))
    with pytest.raises(ValueError, match=r"task\.path is empty; give the folder"):
        list(Folder(path="").rows("train"))


def test_hub_rows_are_the_datasets_rows_in_order(monkeypatch):
    def load_dataset(name, config, *, split, streaming):
        assert (name, config, split) == ("org/data", "main", "test")
        return datasets.Dataset.from_dict(
            {"id": list(range(2500)), "choices": [{"text": ["x"], "label": ["A"]}] * 2500}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(HubDataset(name="org/data", config="main").rows("test"))
    assert [row.fields["id"] for row in rows] == list(range(2500))
    assert rows[7].fields["choices"] == {"text": ["x"], "label": ["A"]}
    assert rows[7].where == "org/data/main test row 7"


def test_without_the_hub_the_message_tells_how_to_use_a_folder(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'org/data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"split 'train' of org/data from the hub: Couldn't reach.*task.path=/folder"):
        list(HubDataset(name="org/data").rows("train"))


def test_the_documentation_text_is_split_by_topic():
    parts = {part: documentation_text(part) for part in ("calibration", "test")}
    whole = [sum(text.strip() in part for part in parts.values()) for text in topics.values()]
    assert max(whole) == 1
    assert sum(text.strip() in parts["test"] for text in topics.values()) > 20
    paragraphs = [{" ".join(piece.split()) for piece in part.split("\n\n")} for part in parts.values()]
    assert not paragraphs[0] & paragraphs[1]  # topics quote one another
    assert min(map(len, parts.values())) > sum(map(len, parts.values())) / 4
    with pytest.raises(ValueError, match="use 'calibration' or 'test'"):
        documentation_text("train")  # type: ignore[arg-type]
