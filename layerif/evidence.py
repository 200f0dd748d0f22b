"""What a look at a model leaves for its estimators, other than Grams: spectra, activations, gates.

Letters in shape suffixes: L layers, S samples, H hidden size, I inputs and O outputs of a linear layer, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from layerif.layers import LayerMap
from layerif.names import check_choice

Classes = Literal["truth", "answer"]


@dataclass(frozen=True)
class LayerSpectra:
    """The eigenvalues of WᵀW, the squared singular values of W, of every matrix in `layers`.

    eigenvalues: by parameter name, ascending, float64; seconds: the decomposition of each block's matrices took.
    """

    layers: LayerMap
    eigenvalues: Mapping[str, Tensor]
    seconds: tuple[float, ...]
    fingerprint: str

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"singular values took {sum(self.seconds) / len(self.seconds):.3g} s a block",)


@dataclass(frozen=True)
class LayerActivations:
    """What one forward pass over S train samples saw in each block; every token of a sample counts, no padding.

    input_square_norms: by parameter name, Σ over tokens of x_j² for each input j of the matrix (I).
    weight: gives a matrix (O×I) by its parameter name; the model is loaded for it when first asked.
    cosines: mean over tokens of cos(x_in, x_out), the block's input and output (L).
    variances: of the block's output over all tokens and dimensions (L).
    sparsities: the fraction of its entries with |a| < epsilon (L); num_entries: how many entries there were.
    prompts, right, wrong: block outputs averaged over the tokens of the prompt, of the right output and of one wrong
        option's output in its place (L×S×H); NaN where a sample has no such token left.
    answers: the label of the right option of each sample.
    """

    layers: LayerMap
    input_square_norms: Mapping[str, Tensor]
    weight: Callable[[str], Tensor]
    cosines: Tensor
    variances: Tensor
    sparsities: Tensor
    num_entries: int
    epsilon: float
    prompts: Tensor
    right: Tensor
    wrong: Tensor
    answers: tuple[str, ...]
    fingerprint: str

    def metric(self, param: str) -> Tensor:
        """Wanda's |W_ij|·‖X_j‖₂ (O×I): what each weight can add to its output over the samples."""
        weight_OI = self.weight(param).detach()
        norms_I = self.input_square_norms[param].sqrt().to(weight_OI.device, torch.float32)
        return weight_OI.float().abs() * norms_I

    def labelled(self, classes: Classes) -> tuple[Tensor, list[str], list[int]]:
        """Pooled block outputs (L×R×H) with the class of each row and the sample it belongs to.

        truth: the right output against a wrong one, two rows a sample; answer: the prompt alone, with the label of its
        right answer. Raises ValueError where there is one class only, or a row without tokens.
        """
        check_choice("estimator.classes", classes, get_args(Classes))
        numbers = list(range(len(self.answers)))
        if classes == "answer":
            rows_LRH, labels, samples = self.prompts, list(self.answers), numbers
        else:
            has_wrong = not bool(self.wrong.isnan().all())
            rows_LRH = torch.cat([self.right, self.wrong], dim=1) if has_wrong else self.right
            labels = ["right"] * len(numbers) + ["wrong"] * len(numbers) * has_wrong
            samples = numbers + numbers * has_wrong
        lost = int(rows_LRH.isnan().any(dim=2).any(dim=0).sum())
        if lost:
            raise ValueError(
                f"{lost} of {len(labels)} rows of estimator.classes={classes} have no token to look at: their samples "
                "are cut at probe.max_length before the answer, or have one option only; raise probe.max_length, "
                "or leave such rows out with task.keep"
            )
        if len(set(labels)) < 2:
            raise ValueError(
                f"all {len(labels)} rows of estimator.classes={classes} are of one class, {labels[0]!r}: there is "
                "nothing to tell apart; use a task with more answers, or the other of "
                f"estimator.classes={', '.join(get_args(Classes))}"
            )
        return rows_LRH.double(), labels, samples


@dataclass(frozen=True)
class LayerGates:
    """The score s of each block (L) whose gate σ(s) was learned on the change a trained adapter makes there."""

    layers: LayerMap
    scores: Tensor
    fingerprint: str
