"""`layerif-store` lists the entries of a store, and removes nothing that is in use or belongs to others."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from rich.console import Console

from layerif.app.store import entries, main, show_entries
from layerif.probe.grams.request import GRAMS
from layerif.probe.spectra import SPECTRA
from layerif.probe.store import Store
from layerif.versions import VERSIONS
from tests.probe.test_store import rewritten, some_grams

GOLDEN = Path(__file__).parents[1] / "golden" / "v0.1.0" / "store"
DESCRIPTION = {"probe": VERSIONS["probe"], "loss": VERSIONS["loss"], "scope": "attention", "parameters": "weights"}


@pytest.fixture
def store(tmp_path) -> Path:
    """A store with two measurements, a converted model, a half-written one of each, and a file of another program."""
    root = tmp_path / "store"
    for model in ("first", "second"):
        Store(root).kept(GRAMS, {**DESCRIPTION, "model": model}, some_grams, about={"model": f"org/{model}"})
    for name in ("models/tiny-0123456789ab", "models/.tiny-ba9876543210.x1y2"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    (root / "grams" / f".{'0' * 64}.safetensors.12345").write_bytes(b"half")
    (root / "grams" / f"{'0' * 64}.lock").touch()
    (root / "grams" / "notes.txt").write_text("mine")
    return root


def keys(store: Path) -> dict[str, str]:
    """The key of each measurement by its model."""
    return {entry.header["about"]["model"]: entry.name for entry in entries(store)[0] if entry.header}


def listing(store: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    show_entries(*entries(store), store, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def clear(store: Path, *arguments: str) -> None:
    main(["--store", str(store), "clear", *arguments])


def left(store: Path) -> list[str]:
    return sorted(file.name for file in store.rglob("*") if file.is_file() and file.suffix != ".lock")


def test_the_list_tells_what_each_entry_is(store):
    lines = listing(store).splitlines()
    by_model = {model: next(line for line in lines if key[:12] in line) for model, key in keys(store).items()}
    assert len(by_model) == 2
    for model, line in by_model.items():
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        assert cells[1:6] == ["grams", model, "attention", "weights", "4 + 3"]
        assert cells[8:] in ([], [""])
    (model,) = [line for line in lines if "0123456789ab" in line]
    assert "models" in model
    assert "tiny" in model
    assert len([line for line in lines if "unfinished: its job died" in line]) == 2
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert f"{size / 1000:.1f} kB in all" in lines[-1]
    assert "other files 4 B" in lines[-1]


def test_other_versions_are_called_by_name(store, monkeypatch):
    monkeypatch.setitem(VERSIONS, "probe", VERSIONS["probe"] + 1)
    assert listing(store).count(f"written by probe version {VERSIONS['probe'] - 1}, not used any more") == 2
    monkeypatch.undo()
    file = store / "grams" / f"{keys(store)['org/first']}.safetensors"
    rewritten(file, lambda header: {**header, "version": "1"})
    assert listing(store).count("written by store version 1, not used any more") == 1
    clear(store, "--unused")
    assert list(keys(store)) == ["org/second"]


def test_a_file_that_0_1_0_wrote_is_recognised_and_listed(tmp_path, monkeypatch):
    store = tmp_path / "store"
    shutil.copytree(GOLDEN, store)
    (entry,) = entries(store)[0]
    assert (entry.kind, entry.samples, entry.problem) == ("grams", (8, 4), "")
    (line,) = [line for line in listing(store).splitlines() if entry.name[:12] in line]
    assert [cell.strip() for cell in line.split("│")][2:7] == ["grams", "model", "attention", "weights", "8 + 4"]
    monkeypatch.setitem(VERSIONS, "probe", entry.header["description"]["probe"] + 1)
    assert listing(store).count("written by probe version 1, not used any more") == 1


def test_a_measurement_without_samples_is_listed_too_and_its_version_compared(store, monkeypatch):
    description = {"spectra": VERSIONS["spectra"], "model": "third"}
    Store(store).kept(SPECTRA, description, lambda _: {"seconds": torch.ones(3)}, about={"model": "org/third"})
    (line,) = [line for line in listing(store).splitlines() if "org/third" in line]
    assert [cell.strip() for cell in line.split("│")][2:7] == ["spectra", "org/third", "", "", ""]
    assert "unreadable" not in line
    monkeypatch.setitem(VERSIONS, "spectra", VERSIONS["spectra"] + 1)
    clear(store, "--unused")
    assert set(keys(store)) == {"org/first", "org/second"}


def test_an_unreadable_file_is_said_to_be_so(store):
    (store / "grams" / f"{keys(store)['org/first']}.safetensors").write_bytes(b"garbage")
    assert listing(store).count("cannot be read and would be computed anew") == 1
    clear(store, "--unused")
    assert list(keys(store)) == ["org/second"]


def test_clear_by_key_removes_that_entry_alone(store):
    before, key = left(store), keys(store)["org/first"]
    clear(store, key[:10], "--dry-run")
    assert left(store) == before
    clear(store, key[:10])
    assert left(store) == [name for name in before if not name.startswith(key)]
    assert not (store / "grams" / f"{key}.lock").exists()


def test_clear_all_leaves_only_what_is_not_the_stores(store):
    clear(store, "--all")
    assert left(store) == ["notes.txt"]


def test_clear_incomplete_removes_leftovers_and_nothing_whole(store):
    clear(store, "--incomplete")
    assert len(keys(store)) == 2
    assert (store / "models" / "tiny-0123456789ab" / "config.json").exists()
    assert not any(name.startswith(".") for name in left(store))
    assert not (store / "models" / ".tiny-ba9876543210.x1y2").exists()


def test_clear_older_than_goes_by_age(store):
    old = store / "grams" / f"{keys(store)['org/first']}.safetensors"
    os.utime(old, times=(time.time(), time.time() - 3 * 86400))
    clear(store, "--older-than=2d")
    assert list(keys(store)) == ["org/second"]


def test_an_entry_in_use_is_left_alone_and_said_so(store, capsys):
    key = keys(store)["org/first"]
    with FileLock(store / "grams" / f"{key}.lock"):
        assert "in use" in next(line for line in listing(store).splitlines() if key[:12] in line)
        with pytest.raises(SystemExit) as left_with:
            clear(store, "--all")
    assert left_with.value.code == 1
    assert f"1 in use by a running job and left alone: {key}" in capsys.readouterr().err
    assert left(store) == [f"{key}.safetensors", "notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clear"], "say what to clear"),
        (["clear", "--all", "--unused"], "one way"),
        (["clear", "ffff"], "'ffff' is the start of 0 keys"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(store, capsys, arguments, message):
    before = left(store)
    with pytest.raises(SystemExit):
        main(["--store", str(store), *arguments])
    assert message in capsys.readouterr().err
    assert left(store) == before


def test_the_folder_above_or_below_a_store_is_no_store(store, capsys):
    (store.parent / "note.txt").write_text("mine")
    for given in (store.parent, store / "grams"):
        with pytest.raises(SystemExit) as left_with:
            main(["--store", str(given), "clear", "--all", "--dry-run"])
        assert left_with.value.code == 1
        said = capsys.readouterr().err
        assert f"{given} holds no measurements, but " in said
        assert f"it is not a store (did you mean --store={store}?)" in said


def test_the_store_may_be_named_after_the_command_too(store, capsys):
    main(["list", f"--store={store}"])
    assert "org/first" in capsys.readouterr().out
    main(["clear", "--older-than=30d", "--dry-run", "--store", str(store)])
    assert capsys.readouterr().out == "nothing to remove\n"


def test_an_empty_store_is_said_to_be_so(tmp_path, capsys):
    main(["--store", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path} holds nothing\n"


def test_a_missing_folder_is_said_as_such_before_anything_heavy_is_loaded(tmp_path):
    code = "import sys, layerif.app.store as i\ntry: i.main(['--store', 'nowhere'])\n"
    code += "finally: print('torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1
    assert "'nowhere' is not a folder" in done.stderr
    assert done.stdout.split() == ["False", "False"]


def test_the_default_store_that_is_not_there_is_said_with_the_option_that_names_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([])
    assert f"there is no outputs/store below {tmp_path}; name the store with --store FOLDER" in capsys.readouterr().err


def test_the_headers_version_is_the_stores(store):
    headers = [entry.header for entry in entries(store)[0] if entry.header]
    assert {header["version"] for header in headers} == {str(VERSIONS["store"])}
    assert all(json.dumps(header["description"]) for header in headers)


def test_a_store_that_cannot_be_written_is_listed(store, monkeypatch):
    def refuse(path, *rest, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", refuse)
    assert {entry.in_use for entry in entries(store)[0]} == {False}


def test_what_an_interrupted_probe_left_is_listed_and_goes_as_incomplete(store):
    partial = Store(store).partial("f" * 64)
    partial.mkdir()
    (partial / "tile-0.safetensors").write_bytes(b"factors")
    (line,) = [line for line in listing(store).splitlines() if "ffffffffffff" in line]
    assert "its job died; the next one carries on" in line
    clear(store, "--incomplete")
    assert not partial.exists()
    assert len(keys(store)) == 2
