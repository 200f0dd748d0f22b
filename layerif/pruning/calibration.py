"""Windows of text that a pruner looks at."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerif.data.batches import token_ids
from layerif.data.text import text


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
