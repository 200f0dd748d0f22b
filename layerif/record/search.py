"""The state of a search in the run's folder, from which a killed run carries on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerif.files import write_text


def write_state(file: Path, job: str, reached: Mapping[str, Any]) -> None:
    """Writes what a search has reached, with a checksum.

    Args:
        file: the file.
        job: a hash of all that the search depends on.
        reached: plain values.
    """
    content = {"job": job, **reached}
    write_text(file, json.dumps({**content, "checksum": _checksum(content)}) + "\n")


def read_state(file: Path, job: str) -> dict[str, Any] | None:
    """Reads what `write_state` left; None, after a warning where it is damaged, unless it is of this search.

    Args:
        file: the file.
        job: as for `write_state`.
    """
    try:
        content = json.loads(file.read_bytes())
        if content.pop("checksum") != _checksum(content):
            raise ValueError("its checksum does not match its content")
        is_ours = content.pop("job") == job
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{file} is damaged and the search begins anew: {error}", stacklevel=3)
        return None
    return content if is_ours else None


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
