"""The store: what was computed once is read back equal, and nothing broken is ever read or left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from filelock import FileLock

from layerif.evidence import DAMPINGS, LayerCurvature, LayerGrams, MatrixCurvature, MatrixGram
from layerif.files import explained, load_tensors, save_tensors
from layerif.layers import LayerMap
from layerif.probe.curvature.request import CURVATURE
from layerif.probe.gates import GATES
from layerif.probe.grams.request import GRAMS
from layerif.probe.spectra import SPECTRA
from layerif.probe.store import Store, fingerprint

LAYERS = LayerMap(("block.0", "block.1"), (("block.0.q.weight", "block.0.k.weight"), ("block.1.q.weight",)), (18, 12))


def some_grams(key: str) -> LayerGrams:
    torch.manual_seed(0)
    gradients = {"block.0.q.weight": 12, "block.0.k.weight": 6, "block.1.q.weight": 12}
    grams = {}
    for param, numel in gradients.items():
        train, validation = torch.randn(4, numel), torch.randn(3, numel)
        grams[param] = MatrixGram(train @ train.T, validation @ train.T, validation.norm(dim=1), numel)
    return LayerGrams(LAYERS, grams, key)


def never(_: str) -> LayerGrams:
    raise AssertionError("must not be computed")


def assert_same(first: LayerGrams, second: LayerGrams) -> None:
    assert first.layers == second.layers
    assert first.fingerprint == second.fingerprint
    for param, gram in first.grams.items():
        other = second.grams[param]
        assert gram.numel == other.numel
        assert torch.equal(gram.train_train, other.train_train)
        assert torch.equal(gram.val_train, other.val_train)
        assert torch.equal(gram.val_norms, other.val_norms)


def test_computed_once_then_read_back_equal(tmp_path):
    store = Store(tmp_path)
    first, reused = store.kept(GRAMS, {"model": "a"}, some_grams)
    assert not reused
    second, reused = store.kept(GRAMS, {"model": "a"}, never)
    assert reused
    assert_same(first, second)
    made, taken = store.taken
    assert (made["kind"], made["reused"], taken["reused"]) == ("grams", False, True)
    assert made["called"] == "gradient passes"
    assert made["key"] == taken["key"] == first.fingerprint
    assert made["seconds"] == taken["seconds"] > 0  # what was saved is what it had cost


def test_any_change_of_the_description_is_another_key(tmp_path):
    Store(tmp_path).kept(GRAMS, {"model": "a", "scope": "attention"}, some_grams)
    for other in ({"model": "b", "scope": "attention"}, {"model": "a", "scope": "mlp"}, {"model": "a"}):
        with pytest.raises(AssertionError, match="must not be computed"):
            Store(tmp_path).kept(GRAMS, other, never)


def test_fingerprint_ignores_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})


def test_curvature_comes_back_equal_and_is_another_kind(tmp_path):
    torch.manual_seed(0)
    matrices = {
        param: MatrixCurvature({"ekfac": torch.randn(len(DAMPINGS), 2, 4, dtype=torch.float64)}, number + 0.1)
        for number, param in enumerate(LAYERS.matrices)
    }
    store = Store(tmp_path)
    store.kept(GRAMS, {"model": "a"}, some_grams)
    first, reused = store.kept(CURVATURE, {"model": "a"}, lambda key: LayerCurvature(LAYERS, matrices, key))
    assert not reused
    second, reused = store.kept(CURVATURE, {"model": "a"}, never)  # type: ignore[arg-type]
    assert reused
    assert (first.layers, first.fingerprint) == (second.layers, second.fingerprint)
    for param, matrix in matrices.items():
        assert second.matrices[param].mean_square == matrix.mean_square
        assert torch.equal(second.matrices[param].influences["ekfac"], matrix.influences["ekfac"])


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(tmp_path):
    store = Store(tmp_path)
    store.kept(GRAMS, {"model": "a"}, some_grams)
    first, _ = store.kept(GRAMS, {"model": "a"}, never)
    assert store.kept(GRAMS, {"model": "a"}, never)[0] is first
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes())
    second, _ = store.kept(GRAMS, {"model": "a"}, never)
    assert second is not first
    assert_same(first, second)


def rewritten(file: Path, change) -> None:
    """The file with another header, its checksum as it should be."""
    tensors, header = load_tensors(file)
    save_tensors(tensors, file, change(header), advice="")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda header: {**header, "version": "99"}, "written by version 99 of the store, and this is"),
        (lambda header: {k: v for k, v in header.items() if k != "version"}, "written by version 1 of the store"),
        (lambda header: {**header, "description": '{"model": "b"}'}, "holds another measurement"),
    ],
)
def test_a_whole_file_of_another_version_or_measurement_is_recomputed_with_a_warning(tmp_path, change, reason):
    store = Store(tmp_path)
    first, _ = store.kept(GRAMS, {"model": "a"}, some_grams)
    (file,) = tmp_path.rglob("*.safetensors")
    rewritten(file, lambda header: header)
    assert store.kept(GRAMS, {"model": "a"}, never)[1]  # it is the change that is found out
    rewritten(file, change)
    with pytest.warns(UserWarning, match=reason):
        second, reused = store.kept(GRAMS, {"model": "a"}, some_grams)
    assert not reused
    assert_same(first, second)


def test_what_is_said_about_a_measurement_is_no_part_of_its_key(tmp_path):
    Store(tmp_path).kept(GRAMS, {"model": "a"}, some_grams, about={"model": "one name"})
    assert Store(tmp_path).kept(GRAMS, {"model": "a"}, never, about={"model": "another"})[1]


def test_nothing_in_the_store_is_pickled(tmp_path):
    """A pickle runs code when it is read: safetensors is a JSON header and plain bytes."""
    Store(tmp_path).kept(GRAMS, {"model": "a"}, some_grams)
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size]
    assert [file.suffix for file in files] == [".safetensors"]
    content = files[0].read_bytes()
    json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "empty", "header"])
def test_a_corrupted_file_is_recomputed_with_a_warning(tmp_path, damage):
    store = Store(tmp_path)
    first, _ = store.kept(GRAMS, {"model": "a"}, some_grams)
    (file,) = tmp_path.rglob("*.safetensors")
    before = file.read_bytes()
    content = bytearray(before)
    if damage == "flipped":
        content[-3] ^= 1
    damaged = {
        "truncated": content[:-40],
        "garbage": b"x" * 99,
        "flipped": content,
        "empty": b"",
        "header": content.replace(b"[18, 12]", b"[98, 12]"),  # the numbers of parameters
    }[damage]
    assert len(damaged) < len(content) or damaged != before
    file.write_bytes(damaged)
    with pytest.warns(UserWarning, match="corrupted and is computed anew"):
        second, reused = store.kept(GRAMS, {"model": "a"}, some_grams)
    assert not reused
    assert_same(first, second)
    assert store.kept(GRAMS, {"model": "a"}, never)[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_or_failed_write_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise error("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(error):
        Store(tmp_path).kept(GRAMS, {"model": "a"}, some_grams)
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


def test_a_full_disk_is_said_as_such_and_leaves_nothing(tmp_path):
    """Through the real writer, while this process may write no more than a kilobyte to a file."""
    store = Store(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=f"cannot write {tmp_path}/grams/{store.key({})}.safetensors: .*; free some"):
            store.kept(GRAMS, {}, some_grams)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


def test_a_store_that_cannot_be_written_serves_what_it_has(tmp_path, monkeypatch):
    store = Store(tmp_path)
    first, _ = store.kept(GRAMS, {"model": "a"}, some_grams)

    def refuse(path, *rest, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for name in ("open", "mkdir", "unlink", "replace"):
        monkeypatch.setattr(os, name, refuse)
    again, reused = store.kept(GRAMS, {"model": "a"}, never)
    assert reused
    assert_same(first, again)
    with pytest.raises(OSError, match="Read-only") as refused:  # before anything is measured
        store.kept(GRAMS, {"model": "b"}, never)
    assert explained(refused.value, {"store": str(tmp_path)}).startswith(f"store={tmp_path} cannot be used")


def test_parts_whose_job_was_killed_as_it_removed_them_go_with_the_next(tmp_path):
    store = Store(tmp_path)
    store.kept(GRAMS, {"model": "a"}, some_grams)
    left = store.partial(store.key({"model": "a"}))
    left.mkdir()
    assert store.kept(GRAMS, {"model": "a"}, never)[1]
    assert not left.exists()


def test_several_jobs_wanting_one_key_compute_it_once(tmp_path):
    """Stores of their own in threads exclude each other by the same lock of the file as in processes."""
    computed, together = [], Barrier(3)

    def job(_: int) -> tuple[bool, float]:
        together.wait()
        grams, reused = Store(tmp_path).kept(GRAMS, {"model": "a"}, compute)
        return reused, float(grams.grams["block.1.q.weight"].train_train.sum())

    def compute(key: str) -> LayerGrams:
        computed.append(key)
        time.sleep(0.2)
        return some_grams(key)

    with ThreadPoolExecutor(3) as jobs:
        found = list(jobs.map(job, range(3)))
    assert sorted(reused for reused, _ in found) == [False, True, True]
    assert len(computed) == len({total for _, total in found}) == 1


def test_the_lock_of_a_killed_job_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr("layerif.probe.store._MINUTE", 0.05)
    lock = tmp_path / "grams" / f"{Store(tmp_path).key({'model': 'a'})}.lock"
    lock.parent.mkdir()
    code = (
        "import sys, time; from filelock import FileLock;"
        "lock = FileLock(sys.argv[1]); lock.acquire(); print(1); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-u", "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "1\n"
    waited = []

    def wait() -> None:
        waited.append(holder.poll())
        holder.kill()  # -9: nothing in it can clean up

    assert not Store(tmp_path, while_waiting=wait).kept(GRAMS, {"model": "a"}, some_grams)[1]
    assert waited[0] is None
    holder.wait(timeout=60)
    assert Store(tmp_path).kept(GRAMS, {"model": "a"}, never)[1]


def test_a_waiting_job_says_so_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr("layerif.probe.store._MINUTE", 0.01)
    key = Store(tmp_path).key({"model": "a"})
    (tmp_path / "grams").mkdir()
    held, said = FileLock(tmp_path / "grams" / f"{key}.lock"), []

    def wait() -> None:
        said.append(held.is_locked)
        if len(said) == 3:
            held.release()

    with held:
        assert not Store(tmp_path, while_waiting=wait).kept(GRAMS, {"model": "a"}, some_grams)[1]
    assert said == [True] * 3


def test_named_tensors_are_kept_by_kind_and_read_back_equal(tmp_path):
    store, made = Store(tmp_path), []

    def compute(_: str) -> dict[str, torch.Tensor]:
        made.append(1)
        return {"scores": torch.tensor([1.5, float("nan")]), "count": torch.tensor(3)}

    first, reused = store.kept(GATES, {"model": "a"}, compute)
    again, reused_again = store.kept(GATES, {"model": "a"}, compute)
    assert (reused, reused_again) == (False, True)
    torch.testing.assert_close(again, first, equal_nan=True)
    assert not store.kept(SPECTRA, {"model": "a"}, compute)[1]  # another kind
    assert len(made) == 2
    (file,) = (tmp_path / "gates").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.warns(UserWarning, match="corrupted and is computed anew"):
        repaired, *_ = store.kept(GATES, {"model": "a"}, compute)
    torch.testing.assert_close(repaired, first, equal_nan=True)
    assert len(made) == 3
