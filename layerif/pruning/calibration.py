"""The calibration windows that a pruner reads."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from layerif.checks import Count, Seed, check_fields
from layerif.data.batches import token_ids
from layerif.data.text import text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The settings of the calibration windows.

    Args:
        text: documentation, wikitext2, c4, or the path of a .txt or .jsonl file.
        num_windows: the number of windows, chosen by `seed` among those of the whole text, which do not overlap.
        window: the number of tokens in a window.
        batch_size: the number of windows that a model reads at once.
        seed: chooses the windows.
    """

    text: str = "documentation"
    num_windows: Count = 16
    window: Annotated[int, Ge(2)] = 256
    batch_size: Count = 4
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "method.calibration")

    def batches(self, tokenizer: PreTrainedTokenizerBase, max_positions: int | None = None) -> list[Tensor]:
        """Returns the chosen windows, in the order of the text, as token ids (batch × window).

        Args:
            tokenizer: the tokenizer of the model.
            max_positions: the most tokens that the model reads; None where it has no limit.

        Raises:
            ValueError: the text holds too few windows, or the model reads fewer tokens than a window.
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
                f"method.calibration.num_windows={self.num_windows} asks for more: use "
                + (f"num_windows<={available}, " if available else "")
                + "a shorter method.calibration.window or a longer text"
            )
        chosen = sorted(Random(f"{self.seed} calibration").sample(range(available), self.num_windows))
        windows = [ids[index * self.window : (index + 1) * self.window] for index in chosen]
        return list(torch.tensor(windows).split(self.batch_size))
