"""Quantised weights: which layers hold them, what they are as numbers, and who refuses them.

bitsandbytes quantises a model while it is loaded (`model.quantised`), and models in memory or in files may have been
quantised by others. A layer is measured, and gets an adapter, where it behaves as a linear layer: only its inputs and
the gradients at its outputs are looked at, never a gradient of its weight.
"""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from layerif.compat import (
    compute_four_bits_in,
    compute_without_quantising_inputs,
    dequantised,
    is_of_known_format,
    keep_unpacked,
    types_when_loaded,
)
from layerif.files import read_json

Quantised = Literal["none", "nf4", "int8"]
BESIDE = "base.json"  # beside an adapter, whose configuration does not say how its base was quantised
_OF_BITSANDBYTES = ("nf4", "fp4", "int8")
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BITS = {"nf4": 4.5, "fp4": 4.5, "int8": 8.0, "fp8": 8.0, "mxfp4": 4.25}
_PACKED_BY = ("bitsandbytes", "torchao")  # their tensors may pretend to be of a floating-point type
_DENSE = "give the model as it was before it was quantised (model.quantised=none)"


def is_packed(module: nn.Module) -> bool:
    """Tells if a module says that it is a linear layer, and keeps its weight in another form than numbers."""
    if not all(isinstance(getattr(module, side, None), int) for side in ("in_features", "out_features")):
        return False
    return any(_is_packed(tensor) for _, tensor in _matrices(module, recurse=False))


def weight_in(module: nn.Module) -> Tensor:
    """Returns the weight (O×I) that a packed layer multiplies with, as numbers."""
    if is_of_known_format(module):
        return dequantised(module)
    dtype = next((each.dtype for _, each in _own(module) if each.dtype in _PLAIN), torch.float32)
    device = next(tensor for _, tensor in _own(module)).device
    with torch.no_grad():  # the rows of the identity go in, so that the weight comes out
        at_zero = module(torch.zeros(1, module.in_features, dtype=dtype, device=device))  # type: ignore[arg-type]
        return (module(torch.eye(module.in_features, dtype=dtype, device=device)) - at_zero).T  # type: ignore[arg-type]


def num_unpacked(model: nn.Module) -> int:
    """Counts the parameters of a model, a tied one once, and those of a packed layer as they were before."""
    found: Any = 0
    seen: set[int] = set()
    for module in model.modules():
        held = {id(tensor): tensor for tensor in module.parameters(recurse=False)}
        if is_packed(module):
            found += module.in_features * module.out_features  # type: ignore[operator]
            bias = getattr(module, "bias", None)
            held = {} if bias is None else {id(bias): bias}
        found += sum(tensor.numel() for key, tensor in held.items() if key not in seen)
        seen |= held.keys()
    return found


def scheme_in(model: nn.Module) -> str | None:
    """Names the way in which the linear layers of a model in memory are quantised; None where they are not."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    for module in model.modules():
        if is_packed(module):
            return type(module).__name__ if settings is None else scheme_of(settings)
    return None


def scheme_of(settings: Any) -> str:
    """Names a way of quantising by the configuration of transformers: `nf4` and `int8` are those of bitsandbytes."""
    given = settings if isinstance(settings, Mapping) else settings.to_dict()
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method", "an unnamed method")))
    if method != "bitsandbytes":
        return f"{method} {given['bits']} bits" if "bits" in given else method
    if given.get("load_in_8bit"):
        return "int8"
    return str(given.get("bnb_4bit_quant_type", "fp4"))  # bitsandbytes' own default


def bits_of_scheme(scheme: str) -> float | None:
    """Gives the bits of a weight with its share of the scales, by the name of `scheme_of`; None where that is unknown.

    Schemes of 4 bits of bitsandbytes have a float32 scale for 64 weights, and MXFP4 has 8 bits for 32 weights.
    """
    if scheme in _BITS:
        return _BITS[scheme]
    named = re.search(r" (\d+) bits$", scheme)
    return float(named[1]) if named else None


def check_quantised_config(where: str, config: Any, quantised: Quantised) -> str | None:
    """Refuses a quantised model that cannot be loaded here, before anything is loaded.

    Args:
        where: the folder or the name of the model, for the message.
        config: of transformers.
        quantised: `model.quantised`, the way in which the model is to be quantised.

    Returns:
        The way in which the files are quantised; None where they are not.

    Raises:
        ValueError: the files are quantised in another way than the one asked for, or a library is missing.
    """
    settings = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if settings:
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"cannot load {where!r}: quantization_config in its config.json must hold an object, got {settings!r}"
            )
        in_files = scheme_of(settings)
        if quantised not in ("none", in_files):
            raise ValueError(
                f"model.quantised={quantised}, and by quantization_config in its config.json {where!r} is quantised "
                f"already ({in_files}); leave model.quantised out, or give the model as it was before"
            )
        if in_files not in get_args(Quantised):
            _check_loadable(where, settings, in_files)
    needed = quantised if not settings else in_files
    if needed in _OF_BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"cannot load {where!r} quantised ({needed}): that needs bitsandbytes, which is not installed; run pip "
            "install 'layerif[quantised]', or give a model that is not quantised"
        )
    return in_files if settings else None


def _check_loadable(where: str, settings: Mapping[str, Any], scheme: str) -> None:
    """Refuses a format that the installed libraries, or this machine, cannot load."""
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        AutoHfQuantizer.from_config(dict(settings), pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # a library may raise anything
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"cannot load {where!r}: by quantization_config in its config.json it is quantised ({scheme}), and {said}; "
            f"install what that names, or {_DENSE}"
        ) from error


def loading(quantised: Quantised, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the settings by which transformers quantises a model while it loads it."""
    from transformers import BitsAndBytesConfig

    if quantised == "none":
        return {}  # a None would stand in the place of what the files say
    if quantised == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four_bits: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quantised,
        "bnb_4bit_compute_dtype": dtype,
    }
    return {"quantization_config": BitsAndBytesConfig(**four_bits)}


def check_computed_type(scheme: str, dtype: str) -> None:
    """Refuses a type that quantised layers do not compute in.

    Args:
        scheme: the way in which the model is quantised, here or in its files; `none` where it is not.
        dtype: `model.dtype`.
    """
    if scheme != "none" and dtype == "float64":
        raise ValueError(
            f"model.quantised={scheme} computes in float32 at best; use model.dtype=float32, or a model that is not "
            "quantised (model.quantised=none)"
        )


def compute_in(model: nn.Module, dtype: torch.dtype, *, where: str, scheme: str) -> None:
    """Gives a model whose files are quantised another type; transformers leaves it in that of the files.

    Args:
        model: as transformers loaded it.
        dtype: of the parameters that are not packed, and of the products of the packed layers.
        where: the folder or the name of the model, for the message.
        scheme: the way in which its files are quantised.

    Raises:
        ValueError: the files are of another type, and only layers of bitsandbytes are known to compute in any.
    """
    type_of = types_when_loaded(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.dtype not in _PLAIN or _is_packed(parameter) or parameter.dtype == type_of(name):
            continue
        if scheme not in _OF_BITSANDBYTES:
            if is_packed(model.get_submodule(name.rpartition(".")[0])):
                continue  # a scale, whose type is that of the format
            here, there = (str(each).removeprefix("torch.") for each in (dtype, parameter.dtype))
            raise ValueError(
                f"model.dtype={here}, and the files of {where!r} ({scheme}) hold {name} in {there}, the only type that "
                f"layers of this format are known to compute in; use model.dtype={there}, or {_DENSE}"
            )
        parameter.data = parameter.data.to(type_of(name))
    compute_four_bits_in(model, dtype)


def prepare_quantised(model: nn.Module) -> None:
    """Makes a model that bitsandbytes has just quantised compute alike in every mode and for every batch.

    Layers of 8 bits would quantise their inputs, too, and treat columns apart by the largest value of the batch; here
    they multiply with their dequantised weight, as layers of 4 bits do. Layers of 4 bits would repack their weight at a
    forward on some processors, and give no gradient after that.
    """
    compute_without_quantising_inputs(model)
    keep_unpacked(model)


def check_packed_layers(name: str, block: nn.Module) -> None:
    """Refuses a block with quantised weights that cannot be measured.

    Args:
        name: of the block, for the message.
        block: of a model that was loaded in any way.

    Raises:
        ValueError: names the layer, which is not a linear one or does not behave as one.
    """
    seen: set[tuple[type, int, int]] = set()
    for path, tensor in _matrices(block):
        if tensor.is_meta or not _is_packed(tensor):
            continue
        module: Any = block.get_submodule(path.rpartition(".")[0])
        what = f"{name}.{path} ({type(module).__name__}, {tensor.dtype}) is quantised"
        if not is_packed(module):
            raise ValueError(f"{what}, and it is not the weight of a linear layer; {_DENSE}")
        kind = type(module), module.in_features, module.out_features
        if not is_of_known_format(module) and kind not in seen and (why := _why_not_linear(module)):
            raise ValueError(f"{what}, and does not behave as a linear layer: {why}; {_DENSE}")
        seen.add(kind)


def refuse_quantised_block(name: str, block: nn.Module) -> None:
    """Refuses to change the weights of a block that are quantised.

    Args:
        name: of the block, for the message.
        block: of a model that was loaded in any way.
    """
    for path, tensor in _matrices(block):
        if _is_packed(tensor):
            module = type(block.get_submodule(path.rpartition(".")[0])).__name__
            raise ValueError(
                f"{name}.{path} ({module}, {tensor.dtype}) is quantised, and only floating-point weights are pruned or "
                f"quantised; {_DENSE}"
            )


def refuse_other_quantisation(what: str, folder: Path, here: str | None) -> None:
    """Refuses an adapter that was trained on a base that was quantised in another way.

    An adapter learns to make up for the errors of its base. Only adapters that layerif wrote say what that was; others
    are taken with a warning where the base is quantised.

    Args:
        what: the adapter, for the message.
        folder: of the adapter.
        here: the way in which the base is quantised here; None where it is not.
    """
    there = quantisation_beside(folder)
    if there is None and here is not None:
        warnings.warn(
            f"{what} does not say how its base was quantised (it holds no {BESIDE}), and here the base is {here}; "
            "check that it was trained on such a base",
            RuntimeWarning,
            stacklevel=3,
        )
    if there is not None and there != (here or "none"):
        raise ValueError(
            f"{what} was trained on a base with quantised={there}, and here it is {here or 'none'}; use "
            f"model.quantised={there}, or train the adapter anew"
        )


def quantisation_beside(folder: Path) -> str | None:
    """Returns the way in which the base under an adapter was quantised, `none` where it was not.

    Returns:
        The way; None where the folder of the adapter does not say it.
    """
    if not (file := folder / BESIDE).is_file():
        return None
    content = read_json(file, what="note on the adapter")
    return content.get("quantised") if isinstance(content, dict) else None


def note_quantisation(model: nn.Module, folder: Path) -> None:
    """Writes beside an adapter how its base is quantised, or that it is not, for `refuse_other_quantisation`."""
    found = {"quantised": scheme_in(model) or "none"}
    (folder / BESIDE).write_text(json.dumps(found) + "\n", encoding="utf-8")


def _why_not_linear(module: Any) -> str | None:
    """Says why a packed layer cannot be measured, from a trial with two inputs; None where it can."""
    dtype = next((each.dtype for _, each in _own(module) if each.dtype in _PLAIN), torch.float32)
    device = next(tensor for _, tensor in _own(module)).device
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, module.in_features, generator=generator).to(device, dtype)
    first.requires_grad_()
    try:
        with torch.enable_grad():
            outputs = [module(each) for each in (first, second, first + second, torch.zeros_like(second))]
            of_first, of_second, of_sum, of_zero = outputs
            if of_first.shape != (4, module.out_features):
                return f"it gives {tuple(of_first.shape)} for 4 inputs"
            if not of_first.requires_grad:
                return "it passes no gradient to its input"
            delta = torch.randn(4, module.out_features, generator=generator).to(of_first)
            (gradient,) = torch.autograd.grad((of_first * delta).sum(), first)
    except Exception as error:  # a kernel may raise anything
        return f"a trial failed ({type(error).__name__}: {error})"
    moved, of_first, of_sum = ((of_second - of_zero).detach(), of_first.detach(), of_sum.detach())
    scale = float(moved.norm()) + 1e-9
    if float((of_sum - of_first - moved).norm()) > 0.05 * scale:
        return "the output of a sum is not the sum of the outputs"
    expected, found = (moved * delta).sum(), (gradient * second).sum()
    if abs(float(expected - found)) > 0.05 * scale * float(delta.norm()):
        return "its gradient is not that of its forward"
    return None


def _own(module: nn.Module, *, recurse: bool = False) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)


def _matrices(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.named_parameters(recurse=recurse):
        if tensor.ndim >= 2:
            yield name, tensor
    for name, tensor in module.named_buffers(recurse=recurse):
        # A mask is a buffer, too, but is not called a weight.
        if tensor.ndim >= 2 and "weight" in name.rpartition(".")[2]:
            yield name, tensor


def _is_packed(tensor: Tensor) -> bool:
    return tensor.dtype not in _PLAIN or type(tensor).__module__.startswith(_PACKED_BY)
