"""Writes Python's documentation as short rows: train and validation of one half of its topics, test of the other.

python experiments/capacity_smollm2/texts.py outputs/texts/documentation_rows
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from layerif.data.text import documentation_text

LEAST = 300  # characters of a row
ROWS = {"train": 240, "validation": 100, "test": 200}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    known = rows_of(documentation_text("calibration"))
    train, validation = known[: ROWS["train"]], known[ROWS["train"] :][: ROWS["validation"]]
    test = [row for row in rows_of(documentation_text("test")) if row not in set(known)][: ROWS["test"]]
    for part, rows in {"train": train, "validation": validation, "test": test}.items():
        if len(rows) < ROWS[part]:
            raise SystemExit(f"the documentation of this Python has {len(rows)} rows for {part}, not {ROWS[part]}")
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")


def rows_of(text: str) -> list[str]:
    """Joins paragraphs into rows, and shuffles the rows; equal rows count once."""
    rows, row = [], ""
    for paragraph in text.split("\n\n"):
        row = f"{row}\n\n{paragraph}" if row else paragraph
        if len(row) >= LEAST:
            rows.append(row)
            row = ""
    rows = list(dict.fromkeys(rows))
    Random(0).shuffle(rows)
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1]))
