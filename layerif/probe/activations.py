"""The statistics of one forward pass over a task's train samples: the evidence of every forward-pass estimator.

Letters in shape suffixes: B batch, T tokens, V the real tokens of a batch (no padding), H hidden size, L blocks, S
samples. Sums are taken in float64 over real tokens alone, so that batch size and padding change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerif.data.batches import Encoded, Encodings, batches
from layerif.data.render import Example
from layerif.data.rows import AnyExample, wrong_options
from layerif.evidence import LayerActivations
from layerif.layers import LayerMap
from layerif.models.blocks import bare, device_of, linear_at, weight_of
from layerif.models.contexts import evaluating
from layerif.models.hooks import hooked
from layerif.models.loss import positions_of
from layerif.models.stored import Stored
from layerif.probe.measurements import Load, Measurements, hash_of
from layerif.probe.request import Part, Request
from layerif.probe.store import MeasurementKind
from layerif.progress import progress
from layerif.versions import VERSIONS

_EMBEDDING = -1  # the place of the first block's input among the blocks
EPSILON = 0.01  # in the unit of the hidden state
ACTIVATIONS: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("activations", "forward passes")


@dataclass(frozen=True)
class Activations(Request):
    """A request for the statistics of one forward pass over the train samples.

    Attributes:
        epsilon: an entry of a block's output counts as zero below it. All requests with the same bound share a pass.
    """

    parts: ClassVar[tuple[Part, ...]] = ("train",)

    epsilon: float = EPSILON

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerActivations, bool]:
        layers, model = measurements.layers(), cache(lambda: measurements.merged(load))
        right, wrong = measurements.samples()[0], wrong_answers(measurements)
        tensors, key, reused = measurements.by_the_first(
            ACTIVATIONS,
            lambda: observe(
                model(),
                layers,
                right,
                wrong,
                epsilon=self.epsilon,
                batch_size=measurements.probe.batch_size,
                pad_id=measurements.pad_id,
            ),
            activations=VERSIONS["activations"],
            epsilon=self.epsilon,
            samples=hash_of([sample and (sample.input_ids, sample.prompt_length) for sample in (*right, *wrong)]),
        )
        seen = LayerActivations(
            layers=layers,
            input_square_norms={param: tensors[f"input_square_norms/{param}"] for param in layers.matrices},
            weight=lambda param: weight_of(model(), param),
            num_entries=int(tensors["num_entries"]),
            epsilon=self.epsilon,
            answers=tuple(_label(example) for example in measurements.chosen("train")),
            embedded={what: tensors[f"embedded/{what}"] for what in ("prompts", "right", "wrong")},
            moments={what: tensors[f"moments/{what}"] for what in ("right", "wrong")},
            fingerprint=key,
            **{name: tensors[name] for name in ("cosines", "variances", "sparsities", "prompts", "right", "wrong")},
        )
        return seen, reused


def _label(example: AnyExample) -> str:
    """Gives the label of the right option, and nothing for a row without options."""
    return example.labels[example.answer] if isinstance(example, Example) else ""


def wrong_answers(measurements: Measurements) -> list[Encoded | None]:
    """Gives each train sample with a wrong option in place of the right one, None where it has no other option."""
    examples = measurements.chosen("train")
    changed = [
        replace(example, answer=Random(f"{measurements.seed} {example.id}").choice(wrong_options(example)))
        for example in examples
        if isinstance(example, Example) and wrong_options(example)
    ]
    encoded = iter(measurements.encoded(changed))
    return [next(encoded) if wrong_options(example) else None for example in examples]


def observe(
    model: nn.Module,
    layers: LayerMap,
    right: Sequence[Encoded],
    wrong: Sequence[Encoded | None],
    *,
    epsilon: float,
    batch_size: int = 8,
    pad_id: int = 0,
) -> dict[str, Tensor]:
    """Runs every sample forward once and sums up what each block and each matrix sees.

    Args:
        model: a causal language model; it is left as it was.
        layers: the blocks and matrices to look at.
        right: the samples.
        wrong: each sample with a wrong output in its place, None where it has no other; for the pooled outputs and the
            moments of answers alone.
        epsilon: an entry of a block's output counts as zero below it.
        batch_size: the samples that the model sees at once.
        pad_id: the token that fills shorter samples.

    Returns:
        The tensors of `LayerActivations` by the names of its fields; those of a field with several stand as
        `field/name`.

    Raises:
        ValueError: names the block whose output is not finite.
    """
    seen = _Seen(layers, len(right), epsilon)
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        for what, given in (("right", right), ("wrong", wrong)):
            indices = [index for index, sample in enumerate(given) if sample is not None]
            samples = Encodings(sample for sample in given if sample is not None)
            for rows, batch in progress(list(batches(samples, batch_size, pad_id)), what):
                mask_BT = batch["attention_mask"].bool().to(device)
                seen.start([indices[row] for row in rows], [samples[row] for row in rows], mask_BT, what)
                with hooked(seen.hooks(model), with_kwargs=True):
                    read_batch(model, batch["input_ids"].to(device), mask_BT)
    return seen.tensors()


def read_batch(model: nn.Module, input_BT: Tensor, mask_BT: Tensor) -> None:
    """Runs a batch forward for the sake of the hooks on the model; its logits are not wanted.

    Args:
        model: a causal language model.
        input_BT: the token ids, on its device.
        mask_BT: True where a token is real.
    """
    model(
        input_ids=input_BT,
        attention_mask=mask_BT.long(),
        position_ids=positions_of(mask_BT),
        use_cache=False,
        logits_to_keep=1,
    )


def real_tokens(values: Tensor, mask_BT: Tensor) -> Tensor:
    """Picks the real tokens (V×F) of (B×T×F), in float32 or better; some families (OPT) flatten samples and tokens."""
    values_VF = values.detach().reshape(*mask_BT.shape, -1)[mask_BT]
    return values_VF.to(torch.promote_types(values_VF.dtype, torch.float32))


def real_inputs(param: str, args: Sequence[Tensor], mask_BT: Tensor) -> Tensor:
    """Picks the inputs (V×I) of a linear layer at the real tokens, for an expert those that are sent to it.

    Args:
        param: the name of its weight, for the message.
        args: its inputs, and for a matrix of an expert their places, see `hooked`.
        mask_BT: True where a token is real.

    Raises:
        ValueError: the layer does not see every token once.
    """
    given, *places = args
    if places:
        return given[mask_BT.flatten()[places[0]]]
    if given.numel() != mask_BT.numel() * given.shape[-1]:
        raise ValueError(
            f"{param} does not see every token once, so that its inputs cannot be summed up; use an estimator "
            "on gradients, such as datainf"
        )
    return real_tokens(given, mask_BT)


class _Seen:
    """The sums over the batches, and the hooks that add to them."""

    def __init__(self, layers: LayerMap, num_samples: int, epsilon: float) -> None:
        self.layers, self.num_samples, self.epsilon = layers, num_samples, epsilon
        self.sums: dict[str, Tensor] = {}
        self.pooled: dict[str, dict[int, Tensor]] = {"prompts": {}, "right": {}, "wrong": {}}
        self.moments = {what: torch.zeros(len(layers.names), num_samples, 4).double() for what in ("right", "wrong")}

    def start(self, indices: list[int], samples: Sequence[Encoded], mask_BT: Tensor, what: str) -> None:
        """Prepares for the next batch.

        Args:
            indices: the positions of its samples.
            samples: its samples.
            mask_BT: True where a token is real.
            what: `right` or `wrong`.
        """
        lengths_B = torch.tensor([sample.prompt_length for sample in samples], device=mask_BT.device)
        of_output_BT = mask_BT & (mask_BT.cumsum(1) > lengths_B[:, None])
        self.indices, self.mask_BT, self.what, self.is_counted = indices, mask_BT, what, what == "right"
        self.parts = {what: of_output_BT} | ({"prompts": mask_BT & ~of_output_BT} if self.is_counted else {})

    def hooks(self, model: nn.Module) -> list[tuple[nn.Module | Stored, Any]]:
        """Pairs every block and every measured linear layer with its forward hook."""
        found: list[tuple[nn.Module | Stored, Any]] = []
        for number, name in enumerate(self.layers.names):
            found.append((bare(model).get_submodule(name), self._block(number)))
        for param in self.layers.matrices if self.is_counted else ():
            found.append((linear_at(model, param), self._linear(param)))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Turns the sums into the tensors that `observe` returns."""
        numbers = range(len(self.layers.names))
        sums = {name: value.cpu() for name, value in self.sums.items()}
        first_L, second_L, cosine_L, zero_L = (
            torch.stack([sums[f"{what}/{number}"] for number in numbers])
            for what in ("first", "second", "cosine", "zero")
        )
        tokens, entries = sums["tokens"], sums["entries"]
        assert self.layers.matrix_shapes is not None
        shapes = dict(zip(self.layers.matrices, self.layers.matrix_shapes, strict=True))
        norms = {f"input_square_norms/{param}": torch.zeros(shape[1]).double() for param, shape in shapes.items()}
        pooled = {what: torch.stack([rows[number] for number in numbers]) for what, rows in self.pooled.items() if rows}
        embedded = {what: rows[_EMBEDDING] for what, rows in self.pooled.items() if rows}
        nothing = torch.full_like(pooled["right"], torch.nan)
        return {
            "cosines": cosine_L / tokens,
            "variances": (second_L / entries - (first_L / entries).square()).clamp(min=0),
            "sparsities": zero_L / entries,
            "num_entries": entries.long(),
            **{"wrong": nothing, **pooled},
            **{f"embedded/{what}": rows for what, rows in ({"wrong": nothing[0]} | embedded).items()},
            **{f"moments/{what}": found for what, found in self.moments.items()},
            **{name: sums.get(name, nothing) for name, nothing in norms.items()},  # none where no token is sent to
        }

    def _block(self, number: int) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before_BTH = args[0] if args else kwargs["hidden_states"]
            after_BTH = output[0] if isinstance(output, tuple) else output
            self._pool(number, after_BTH)
            self._add_moments(number, after_BTH)
            if number == 0:
                self._pool(_EMBEDDING, before_BTH)
            if not self.is_counted:
                return
            before_VH, after_VH = (real_tokens(each, self.mask_BT) for each in (before_BTH, after_BTH))
            if not bool(after_VH.isfinite().all()):
                raise ValueError(
                    f"the output of block {self.layers.names[number]} is not finite; look at the weights, or load the "
                    "model in float32 (model.dtype=float32)"
                )
            self._add(f"cosine/{number}", F.cosine_similarity(before_VH, after_VH, dim=1).double().sum())
            self._add(f"first/{number}", after_VH.double().sum())
            self._add(f"second/{number}", after_VH.double().square().sum())
            self._add(f"zero/{number}", (after_VH.abs() < self.epsilon).sum().double())
            if number == 0:
                self._add("tokens", torch.tensor(len(after_VH), dtype=torch.float64))
                self._add("entries", torch.tensor(after_VH.numel(), dtype=torch.float64))

        return look

    def _pool(self, number: int, values_BTH: Tensor) -> None:
        """Averages the values of each sample over the tokens of its parts."""
        for what, part_BT in self.parts.items():
            mean_BH = values_BTH.double().where(part_BT[..., None], 0).sum(1) / part_BT.sum(1, keepdim=True)
            empty_SH = torch.full((self.num_samples, mean_BH.shape[1]), torch.nan)
            self.pooled[what].setdefault(number, empty_SH)[self.indices] = mean_BH.float().cpu()

    def _add_moments(self, number: int, values_BTH: Tensor) -> None:
        """Sums up the entries of each sample's answer."""
        answer_BT1 = self.parts[self.what][..., None]
        kept_BTH = values_BTH.double().where(answer_BT1, 0)
        near_BTH = (values_BTH.abs() < self.epsilon) & answer_BT1
        sums = answer_BT1.sum((1, 2)) * kept_BTH.shape[2], kept_BTH.sum((1, 2)), kept_BTH.square().sum((1, 2))
        moments_B4 = torch.stack([*(each.double() for each in sums), near_BTH.sum((1, 2)).double()], dim=1)
        self.moments[self.what][number, self.indices] = moments_B4.cpu()

    def _linear(self, param: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._add(f"input_square_norms/{param}", real_inputs(param, args, self.mask_BT).double().square().sum(0))

        return look

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value
