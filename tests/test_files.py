"""A file is written whole or not at all; a folder carries on with the job it was begun by, and with no other."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from layerif.app.messages import explain
from layerif.files import Damaged, InUse, claim_folder, explained, held, load_tensors, save_tensors, whole
from tests.damage import flip


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
    (folder / "job.json").write_bytes(b"\xff")  # a damaged mark is another job's
    assert not claim_folder(folder, {"job": "new"})


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


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with whole(folder) as unfinished:
        (unfinished / "deep").mkdir(parents=True)
        (unfinished / "deep" / "a").write_text("first")
        assert not folder.exists()
    assert (folder / "deep" / "a").read_text() == "first"

    def interrupted():
        with whole(tmp_path / "other") as unfinished:
            unfinished.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("durable", [True, False])
def test_content_is_on_the_disk_before_it_has_its_name_and_then_the_name(tmp_path, monkeypatch, durable):
    seen: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(opened: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{opened}"))
        sync(opened)

    def replaced(source, target) -> None:
        seen.append(f"{source} -> {target}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with whole(tmp_path / "a", durable=durable) as unfinished:
        unfinished.write_text("first")
    renamed = f"{unfinished} -> {tmp_path / 'a'}"
    assert seen == ([str(unfinished), renamed, str(tmp_path)] if durable else [renamed])


def test_a_flipped_bit_of_saved_tensors_is_noticed_or_changes_nothing(tmp_path):
    file = tmp_path / "a.safetensors"
    tensors, texts = {"a": torch.arange(3.0), "b": torch.tensor([[1, 2]])}, {"seconds": "1.5"}
    save_tensors(tensors, file, texts, advice="")
    content, num_noticed = file.read_bytes(), 0
    for position in range(len(content)):
        flip(file, position, position % 8)
        try:
            found, said = load_tensors(file)
        except Damaged:
            num_noticed += 1
        else:  # a space that fills the header
            assert said == texts
            assert all(torch.equal(found[name], value) for name, value in tensors.items())
        file.write_bytes(content)
    assert num_noticed > 0.9 * len(content)
    file.write_bytes(b"")
    with pytest.raises(Damaged):
        load_tensors(file)


def test_a_folder_is_held_by_one_at_a_time_and_the_second_learns_by_whom(tmp_path):
    with held(tmp_path):
        with pytest.raises(InUse) as refused, held(tmp_path):
            pass
        holder = rf"process {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.match(rf"{re.escape(str(tmp_path))} is in use by {holder}; wait until it ends", str(refused.value))
    with held(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert not list(tmp_path.iterdir())


def test_who_was_killed_holds_nothing(tmp_path):
    hold = f"from layerif.files import *\nwith held(Path({str(tmp_path)!r})): print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(InUse, match=f"process {holder.pid} on"), held(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / "run.lock").exists()
    with held(tmp_path):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unknown)
    with pytest.warns(UserWarning, match="lies on a file system without locks"), held(tmp_path):
        pass


def test_a_full_disk_names_the_file_and_what_to_do(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(OSError, match="No space left") as full, whole(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it, without a name
    assert (
        explained(full.value, {})
        == f"no space is left on the disk for {file}; free some and give the same command again"
    )


@pytest.mark.parametrize("name", ["{}", "{}/model.safetensors"])
def test_a_full_disk_never_names_the_temporary_file(tmp_path, name):
    with pytest.raises(OSError, match="No space left") as full, whole(tmp_path / "a") as unfinished:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name.format(unfinished))
    assert full.value.filename == str(tmp_path / "a")


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
