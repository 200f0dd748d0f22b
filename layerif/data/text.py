"""Running text for calibration and perplexity: embedded, from the hub, or from a file; and windows cut from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerif.checks import did_you_mean
from layerif.data.batches import token_ids
from layerif.data.source import documentation_text

NAMED = ("documentation", "wikitext2", "c4")
_NUM_C4_DOCUMENTS = 1100  # of its validation files: what perplexities on C4 are usually taken on


def text(name: str, part: Literal["calibration", "test"]) -> str:
    """Documents joined by blank lines.

    documentation: what every CPython carries, split by topic. wikitext2: WikiText-2-raw, train for calibration and
    test. c4: the first English training file, or the first 1100 documents of the first validation file; both through
    the hub's cache where it is filled. Anything else is the path of a file: .txt, or .jsonl with a column "text".
    Raises ValueError for an unknown name, a missing or broken file, and where the hub cannot be reached.
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
    """Raises ValueError where both are the same file: the named texts come in two parts, a file does not."""
    if calibration not in NAMED and test not in NAMED and Path(calibration).resolve() == Path(test).resolve():
        raise ValueError(
            f"method.calibration.text and evaluation.text are the same file {calibration!r}: a model would be measured "
            "on what it was calibrated on; give two files"
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Windows of text that pruning looks at.

    text: documentation, wikitext2, c4, or the path of a .txt or .jsonl file. num_windows: of `window` tokens each,
    chosen by `seed` among the non-overlapping windows of the whole text. batch_size: windows at a time.
    """

    text: str = "documentation"
    num_windows: int = 16
    window: int = 256
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_windows", 1), ("window", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"method.calibration.{name}={getattr(self, name)} must be at least {least}")

    def batches(self, tokenizer: PreTrainedTokenizerBase, max_positions: int | None = None) -> list[Tensor]:
        """The chosen windows, in the order of the text, as token ids (batch × window).

        max_positions: the most tokens the model reads. Raises ValueError for a text or a model that is too short.
        """
        if max_positions is not None and self.window > max_positions:
            raise ValueError(
                f"method.calibration.window={self.window} is too long: the model reads at most {max_positions} tokens"
            )
        ids = token_ids(tokenizer, [text(self.text, "calibration")])[0]
        available = len(ids) // self.window
        if available < self.num_windows:
            raise ValueError(
                f"the calibration text {self.text!r} has {len(ids)} tokens, {available} windows of {self.window}; "
                f"method.calibration.num_windows={self.num_windows} are asked for: use "
                + (f"num_windows<={available}, " if available else "")
                + "a shorter method.calibration.window or a longer text"
            )
        chosen = sorted(Random(f"{self.seed} calibration").sample(range(available), self.num_windows))
        windows = [ids[index * self.window : (index + 1) * self.window] for index in chosen]
        return list(torch.tensor(windows).split(self.batch_size))


_SPLITS = {"calibration": "train", "test": "test"}


def _hub(name: str, options: dict[str, str], split: str) -> Iterator[str]:
    import datasets  # heavy, and needed by hub texts only

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
    try:
        return [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} must hold one JSON object with a "text" a line; got {error!r}') from error
