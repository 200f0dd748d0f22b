"""Number formats: what a weight is after it was quantised and read back, and the true bits that each weight takes.

Letters in shape suffixes: O outputs and I inputs of a linear layer, N blocks of a matrix, B weights of a block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerif.checks import check_choice, require

GROUP = 64  # weights that share a scale in the formats of round-to-nearest
_HALF = 16  # bits of a scale, and of a least value
_SAME_BITS = 1e-6
_REPRODUCED = 1e-4  # relative error below which a format gives a model back as it was


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        name: llama.cpp's, or our own: `INT3` is symmetric, `INT3_ASYM` is not.
        bits: of each weight, with its share of the scales.
        block: the weights side by side in a row that share scales; it must divide the row.
        back: quantises a weight (O×I, float32) and reads it back.
        whole: the bits of a weight without its share of the scales.
        is_symmetric: zero stands in the middle of the values, so that a block has a scale and no least value.
        is_gguf: the package `gguf` writes it.
    """

    name: str
    bits: float
    block: int
    back: Callable[[Tensor], Tensor]
    whole: int
    is_symmetric: bool
    is_gguf: bool

    def __call__(self, weight: Tensor) -> Tensor:
        """Quantises a weight and reads it back.

        Args:
            weight: the weight (O×I); `block` divides I.

        Returns:
            The weight as the format holds it, in its own dtype and on its device.
        """
        return self.back(weight.detach().float()).to(weight)


def rounded_to_nearest(weight: Tensor, bits: int, *, symmetric: bool, group: int = GROUP) -> Tensor:
    """Rounds the weights of every group to the nearest of 2^bits evenly spaced values.

    Symmetric: the values are d·q with q from −2^(bits−1) to 2^(bits−1) − 1 and d = 2·max|w|/(2^bits − 1). Otherwise
    they are m + d·q with q from 0 to 2^bits − 1, m the least weight and d = (max w − m)/(2^bits − 1). d and m are held
    in float16.

    Args:
        weight: the weight (O×I, float32).
        bits: of a weight, without scales.
        symmetric: see above.
        group: the weights of a row that share d and m; it must divide I.

    Returns:
        The rounded weight (O×I).
    """
    blocks_NB = weight.reshape(-1, group)
    steps = 2**bits - 1
    if symmetric:
        scale_N1 = _in_half(2 * blocks_NB.abs().amax(1, keepdim=True) / steps)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        rounded_NB = _divided(blocks_NB, scale_N1).round().clamp(low, high) * scale_N1
    else:
        least_N1 = _in_half(blocks_NB.amin(1, keepdim=True))
        scale_N1 = _in_half((blocks_NB.amax(1, keepdim=True) - least_N1) / steps)
        rounded_NB = _divided(blocks_NB - least_N1, scale_N1).round().clamp(0, steps) * scale_N1 + least_N1
    return rounded_NB.reshape(weight.shape)


def _in_half(values: Tensor) -> Tensor:
    return values.to(torch.float16).to(values.dtype)


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.zeros_like(values), values / scale)


def gguf_bytes(weight: Tensor, name: str) -> Any:
    """Gives the bytes of each row of a weight (O×I) in a format of the package `gguf`, as a numpy array."""
    gguf = require("gguf", "embedded")
    values = weight.detach().float().cpu().contiguous().numpy()
    return gguf.quantize(values, gguf.GGMLQuantizationType[name])


def _through_gguf(name: str, weight: Tensor) -> Tensor:
    gguf = require("gguf", "embedded")
    return torch.from_numpy(gguf.dequantize(gguf_bytes(weight, name), gguf.GGMLQuantizationType[name]))


def _gguf(name: str, bits: float, whole: int, is_symmetric: bool) -> Format:
    return Format(name, bits, 32, partial(_through_gguf, name), whole, is_symmetric, is_gguf=True)


def _group(bits: int, *, symmetric: bool) -> Format:
    scales = _HALF if symmetric else 2 * _HALF
    return Format(
        f"INT{bits}" if symmetric else f"INT{bits}_ASYM",
        bits + scales / GROUP,
        GROUP,
        partial(rounded_to_nearest, bits=bits, symmetric=symmetric),
        bits,
        symmetric,
        is_gguf=False,
    )


FORMATS: Mapping[str, Format] = {
    each.name: each
    for each in (
        _gguf("MXFP4", 4.25, 4, True),
        _gguf("Q4_0", 4.5, 4, True),
        _gguf("Q4_1", 5.0, 4, False),
        _gguf("Q5_0", 5.5, 5, True),
        _gguf("Q5_1", 6.0, 5, False),
        _gguf("Q8_0", 8.5, 8, True),
        *(_group(bits, symmetric=symmetric) for bits in (2, 3, 4, 6) for symmetric in (True, False)),
    )
}


def formats_called(given: str | Sequence[str], setting: str = "formats") -> tuple[Format, ...]:
    """Gives the formats that a setting names, those of the fewest bits first.

    Args:
        given: `gguf`, those that the package writes; `all`, with those of round-to-nearest that take other bits; or a
            list of names.
        setting: what it is called, for messages.

    Raises:
        ValueError: a name is unknown, or two formats take the same bits, so that bits do not say which one is meant.
    """
    if given in ("gguf", "all"):
        written = {each.bits for each in FORMATS.values() if each.is_gguf}
        chosen = [each for each in FORMATS.values() if each.is_gguf or (given == "all" and each.bits not in written)]
        return tuple(sorted(chosen, key=lambda each: each.bits))
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        check_choice(setting, name, ("gguf", "all", *FORMATS) if isinstance(given, str) else FORMATS)
    if not names:
        raise ValueError(f"{setting}=[] names none; give gguf, all, or some of {', '.join(FORMATS)}")
    found = sorted((FORMATS[name] for name in dict.fromkeys(names)), key=lambda each: each.bits)
    for one, other in itertools.pairwise(found):
        if one.bits == other.bits:
            raise ValueError(
                f"{setting} names {one.name} and {other.name}, which both take {one.bits:g} bits; give one of them"
            )
    return tuple(found)


def format_of(bits: float, formats: Sequence[Format]) -> Format | None:
    """Gives the format that takes these bits; None where none does."""
    return next((each for each in formats if abs(each.bits - bits) < _SAME_BITS), None)


def spelt_formats(formats: Sequence[Format]) -> str:
    """Lists formats with their bits: `Q4_0 (4.5), Q5_0 (5.5)`."""
    return ", ".join(f"{each.name} ({each.bits:g})" for each in formats)


def check_rows(formats: Sequence[Format], widths: Mapping[str, int]) -> None:
    """Refuses a format whose blocks do not divide the rows of a matrix.

    Args:
        formats: those that a matrix may get.
        widths: the weights in a row of each matrix, by its name.

    Raises:
        ValueError: names format and matrix.
    """
    for each in formats:
        for name, width in widths.items():
            if width % each.block:
                raise ValueError(
                    f"{each.name} has blocks of {each.block} weights, which do not divide the {width} weights in a row "
                    f"of {name}; give formats whose blocks do, or another model"
                )


def relative_error(weights: Sequence[Tensor], each: Format) -> float:
    """Gives the error ‖Δ‖/‖W‖ that a format makes in all weights together."""
    square_error, square = 0.0, 0.0
    for weight in weights:
        values = weight.detach().double()
        square += float(values.square().sum())
        square_error += float((each(weight).double() - values).square().sum())
    return math.sqrt(square_error / (square or 1.0))


def reproduces(error: float) -> bool:
    """Tells if a format with this relative error gives the weights back as they were: they stand on its grid."""
    return error < _REPRODUCED
