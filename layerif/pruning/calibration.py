"""The calibration windows that a pruner reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from layerif.checks import Count, Seed, check_fields
from layerif.data.text import text
from layerif.data.windows import Bos, running_ids, windows_of

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
        bos: the windows that begin with BOS, which counts as one of the `window` tokens: each one where the tokenizer
            adds BOS to a text (tokenizer), the first of the text alone (first), or none.
    """

    text: str = "documentation"
    num_windows: Count = 16
    window: Annotated[int, Ge(2)] = 256
    batch_size: Count = 4
    seed: Seed = 0
    bos: Bos = "tokenizer"

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
                f"method.calibration.window={self.window} is too long: the model reads at most {max_positions} "
                f"tokens; use method.calibration.window<={max_positions}"
            )
        ids, bos = running_ids(tokenizer, text(self.text, "calibration"), self.bos)
        windows = windows_of(
            ids,
            self.num_windows,
            self.window,
            seed=self.seed,
            what=f"the calibration text {self.text!r}",
            setting="method.calibration.",
            bos=bos,
        )
        return list(torch.tensor(windows).split(self.batch_size))
