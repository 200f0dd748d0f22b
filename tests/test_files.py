"""A file is written whole or not at all; a folder carries on with the job it was begun by, and with no other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from layerif.files import carried_on, whole


def test_of_processes_that_ask_at_once_one_empties_the_folder(tmp_path):
    folder = tmp_path / "checkpoints"
    assert not carried_on(folder, {"job": "old"})
    (folder / "last.ckpt").touch()
    (folder / "deeper").mkdir()
    assert carried_on(folder, {"job": "old"})
    together = Barrier(4)

    def ask(_: int) -> bool:
        together.wait()
        return carried_on(folder, {"job": "new"})

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
