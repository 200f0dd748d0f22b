"""Measurements on disk, named by a hash of everything that determines them.

Each measurement is one safetensors file, `<root>/grams/<key>.safetensors`, and each kind has a folder (`curvature/`,
`spectra/` …). The header holds the version of the format, the description that was hashed, the layer map, entries for
people to read, and a checksum of all that and the tensors. A file is written under a temporary name and then renamed,
so that a reader sees the whole file or nothing, and needs no lock: a store that cannot be written serves what it has. A
lock lets one of several jobs that want the same key compute it. `layerif-store` lists and clears the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerif.files import load_tensors, save_tensors
from layerif.layers import LayerMap
from layerif.versions import VERSIONS

log = logging.getLogger(__name__)

_ADVICE = "free some space and give the command again, or set store=/another/folder"
_MINUTE = 60.0  # seconds; far below what processes wait for one another (30 minutes by default)

Measurement = TypeVar("Measurement")


def _pack_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, {}


def _unpack_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, str], key: str) -> Mapping[str, Tensor]:
    return tensors


@dataclass(frozen=True)
class MeasurementKind(Generic[Measurement]):
    """A kind of measurement, and the form in which its files hold it.

    Attributes:
        folder: the folder below the store.
        called: the plural that a sweep's balance uses: `gradient passes`.
        pack: turns a measurement into named tensors and entries of the header. By default a measurement is a mapping
            of named tensors itself.
        unpack: turns tensors, header and key back into the measurement.
    """

    folder: str
    called: str
    pack: Callable[[Measurement], tuple[dict[str, Tensor], dict[str, str]]] = _pack_tensors  # type: ignore[assignment]
    unpack: Callable[[Mapping[str, Tensor], Mapping[str, str], str], Measurement] = _unpack_tensors  # type: ignore[assignment]


def fingerprint(description: Mapping[str, Any]) -> str:
    """Hashes the canonical JSON of a description (SHA-256): equal descriptions have equal keys."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """A folder of measurements.

    A measurement is found by its description; if it is not here, it is computed and kept. A file that is corrupted,
    foreign or of another version is computed anew, with a warning. An interrupted or failed write leaves no half file.

    Attributes:
        root: the folder.
        taken: everything that was asked of the store so far, in order: the `kind`, what a sweep's balance has it
            `called`, its `key`, whether it was `reused`, and the `seconds` that it took to compute, then or now (None
            where an older version did not note them).
        while_waiting: called every minute as long as another job measures what is asked for here.
    """

    root: Path | str
    taken: list[dict[str, Any]] = field(default_factory=list, compare=False, repr=False)
    while_waiting: Callable[[], object] = lambda: None

    def kept(
        self,
        kind: MeasurementKind[Measurement],
        description: Mapping[str, Any],
        compute: Callable[[str], Measurement],
        *,
        about: Mapping[str, str] | None = None,
    ) -> tuple[Measurement, bool]:
        """Reads the measurement of this description, or makes and keeps it.

        Args:
            kind: the kind of measurement.
            description: everything that determines the measurement.
            compute: makes the measurement, given its key.
            about: entries for `layerif-store` to show. They are no part of the key.

        Returns:
            The measurement, and whether it was here already.
        """
        key = self.key(description)
        file = Path(self.root) / kind.folder / f"{key}.safetensors"
        found = self._found(kind, file)
        if found is not None:
            return found, True
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock"), key, self.while_waiting):
            found = self._found(kind, file)  # another job may have measured it meanwhile
            if found is not None:
                return found, True
            start = time.perf_counter()
            measured = compute(key)
            seconds = time.perf_counter() - start
            tensors, header = kind.pack(measured)
            header["seconds"] = str(seconds)
            header["version"] = str(VERSIONS["store"])
            header["description"] = json.dumps(dict(description), sort_keys=True)
            header["about"] = json.dumps(dict(about or {}))
            save_tensors(tensors, file, header, advice=_ADVICE)
            shutil.rmtree(self.partial(key), ignore_errors=True)
            self._note(kind, key, reused=False, seconds=seconds)
        return measured, False

    def _found(self, kind: MeasurementKind[Measurement], file: Path) -> Measurement | None:
        try:
            measured, seconds = _read(file, kind.unpack)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            if os.path.exists(file):  # false, too, for a path that cannot be
                warnings.warn(f"{file} is corrupted and is computed anew: {error}", stacklevel=4)
            return None
        shutil.rmtree(
            self.partial(file.stem), ignore_errors=True
        )  # there if its job died right after it wrote the file
        self._note(kind, file.stem, reused=True, seconds=seconds)
        return measured

    def _note(self, kind: MeasurementKind[Any], key: str, *, reused: bool, seconds: float | None) -> None:
        self.taken.append(
            {"kind": kind.folder, "called": kind.called, "key": key, "reused": reused, "seconds": seconds}
        )

    def key(self, description: Mapping[str, Any]) -> str:
        """Returns the key of a measurement: a hash of its description and of the store's version."""
        return fingerprint({**description, "store": VERSIONS["store"]})

    def files(self, key: str) -> list[Path]:
        """Lists the files under this key: at most one measurement of each kind."""
        return sorted(Path(self.root).glob(f"*/{key}.safetensors")) if key else []

    def partial(self, key: str) -> Path:
        """Names the folder for the parts of an interrupted measurement; it goes once the measurement is stored."""
        return Path(self.root) / "grams" / f".{key}.partial"


@dataclass(frozen=True)
class Unstored:
    """Stands in place of a store where nothing is to be written.

    Attributes:
        while_waiting: as of a `Store`; nobody waits here.
    """

    while_waiting: Callable[[], object] = lambda: None

    def kept(
        self,
        kind: MeasurementKind[Measurement],
        description: Mapping[str, Any],
        compute: Callable[[str], Measurement],
        *,
        about: Mapping[str, str] | None = None,
    ) -> tuple[Measurement, bool]:
        """Makes the measurement."""
        return compute(self.key(description)), False

    def key(self, description: Mapping[str, Any]) -> str:
        """Returns the key that a store would give."""
        return fingerprint({**description, "store": VERSIONS["store"]})

    def partial(self, key: str) -> None:
        """Names no folder: an interrupted measurement begins anew."""


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


def _read(
    file: Path, unpack: Callable[[Mapping[str, Tensor], Mapping[str, str], str], Measurement]
) -> tuple[Measurement, float | None]:
    """Reads a measurement, and the seconds that it took to compute."""
    stat = file.stat()
    return _read_once(file, unpack, (stat.st_size, stat.st_mtime_ns, stat.st_ino))


@lru_cache(maxsize=4)
def _read_once(
    file: Path, unpack: Callable[..., Measurement], state: tuple[int, int, int]
) -> tuple[Measurement, float | None]:
    """Reads and checks a file once in a process as long as it stays the same, so that derived values are kept, too."""
    with safe_open(file, framework="pt") as opened:
        written_by = (opened.metadata() or {}).get("version", "1")
    if written_by != str(VERSIONS["store"]):
        raise ValueError(f"it was written by version {written_by} of the store, and this is {VERSIONS['store']}")
    tensors, header = load_tensors(file)
    if fingerprint({**json.loads(header["description"]), "store": VERSIONS["store"]}) != file.stem:
        raise ValueError("it holds another measurement than its name says")
    return unpack(tensors, header, file.stem), float(header["seconds"]) if "seconds" in header else None


def layers_in(header: Mapping[str, str]) -> LayerMap:
    """Reads the layer map that a header holds."""
    layers = json.loads(header["layers"])
    sizes, shapes = layers.get("matrix_numel"), layers.get("matrix_shapes")
    return LayerMap(
        tuple(layers["names"]),
        tuple(map(tuple, layers["params"])),
        tuple(layers["numel"]),
        None if sizes is None else tuple(sizes),
        None if shapes is None else tuple(map(tuple, shapes)),
    )
