"""The store: what was computed once is read back equal, and nothing broken is ever read or left behind."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from layerif import store as store_module
from layerif.layers import LayerGrams, LayerMap, MatrixGram
from layerif.store import Store, fingerprint

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
    first, reused = store.grams({"model": "a"}, some_grams)
    assert not reused
    second, reused = store.grams({"model": "a"}, never)
    assert reused
    assert_same(first, second)


def test_any_change_of_the_description_is_another_key(tmp_path):
    Store(tmp_path).grams({"model": "a", "scope": "attention"}, some_grams)
    for other in ({"model": "b", "scope": "attention"}, {"model": "a", "scope": "mlp"}, {"model": "a"}):
        with pytest.raises(AssertionError, match="must not be computed"):
            Store(tmp_path).grams(other, never)


def test_fingerprint_ignores_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "empty", "header"])
def test_a_corrupted_file_is_recomputed_with_a_warning(tmp_path, damage):
    store = Store(tmp_path)
    first, _ = store.grams({"model": "a"}, some_grams)
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
        second, reused = store.grams({"model": "a"}, some_grams)
    assert not reused
    assert_same(first, second)
    assert store.grams({"model": "a"}, never)[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_or_failed_write_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise error("disk full")

    monkeypatch.setattr(store_module, "save_file", fail)
    with pytest.raises(error):
        Store(tmp_path).grams({"model": "a"}, some_grams)
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


def test_a_full_disk_is_said_as_such_and_leaves_nothing(tmp_path):
    """Through the real writer, in a process that may write no more than a kilobyte to a file."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "from tests.test_store import *\n"
        f"try: Store({str(tmp_path)!r}).grams({{}}, some_grams)\n"
        "except OSError as error: print('refused:', error)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert "refused: cannot write" in done.stdout, done.stderr
    assert "free some space" in done.stdout
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


def _job(root, counter, results):
    def compute(key: str) -> LayerGrams:
        with counter.get_lock():
            counter.value += 1
        time.sleep(0.3)
        return some_grams(key)

    grams, _ = Store(root).grams({"model": "a"}, compute)
    results.put(float(grams.grams["block.1.q.weight"].train_train.sum()))


def test_two_jobs_wanting_one_key_compute_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    counter, results = context.Value("i", 0), context.Queue()
    jobs = [context.Process(target=_job, args=(tmp_path, counter, results)) for _ in range(3)]
    for job in jobs:
        job.start()
    values = {results.get(timeout=30) for _ in jobs}
    for job in jobs:
        job.join()
    assert counter.value == 1
    assert len(values) == 1


def test_named_tensors_are_kept_by_kind_and_read_back_equal(tmp_path):
    store, made = Store(tmp_path), []

    def compute() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"scores": torch.tensor([1.5, float("nan")]), "count": torch.tensor(3)}

    first, key, reused = store.tensors("gates", {"model": "a"}, compute)
    again, same_key, reused_again = store.tensors("gates", {"model": "a"}, compute)
    assert (reused, reused_again, same_key) == (False, True, key)
    torch.testing.assert_close(again, first, equal_nan=True)
    assert store.tensors("spectra", {"model": "a"}, compute)[1:] != (key, True)
    assert len(made) == 2
    (file,) = (tmp_path / "gates").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.warns(UserWarning, match="corrupted and is computed anew"):
        repaired, *_ = store.tensors("gates", {"model": "a"}, compute)
    torch.testing.assert_close(repaired, first, equal_nan=True)
    assert len(made) == 3
