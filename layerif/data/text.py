"""Running text for calibration and perplexity: embedded, from the hub, or from a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from layerif.checks import did_you_mean
from layerif.data.source import json_object

NAMED = ("documentation", "wikitext2", "c4")

_NUM_C4_DOCUMENTS = 1100  # perplexities on C4 are usually measured on these, from the first validation file


def text(name: str, part: Literal["calibration", "test"]) -> str:
    """Returns the documents of a text, joined by blank lines.

    Args:
        name: `documentation` is the manual that every CPython carries, split by topic. `wikitext2` is WikiText-2-raw:
            its train split for calibration, its test split for the test. `c4` is the first English training file for
            calibration, and the first 1100 documents of the first validation file for the test. Any other name is the
            path of a .txt file, or of a .jsonl file with a column "text".
        part: the part of the text. A file has only one.

    Raises:
        ValueError: the name is unknown, the file is missing or broken, or the hub cannot be reached.
    """
    if name == "documentation":
        return documentation_text(part)
    if name == "wikitext2":
        documents = _hub("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}, _SPLITS[part])
    elif name == "c4":
        file = (
            "en/c4-train.00000-of-01024.json.gz" if part == "calibration" else "en/c4-validation.00000-of-00008.json.gz"
        )
        documents = islice(_hub("allenai/c4", {"data_files": file}, "train"), _NUM_C4_DOCUMENTS * 10)
        documents = documents if part == "calibration" else islice(documents, _NUM_C4_DOCUMENTS)
    else:
        documents = _file(Path(name))
    return "\n\n".join(documents)


def check_disjoint(calibration: str, test: str) -> None:
    """Refuses the same file for calibration and test: the named texts have two parts, a file has one."""
    if calibration not in NAMED and test not in NAMED and Path(calibration).resolve() == Path(test).resolve():
        raise ValueError(
            f"method.calibration.text and evaluation.text are the same file {calibration!r}: a model would be measured "
            "on what it was calibrated on; give two files"
        )


_SPLITS = {"calibration": "train", "test": "test"}


def _hub(name: str, options: dict[str, str], split: str) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, **options)  # type: ignore[arg-type]
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot read the text {name} from the hub: {reason}. Without the hub give the path of a .txt or .jsonl "
            "file instead of the name"
        ) from error
    return (row["text"] for row in rows)  # type: ignore[index,call-overload]


def _file(path: Path) -> Iterable[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        hint = did_you_mean(str(path), NAMED)
        raise ValueError(
            f"the text {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}{hint}; use "
            f"{', '.join(NAMED)}, or the path of a .txt or .jsonl file"
        ) from error
    if path.suffix != ".jsonl":
        return [content]
    rows = [(f"{path}:{number}", line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    return [_text_of(json_object(line, where), where) for where, line in rows]


def _text_of(row: Mapping[str, Any], where: str) -> str:
    if not isinstance(row.get("text"), str):
        raise ValueError(f'{where} has no text; there must be one JSON object with a "text" per line')
    return row["text"]


def documentation_text(part: Literal["calibration", "test"]) -> str:
    """Returns one of two parts of the English prose that every CPython carries (`pydoc_data.topics`).

    A fixed hash of a topic's name puts it into one part; each part is about half of the text. Topics are sorted and
    joined by a blank line. Topics quote one another: paragraphs of the calibration part that the test part holds as
    well, a sixth of them, are left out. The text belongs to the running version of Python, so perplexities can be
    compared within one version only.
    """
    from pydoc_data.topics import topics

    if part not in ("calibration", "test"):
        raise ValueError(f"part={part!r} is not a part of the documentation text; use 'calibration' or 'test'")
    halves = ["\n\n".join(topics[name].strip() for name in sorted(topics) if _half(name) == half) for half in (0, 1)]
    if part == "test":
        return halves[1]
    tested = {_words(paragraph) for paragraph in halves[1].split("\n\n")}
    return "\n\n".join(paragraph for paragraph in halves[0].split("\n\n") if _words(paragraph) not in tested)


def _half(topic: str) -> int:
    return sha256(topic.encode()).digest()[0] % 2


def _words(paragraph: str) -> str:
    """Returns a paragraph without its indentation and line breaks."""
    return " ".join(paragraph.split())
