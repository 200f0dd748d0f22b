"""A file is written whole or not at all; a folder carries on with the job it was begun by, and with no other."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from layerif.app.messages import explain
from layerif.files import claim_folder, explained, whole


def test_of_processes_that_ask_at_once_one_empties_the_folder(tmp_path):
    folder = tmp_path / "checkpoints"
    assert not claim_folder(folder, {"job": "old"})
    (folder / "last.ckpt").touch()
    (folder / "deeper").mkdir()
    assert claim_folder(folder, {"job": "old"})
    together = Barrier(4)

    def ask(_: int) -> bool:
        together.wait()
        return claim_folder(folder, {"job": "new"})

    with ThreadPoolExecutor(4) as asking:  # the lock is on a file each of them opens
        assert sorted(asking.map(ask, range(4))) == [False, True, True, True]
    assert {path.name for path in folder.iterdir()} == {"job.json", "job.lock"}


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    with whole(file) as unfinished:
        unfinished.write_text("first")
        assert not file.exists()

    def interrupted():
        with whole(file) as unfinished:
            unfinished.write_text("sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_a_full_disk_names_the_file_and_what_to_do(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(OSError, match="No space left") as full, whole(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it, without a name
    assert (
        explained(full.value, {})
        == f"no space is left on the disk for {file}; free some and give the same command again"
    )


def test_a_file_in_a_folders_place_names_the_setting(tmp_path):
    file = tmp_path / "store"
    file.touch()
    settings = {"outputs": str(tmp_path), "store": str(file)}
    with pytest.raises(OSError, match="Not a directory") as refused:
        (file / "grams").mkdir(parents=True)
    said = "cannot be used: {} is a file; give a folder that can be written"
    assert explained(refused.value, settings) == f"store={file} {said.format(file)}"
    with pytest.raises(OSError, match="File exists") as refused:
        file.mkdir()
    assert explained(refused.value, {"outputs": str(file)}) == f"outputs={file} {said.format(file)}"
    assert explained(refused.value, {}) == str(refused.value)


def test_a_refused_folder_names_the_setting_and_why():
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/outputs/runs/1")
    assert explained(refused, {"outputs": "/data/outputs"}) == (
        "outputs=/data/outputs cannot be used: /data/outputs/runs/1: permission denied; "
        "give a folder that can be written"
    )
    elsewhere = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/models/config.json")
    assert explained(elsewhere, {"outputs": "/data/outputs"}) == str(elsewhere)
    hub = OSError("we could not connect")
    assert explained(hub, {"outputs": "/data/outputs"}) == "we could not connect"


@pytest.mark.parametrize(
    ("overrides", "setting"), [([], "outputs=outputs"), (["store='outputs/s'"], "store=outputs/s")]
)
def test_the_command_line_names_the_folder_it_was_given(overrides, setting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    file = tmp_path / "outputs" / "s"
    file.touch()
    with pytest.raises(OSError, match="Not a directory") as refused:
        (file / "grams").mkdir(parents=True)
    said = f"{setting} cannot be used: {file} is a file; give a folder that can be written"
    assert explain(refused.value, ["seed=1", *overrides]) == said
