"""The calibration windows that a pruner reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from layerif.checks import Count, check_fields
from layerif.data.batches import ids_of_text
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
    seed: int = 0

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
        ids = ids_of_text(tokenizer, text(self.text, "calibration"))
        what = f"the calibration text {self.text!r}"
        windows = windows_of(
            ids, self.num_windows, self.window, seed=self.seed, what=what, setting="method.calibration."
        )
        return list(torch.tensor(windows).split(self.batch_size))


def windows_of(
    ids: Sequence[int], num_windows: int | None, window: int, *, seed: int, what: str, setting: str = ""
) -> list[Sequence[int]]:
    """Cuts token ids into windows that do not overlap, and chooses some of them.

    Args:
        ids: the token ids of the whole text.
        num_windows: the number of windows; None takes all.
        window: the number of tokens in a window.
        seed: chooses the windows.
        what: a name of the text, for the message.
        setting: stands before the names of the settings in it.

    Raises:
        ValueError: the text holds too few windows.
    """
    available = len(ids) // window
    wanted = available if num_windows is None else num_windows
    if available < max(wanted, 1):
        raise ValueError(
            f"{what} {'have' if what.endswith('s') else 'has'} {len(ids)} tokens, {available} windows of {window}; "
            f"{'one is needed' if num_windows is None else f'{setting}num_windows={num_windows} asks for more'}: use "
            + (f"num_windows<={available}, " if available else "")
            + f"a shorter {setting}window or a longer text"
        )
    chosen = sorted(Random(f"{seed} calibration").sample(range(available), wanted))
    return [ids[index * window : (index + 1) * window] for index in chosen]
