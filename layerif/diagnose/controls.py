"""Controls that use no gradient: a train row that resembles a validation row should help it.

What influence predicts is worth its gradients only as far as it beats these.

Letters in shape suffixes: N train rows, M validation rows, S rows of either, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerif.data.batches import Encodings, batches
from layerif.models.blocks import device_of


def bm25(train: Sequence[str], validation: Sequence[str]) -> Tensor:
    """Gives the BM25 score of every train text for every validation text as the query (M×N).

    The words are those of `bm25s`, lower case, and none is left out; k1 and b are its own.
    """
    import bm25s  # it takes a moment, which start-up should not pay

    def words(texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)  # type: ignore[return-value]

    index = bm25s.BM25()
    index.index(words(train), show_progress=False)
    nothing = torch.zeros(len(train))
    return torch.stack(
        [torch.from_numpy(index.get_scores(query)) if query else nothing for query in words(validation)]
    ).double()


def hidden_cosine(train_NH: Tensor, val_MH: Tensor) -> Tensor:
    """Gives the cosine of every validation row's pooled hidden state with every train row's (M×N)."""
    train_NH, val_MH = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (train_NH, val_MH))
    return val_MH @ train_NH.mT


def pooled(model: nn.Module, encodings: Encodings, batch_size: int, pad_id: int) -> Tensor:
    """Gives the hidden state before the head of every row, averaged over the row's tokens (S×H)."""
    found: dict[int, Tensor] = {}
    device = device_of(model)
    with torch.no_grad():
        for indices, batch in batches(encodings, batch_size, pad_id):
            ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
            weights_BT1 = mask[..., None].double()
            hidden_BTH = states[-1].double().where(weights_BT1 > 0, 0)
            means_BH = hidden_BTH.sum(dim=1) / weights_BT1.sum(dim=1)
            found |= dict(zip(indices, means_BH.cpu(), strict=True))
    return torch.stack([found[index] for index in range(len(encodings))])
