"""Windows: pieces of a running text, as token ids, all of one length and without overlap.

Some models are other models without BOS in front of what they read. A window therefore begins with BOS where the
tokenizer adds one to a text, and BOS takes one of the window's places.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Literal

from layerif.data.tokens import bos_of, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["tokenizer", "first", "none"]
"""The windows that begin with BOS: each one where the tokenizer adds BOS to a text, the first one alone, or none."""


def running_ids(tokenizer: PreTrainedTokenizerBase, text: str, bos: Bos) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids of a long text, and the tokens to put in front of each of its windows.

    Args:
        tokenizer: the tokenizer of the model.
        text: the whole text.
        bos: `first` is how pruning papers measure: the text is tokenised once, with BOS at its start.
    """
    return ids_of_text(tokenizer, text, special=bos != "none"), bos_of(tokenizer) if bos == "tokenizer" else ()


@lru_cache(maxsize=2)
def ids_of_text(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> tuple[int, ...]:
    """Returns the ids of one long text, remembered: a run looks at its calibration and test text several times."""
    return token_ids(tokenizer, [text], special=special)[0]


def cut_windows(ids: Sequence[int], window: int, bos: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """Cuts token ids into windows, in their order; the ids after the last full window are left out.

    Args:
        ids: the token ids of the whole text.
        window: the number of tokens in a window, `bos` included.
        bos: the tokens that each window begins with. A window whose ids begin with them by themselves, as those of a
            whole text do, does not get them twice.

    Raises:
        ValueError: a window has no place after `bos`.
    """
    if window <= len(bos):
        raise ValueError(
            f"a window of {window} tokens has no place for text after the {len(bos)} that the tokenizer puts before "
            f"it; use a window of {len(bos) + 1} or more"
        )
    bos, start, found = tuple(bos), 0, []
    while start < len(ids):
        lead = () if tuple(ids[start : start + len(bos)]) == bos else bos
        end = start + window - len(lead)
        if end > len(ids):
            break
        found.append((*lead, *ids[start:end]))
        start = end
    return found


def windows_of(
    ids: Sequence[int],
    num_windows: int | None,
    window: int,
    *,
    seed: int,
    what: str,
    setting: str = "",
    bos: Sequence[int] = (),
) -> list[tuple[int, ...]]:
    """Cuts token ids into windows, and chooses some of them.

    Args:
        ids: the token ids of the whole text.
        num_windows: the number of windows; None takes all.
        window: the number of tokens in a window.
        seed: chooses the windows.
        what: a name of the text, for the message.
        setting: stands before the names of the settings in it.
        bos: the tokens that each window begins with, see `cut_windows`.

    Raises:
        ValueError: the text holds too few windows.
    """
    windows = cut_windows(ids, window, bos)
    wanted = len(windows) if num_windows is None else num_windows
    if len(windows) < max(wanted, 1):
        raise ValueError(
            f"{what} {'have' if what.endswith('s') else 'has'} {len(ids)} tokens, {len(windows)} windows of {window}; "
            f"{'one is needed' if num_windows is None else f'{setting}num_windows={num_windows} asks for more'}: use "
            + (f"num_windows<={len(windows)}, " if windows else "")
            + f"a shorter {setting}window or a longer text"
        )
    chosen = sorted(Random(f"{seed} calibration").sample(range(len(windows)), wanted))
    return [windows[index] for index in chosen]
