"""A checkpoint is written whole and beside the one before, which is taken where it is damaged."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

from layerif.adapt import resume
from layerif.adapt.progress import TrainingCurves
from layerif.adapt.resume import WholeCheckpoints, readable_checkpoint
from layerif.app.messages import explain
from tests.damage import flip

NAMES = ("best", "last", "before")


@pytest.fixture
def save(tmp_path):
    """Saves a checkpoint that holds a step."""
    return lambda name, step: WholeCheckpoints().save_checkpoint(
        {"step": torch.tensor(step)}, tmp_path / f"{name}.ckpt"
    )


def step_in(file: Path | None) -> int | None:
    return None if file is None else int(torch.load(file, weights_only=True)["step"])


def test_the_one_before_is_kept(tmp_path, save):
    save("best", 1)
    for step in (1, 2, 3):
        save("last", step)
    assert [step_in(tmp_path / f"{name}.ckpt") for name in NAMES] == [1, 3, 2]
    assert len(list(tmp_path.iterdir())) == 3


def test_nothing_of_it_passes_by_another_folder(tmp_path, save, monkeypatch):
    """A move from TMPDIR to another file system is a copy, and a kill in its middle leaves a part."""
    moved: list[tuple[Path, Path]] = []
    replace = os.replace
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr(os, "replace", lambda old, new: [moved.append((Path(old), Path(new))), replace(old, new)])
    save("last", 1)
    save("last", 2)
    assert {path.parent for both in moved for path in both} == {tmp_path}


@pytest.mark.parametrize("renamed", [1, 2])
def test_killed_between_two_changes_one_can_be_read(tmp_path, save, monkeypatch, renamed):
    save("last", 1)
    calls, replace = [], os.replace

    def killed(old, new):
        calls.append(new)
        if len(calls) == renamed:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save("last", 2)
    assert step_in(readable_checkpoint(tmp_path)) == 1


def test_a_full_disk_names_the_runs_folder(tmp_path, save):
    (tmp_path / f".last.ckpt.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as full:
        save("last", 1)
    assert explain(full.value, []).startswith(f"no space is left on the disk for {tmp_path / 'last.ckpt'}; free some")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "step", "aside", "goes_on"),
    [
        ({}, 3, [], ""),
        ({"last": b""}, 2, ["last"], "carries on from before.ckpt"),
        ({"last": 200}, 2, ["last"], "carries on from before.ckpt"),
        ({"last": -40}, 2, ["last"], "carries on from before.ckpt"),
        ({"before": 200}, 3, ["before"], "carries on from last.ckpt"),
        ({"last": b"", "before": 200}, None, ["last", "before"], "begins anew"),
        ({"best": b""}, None, ["best", "last", "before"], "begins anew"),
    ],
)
def test_what_is_damaged_is_put_aside_once_for_all_who_ask(tmp_path, save, damage, step, aside, goes_on):
    for name, number in (("best", 1), ("last", 2), ("last", 3)):
        save(name, number)
    for name, how in damage.items():
        file = tmp_path / f"{name}.ckpt"
        file.write_bytes(how) if isinstance(how, bytes) else flip(file, how)
    for _ in range(2):  # another process of the run, or the next run after one more kill
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert step_in(readable_checkpoint(tmp_path)) == step
        assert {file.name for file in tmp_path.glob("*.aside")} == {f"{name}.ckpt.aside" for name in aside}
        assert [goes_on in str(each.message) for each in said] == [True] * bool(aside)


def test_any_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    file, values = tmp_path / "last.ckpt", torch.arange(5.0)
    WholeCheckpoints().save_checkpoint({"values": values}, file)
    content = file.read_bytes()
    for position in range(0, len(content), 17):
        flip(file, position, position % 8)
        if resume._is_whole(file):
            assert torch.equal(torch.load(file, weights_only=True)["values"], values), position
        file.write_bytes(content)


@pytest.mark.parametrize("damage", [lambda file: flip(file, 3), Path.unlink, lambda file: file.write_bytes(b"\xff")])
def test_damaged_curves_are_named_and_left_out(tmp_path, damage):
    first = TrainingCurves(tmp_path / "curves.jsonl")
    for step in range(3):
        first._keep({"step": step, "metrics": {"train/loss": 0.5}})
    state = first.state_dict()
    first._keep({"step": 3, "metrics": {"train/loss": 0.25}})  # after the checkpoint

    def resumed() -> list[int]:
        curves = TrainingCurves(tmp_path / "curves.jsonl")
        curves.load_state_dict(state)
        return [row["step"] for row in curves._kept()]

    assert resumed() == [0, 1, 2]
    damage(tmp_path / "curves.jsonl")
    with pytest.warns(UserWarning, match=r"curves\.jsonl is damaged: the curves before the checkpoint are lost"):
        assert resumed() == []
