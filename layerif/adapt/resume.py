"""The checkpoints that a killed run leaves: written at once beside the one before, and checked before they are read."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.fabric.plugins import TorchCheckpointIO

from layerif.files import whole

BEST, LAST, LAST_BUT_ONE = "best.ckpt", "last.ckpt", "before.ckpt"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, and keeps the last but one as `before.ckpt`.

    Lightning writes to TMPDIR and moves the file. On another file system that move is a copy, and a kill in the middle
    leaves a part.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file, content = Path(path), io.BytesIO()
        torch.save(checkpoint, content)  # in memory, because a full disk has no error of its own in torch
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as unfinished:
            unfinished.write_bytes(content.getbuffer())
            if file.name == LAST and file.exists():
                os.replace(file, file.with_name(LAST_BUT_ONE))


def readable_checkpoint(folder: Path) -> Path | None:
    """Finds the newest checkpoint that is as it was written, and puts those that are not aside (`last.ckpt.aside`).

    The best one belongs to a training from its start, so without it none of the others is of use. Every process of a
    run may ask and gets the same answer.

    Args:
        folder: of the checkpoints of a run.

    Returns:
        The file; None where the run starts afresh.
    """
    with FileLock(folder / "job.lock"):
        files = [file for name in (BEST, LAST, LAST_BUT_ONE) if (file := folder / name).exists()]
        damaged = [file for file in files if not _is_whole(file)]
        if folder / BEST in damaged:
            damaged = files
        for file in damaged:
            os.replace(file, _aside(file))
    found = next((file for name in (LAST, LAST_BUT_ONE) if (file := folder / name).exists()), None)
    aside = [file.name for name in (BEST, LAST, LAST_BUT_ONE) if (file := _aside(folder / name)).exists()]
    if aside:
        goes_on = f"carries on from {found.name}" if found else "begins anew"
        warnings.warn(
            f"damaged checkpoints of a run that did not finish were put aside ({', '.join(aside)} in {folder}); "
            f"training {goes_on}",
            stacklevel=2,
        )
    return found


def _aside(file: Path) -> Path:
    return file.with_name(f"{file.name}.aside")


def _is_whole(file: Path) -> bool:
    """Opens the file as a run would, and compares its checksums, which torch writes and does not read."""
    if file.is_dir():  # a strategy that writes one file per process does it its own way
        return True
    try:
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        with zipfile.ZipFile(file) as opened:
            return opened.testzip() is None
    except Exception:  # a byte decides which; each says that the file is of no use
        return False
