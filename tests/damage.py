"""Damage to files, as a disk does it."""

from __future__ import annotations

from pathlib import Path


def flip(file: Path, position: int, bit: int = 0) -> None:
    """Flips one bit of a file."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)
