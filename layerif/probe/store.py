"""Measurements on disk, named by a hash of everything that determines them.

One safetensors file a measurement, `<root>/grams/<key>.safetensors` (a folder a kind: `influences/`, `spectra/` …); its
header holds the format's version, the description that was hashed, the layer map, what a person wants to know of it,
and a checksum of all that and the tensors. A file is written under a temporary name and then renamed, so that a reader
sees the whole or nothing; a lock lets one of several jobs that want the same key compute it. `layerif-store`
(`inventory.py`) lists and clears what is here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerif.evidence import LayerGrams, LayerInfluences, MatrixGram
from layerif.files import save_tensors
from layerif.layers import LayerMap
from layerif.versions import VERSIONS

log = logging.getLogger(__name__)

_FIELDS = ("train_train", "val_train", "val_norms")
_MINUTE = 60.0  # seconds; far below what processes wait for one another (30 minutes by default)

Measured = TypeVar("Measured", LayerGrams, LayerInfluences, Mapping[str, Tensor])


def fingerprint(description: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of a description: equal descriptions, equal keys."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """A folder of measurements.

    A measurement is found by its description, and computed if it is not here; then `compute(key)` makes it. A file
    that is corrupted, foreign or of another version is recomputed, with a warning. Interrupted or out of disk, no half
    file remains. about: for the eyes of whoever lists the store; two descriptions that differ in it alone are the same.
    taken: what was asked of it so far, in order: `kind`, `key`, whether it was `reused`, and the `seconds` it took to
    compute, then or now (None where an older version did not note them).

    while_waiting: called every minute as long as another job measures what is asked for here.
    """

    root: Path | str
    taken: list[dict[str, Any]] = field(default_factory=list, compare=False, repr=False)
    while_waiting: Callable[[], object] = lambda: None

    def grams(
        self,
        description: Mapping[str, Any],
        compute: Callable[[str], LayerGrams],
        *,
        about: Mapping[str, str] | None = None,
    ) -> tuple[LayerGrams, bool]:
        """The Grams of `description`, and whether they were already here."""
        return self._kept("grams", _pack_grams, _unpack_grams, description, compute, about)

    def influences(
        self,
        description: Mapping[str, Any],
        compute: Callable[[str], LayerInfluences],
        *,
        about: Mapping[str, str] | None = None,
    ) -> tuple[LayerInfluences, bool]:
        """The influences of `description`, and whether they were already here."""
        return self._kept("influences", _pack_influences, _unpack_influences, description, compute, about)

    def tensors(
        self,
        kind: str,
        description: Mapping[str, Any],
        compute: Callable[[], Mapping[str, Tensor]],
        *,
        about: Mapping[str, str] | None = None,
    ) -> tuple[Mapping[str, Tensor], str, bool]:
        """Named tensors of another kind (a folder of its own), their key, and whether they were already here."""
        tensors, reused = self._kept(kind, _pack_tensors, _unpack_tensors, description, lambda _: compute(), about)
        return tensors, self.key(description), reused

    def _kept(
        self,
        kind: str,
        pack: Callable[[Measured], tuple[dict[str, Tensor], dict[str, str]]],
        unpack: Callable[[Mapping[str, Tensor], Mapping[str, str], str], Measured],
        description: Mapping[str, Any],
        compute: Callable[[str], Measured],
        about: Mapping[str, str] | None,
    ) -> tuple[Measured, bool]:
        key = self.key(description)
        file = Path(self.root) / kind / f"{key}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock"), key, self.while_waiting):
            if file.exists():
                try:
                    measured, seconds = _read(file, unpack)
                    self.taken.append({"kind": kind, "key": key, "reused": True, "seconds": seconds})
                    return measured, True
                except (SafetensorError, KeyError, ValueError, OSError) as error:
                    warnings.warn(f"{file} is corrupted and is computed anew: {error}", stacklevel=3)
            start = time.perf_counter()
            measured = compute(key)
            seconds = time.perf_counter() - start
            tensors, header = pack(measured)
            header["seconds"] = str(seconds)
            header["version"] = str(VERSIONS["store"])
            header["description"] = json.dumps(dict(description), sort_keys=True)
            header["about"] = json.dumps(dict(about or {}))
            _write(tensors, header, file)
            shutil.rmtree(self.partial(key), ignore_errors=True)
            self.taken.append({"kind": kind, "key": key, "reused": False, "seconds": seconds})
        return measured, False

    def key(self, description: Mapping[str, Any]) -> str:
        return fingerprint({**description, "store": VERSIONS["store"]})

    def files(self, key: str) -> list[Path]:
        """What is here under this key: at most one measurement of a kind."""
        return sorted(Path(self.root).glob(f"*/{key}.safetensors")) if key else []

    def partial(self, key: str) -> Path:
        """Where an interrupted measurement leaves what it has; gone once the Grams are stored."""
        return Path(self.root) / "grams" / f".{key}.partial"


@contextmanager
def _locked(file: Path, key: str, while_waiting: Callable[[], object]) -> Iterator[None]:
    lock = FileLock(file)  # the operating system frees the lock of a job that died
    if not _acquired(lock, 0):
        log.info("another job measures %s… already; waiting for it", key[:12])
        while not _acquired(lock, _MINUTE):
            while_waiting()
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def _write(tensors: dict[str, Tensor], header: dict[str, str], file: Path) -> None:
    header["checksum"] = _checksum(tensors, header)
    advice = "free some space and give the command again, or set store=/another/folder"
    save_tensors(tensors, file, header, advice=advice)


def _read(
    file: Path, unpack: Callable[[Mapping[str, Tensor], Mapping[str, str], str], Measured]
) -> tuple[Measured, float | None]:
    """What a file holds, and the seconds it took to compute."""
    stat = file.stat()
    return _read_once(file, unpack, (stat.st_size, stat.st_mtime_ns, stat.st_ino))


@lru_cache(maxsize=4)
def _read_once(
    file: Path, unpack: Callable[..., Measured], state: tuple[int, int, int]
) -> tuple[Measured, float | None]:
    """Read and checked once in a process as long as the file stays the same: what is derived of it is kept, too."""
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    written_by = header.get("version", "1")
    if written_by != str(VERSIONS["store"]):
        raise ValueError(f"it was written by version {written_by} of the store, and this is {VERSIONS['store']}")
    if header.pop("checksum") != _checksum(tensors, header):
        raise ValueError("its checksum does not match its content")
    if fingerprint({**json.loads(header["description"]), "store": VERSIONS["store"]}) != file.stem:
        raise ValueError("it holds another measurement than its name says")
    return unpack(tensors, header, file.stem), float(header["seconds"]) if "seconds" in header else None


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(memoryview(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def _pack_grams(grams: LayerGrams) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {
        f"{param}/{field}": getattr(gram, field).contiguous()
        for param, gram in grams.grams.items()
        for field in _FIELDS
    }
    numel = {param: gram.numel for param, gram in grams.grams.items()}
    return tensors, {"layers": json.dumps(asdict(grams.layers)), "numel": json.dumps(numel)}


def _unpack_grams(tensors: Mapping[str, Tensor], header: Mapping[str, str], key: str) -> LayerGrams:
    grams = {
        param: MatrixGram(*(tensors[f"{param}/{field}"] for field in _FIELDS), numel=numel)
        for param, numel in json.loads(header["numel"]).items()
    }
    return LayerGrams(_layer_map(header), grams, key)


def _pack_influences(measured: LayerInfluences) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {param: influence.contiguous() for param, influence in measured.influences.items()}
    return tensors, {"layers": json.dumps(asdict(measured.layers))}


def _unpack_influences(tensors: Mapping[str, Tensor], header: Mapping[str, str], key: str) -> LayerInfluences:
    layers = _layer_map(header)
    return LayerInfluences(layers, {name: tensors[name] for params in layers.params for name in params}, key)


def _pack_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, {}


def _unpack_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, str], key: str) -> Mapping[str, Tensor]:
    return tensors


def _layer_map(header: Mapping[str, str]) -> LayerMap:
    layers = json.loads(header["layers"])
    return LayerMap(tuple(layers["names"]), tuple(map(tuple, layers["params"])), tuple(layers["numel"]))
