"""A task's rows as batches for fine-tuning, in an order that a resumed run takes up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from layerif.attribution.token_filter import TokenFilter, filtered, num_counted
from layerif.checks import Count, Seed, check_arguments
from layerif.data.batches import Encoded, Encodings, LossOn, collate, encode, padding_id
from layerif.data.render import Template
from layerif.data.rows import AnyExample
from layerif.data.task import Splits

Tau = Annotated[float, Gt(1), "a perplexity is at least 1; the paper uses 2.5"]


class TaskDataModule(L.LightningDataModule):
    """A task's train and validation rows as batches for fine-tuning, shuffled by seed and epoch.

    Samples that are cut at `max_length` tokens are counted in `train.num_truncated` and `validation.num_truncated`.

    Args:
        splits: the task's rows.
        tokenizer: of the model that is trained.
        template: the text around instruction and output.
        batch_size: samples that a device sees at once. Times the devices and `trainer.accumulate_grad_batches` it is
            the batch of an optimiser step.
        max_length: of a sample, in tokens.
        loss_on: `all` tokens, or only those of the `output`; None: what the kind of rows says, all of a question.
        drop_partial: leave out the samples that would make the last batch of an epoch smaller (upstream does).
        seed: decides the order, and the tokens of `token_filter=random`.
        token_filter: the tokens that training learns from, once `filter_tokens` knows their losses.
        tau: the highest perplexity of a token that `token_filter` keeps.
    """

    def __init__(
        self,
        splits: Splits,
        tokenizer: Any,
        *,
        template: Template = "alpaca",
        batch_size: Count = 16,
        max_length: Annotated[int, Ge(2), "one token has none to predict"] = 256,
        loss_on: LossOn | None = None,
        drop_partial: bool = False,
        seed: Seed = 0,
        token_filter: TokenFilter = "none",
        tau: Tau = 2.5,
    ) -> None:
        super().__init__()
        settings = {"template": template, "batch_size": batch_size, "max_length": max_length, "loss_on": loss_on}
        settings |= {"token_filter": token_filter, "tau": tau}
        check_arguments(type(self).__init__, "data", **settings, seed=seed)
        self.splits, self.tokenizer = splits, tokenizer
        self.batch_size, self.drop_partial, self.seed = batch_size, drop_partial, seed
        self.template: Template = template
        self.token_filter: TokenFilter = token_filter
        self.max_length, self.tau = max_length, tau
        self._start = 0
        self._sampler: EpochShuffle | None = None

        def encoded(examples: Sequence[AnyExample]) -> Encodings:
            return encode(examples, tokenizer, template=template, max_length=max_length, loss_on=loss_on, eos=True)

        self.train, self.validation = encoded(splits.train), encoded(splits.validation)

    def filter_tokens(self, losses: Sequence[Tensor]) -> dict[str, int]:
        """Lets training learn from the tokens that the filter keeps, and leaves out rows without one.

        Args:
            losses: of every token of each train sample but the first, under the model before training.

        Returns:
            The numbers of tokens that counted before and count now, and of the rows that are left out.
        """
        before = self.train
        self.train = filtered(before, losses, self.token_filter, tau=self.tau, seed=self.seed)
        return {
            "counted": num_counted(before),
            "kept": num_counted(self.train),
            "rows_left_out": len(before) - len(self.train),
        }

    def train_dataloader(self) -> DataLoader:
        count = len(self.train)
        rank, size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.drop_partial:
            accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
            count -= count % (self.batch_size * accumulated * size)
            if count == 0:
                raise ValueError(
                    f"data.drop_partial=true leaves none of {len(self.train)} samples at data.batch_size="
                    f"{self.batch_size} × {accumulated} accumulated × {size} processes; use a smaller batch, or "
                    "data.drop_partial=false"
                )
        self._sampler = EpochShuffle(
            len(self.train), count, self.seed, self._start, lambda: self._epoch, rank=rank, num_processes=size
        )
        return DataLoader(self.train, self.batch_size, sampler=self._sampler, collate_fn=self.collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=self.batch_size, collate_fn=self.collate)  # type: ignore[arg-type]

    def first_rows(self, at_most: int | None = None) -> list[Encoded]:
        """Gives train rows in an order that the seed decides, for first weights; each process gets the same."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [self.train[position] for position in order[:at_most]]

    @property
    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0

    # Lightning's own restart in the middle of an epoch keeps its counters but starts the data from the beginning.
    def state_dict(self) -> dict[str, int]:
        return {"drawn": self._sampler.drawn % len(self._sampler)} if self._sampler else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._start = state_dict["drawn"]

    def collate(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        """Turns samples into a batch."""
        return collate(samples, padding_id(self.tokenizer), side="left")


class EpochShuffle(DistributedSampler):
    """One process's share of `count` of `size` positions, in an order that is a function of seed and epoch.

    Positions are dealt out in turn, so that all processes together draw at each step the same positions as one process
    with a batch of that size. All draw equally many: if `count` does not divide, the first positions come twice.

    It is a DistributedSampler because Lightning wraps any other sampler in one that draws a whole epoch when it begins,
    and `drawn` would then mean nothing.

    Attributes:
        drawn: the number of positions of the epoch that this process has taken.

    Args:
        size: the number of all positions.
        count: the number of positions in an epoch.
        seed: decides the order together with the epoch.
        start: where the first epoch begins, for a run that resumes in its middle.
        epoch: returns the number of the epoch that begins. Lightning's `set_epoch` is one ahead in a run that resumes
            from the end of an epoch.
        rank: of this process.
        num_processes: that draw together.
    """

    def __init__(
        self,
        size: int,
        count: int,
        seed: int,
        start: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        *,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        super().__init__(range(count), num_processes, rank, seed=seed)  # type: ignore[arg-type]
        self.size, self.count, self.current_epoch = size, count, epoch
        self.start = self.drawn = start

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.current_epoch())
        order = torch.randperm(self.size, generator=generator)[: self.count]
        mine = order[torch.arange(self.rank, self.total_size, self.num_replicas) % self.count]
        self.drawn, self.start = self.start, 0
        for position in mine[self.drawn :].tolist():
            self.drawn += 1
            yield position
