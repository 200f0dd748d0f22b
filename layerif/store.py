"""Gram matrices on disk, named by a hash of everything that determines them.

One safetensors file a measurement, `<root>/grams/<key>.safetensors`; its header holds the layer map, the description
that was hashed, and a checksum of the tensors. A file is written under a temporary name and then renamed, so that a
reader sees the whole or nothing; a lock lets one of several jobs that want the same key compute it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerif.layers import LayerGrams, LayerMap, MatrixGram

log = logging.getLogger(__name__)

VERSION = 1  # of the file format, part of every key
_FIELDS = ("train_train", "val_train", "val_norms")


def fingerprint(description: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of a description: equal descriptions, equal keys."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """A folder of measurements."""

    root: Path | str

    def grams(self, description: Mapping[str, Any], compute: Callable[[str], LayerGrams]) -> tuple[LayerGrams, bool]:
        """The Grams of `description` and whether they were already here; otherwise `compute(key)` makes them.

        A corrupted or foreign file is recomputed, with a warning. Interrupted or out of disk, no half file remains.
        """
        key = fingerprint({**description, "store": VERSION})
        file = Path(self.root) / "grams" / f"{key}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):  # the operating system frees the lock of a job that died
            if file.exists():
                try:
                    return _read(file, key), True
                except (SafetensorError, KeyError, ValueError, OSError) as error:
                    warnings.warn(f"{file} is corrupted and is computed anew: {error}", stacklevel=2)
            grams = compute(key)
            _write(grams, file, description)
        return grams, False

    def tensors(
        self, kind: str, description: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], str, bool]:
        """Named tensors of another kind (a folder of its own), their key, and whether they were already here."""
        key = fingerprint({**description, "kind": kind, "store": VERSION})
        file = Path(self.root) / kind / f"{key}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if file.exists():
                try:
                    return _read_checked(file)[0], key, True
                except (SafetensorError, KeyError, ValueError, OSError) as error:
                    warnings.warn(f"{file} is corrupted and is computed anew: {error}", stacklevel=2)
            found = {name: tensor.contiguous() for name, tensor in compute().items()}
            _write_checked(found, {"description": json.dumps(dict(description), sort_keys=True)}, file)
        return found, key, False


def _write(grams: LayerGrams, file: Path, description: Mapping[str, Any]) -> None:
    tensors = {
        f"{param}/{field}": getattr(gram, field).contiguous()
        for param, gram in grams.grams.items()
        for field in _FIELDS
    }
    header = {
        "layers": json.dumps(asdict(grams.layers)),
        "numel": json.dumps({param: gram.numel for param, gram in grams.grams.items()}),
        "description": json.dumps(dict(description), sort_keys=True),
    }
    _write_checked(tensors, header, file)


def _write_checked(tensors: dict[str, Tensor], header: dict[str, str], file: Path) -> None:
    header["checksum"] = _checksum(tensors, header)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished, metadata=header)
        os.replace(unfinished, file)
    except SafetensorError as error:  # what a full disk becomes in there
        raise OSError(f"cannot write {file}: {error}; free some space, or set store=/another/folder") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _read(file: Path, key: str) -> LayerGrams:
    tensors, header = _read_checked(file)
    layers = json.loads(header["layers"])
    grams = {
        param: MatrixGram(*(tensors[f"{param}/{field}"] for field in _FIELDS), numel=numel)
        for param, numel in json.loads(header["numel"]).items()
    }
    names, params, numel = tuple(layers["names"]), tuple(map(tuple, layers["params"])), tuple(layers["numel"])
    return LayerGrams(LayerMap(names, params, numel), grams, key)


def _read_checked(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    if header.pop("checksum") != _checksum(tensors, header):
        raise ValueError("its checksum does not match its content")
    return tensors, header


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
