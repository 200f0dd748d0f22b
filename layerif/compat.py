"""Private parts of other libraries that layerif reads or changes, one function each.

A library may change its private parts in any release. Each function names the version that it was read from, and
tests/test_compat.py fails where a new version behaves differently. Subclasses of PEFT's tuner classes are not here:
they override methods that PEFT asks its methods to override.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    import lightning as L
    import torch
    from lightning.pytorch.loggers import WandbLogger
    from torch import Tensor, nn
    from transformers import PreTrainedModel, Trainer


def hydra_options() -> list[str]:
    """Lists the long options of Hydra's command line, `--multirun` among them. Read from hydra-core 1.3.8."""
    from hydra._internal.utils import get_args_parser

    return [option for option in get_args_parser()._option_string_actions if option.startswith("--")]


def hydra_arguments(arguments: Sequence[str]) -> Namespace:
    """Reads a command line as Hydra does, with what Hydra does not know in `unknown`. Read from hydra-core 1.3.8."""
    from hydra._internal.utils import get_args_parser

    known, unknown = get_args_parser().parse_known_args(arguments)
    known.unknown = unknown
    return known


def execution_whitelist(patterns: Sequence[str]) -> dict[str, Any]:
    """Gives `hydra.main` the argument that says which targets it may build; nothing where it does not know it.

    Hydra 1.3 has no such argument. Read from hydra-core 1.4.0rc3, whose notes of earlier releases call it
    `_target_whitelist_`.

    Args:
        patterns: dotted paths of objects, or of modules and packages with `.*` behind them.
    """
    import inspect

    import hydra

    return {name: list(patterns) for name in inspect.signature(hydra.main).parameters if name == "execution_whitelist"}


def resolve_in_defaults() -> None:
    """Lets an entry of a defaults list call a resolver, as Hydra 1.3 does by itself. Read from hydra-core 1.4.0rc3.

    Hydra 1.4 replaces the names of groups alone there.
    """
    from hydra.core import default_element
    from omegaconf import OmegaConf

    entry = default_element.InputDefault
    if not hasattr(default_element, "_defaults_list_interpolation_pattern") or hasattr(entry, "_names_alone"):
        return
    entry._names_alone = entry._resolve_interpolation_impl  # type: ignore[attr-defined]

    def resolve(self: Any, known_choices: Any, val: str) -> Any:
        if "${" in val and ":" in val:
            node = OmegaConf.create({"entry": val})
            node._set_parent(known_choices)
            val = node["entry"]
        return self._names_alone(known_choices, val)

    entry._resolve_interpolation_impl = resolve  # type: ignore[assignment,method-assign]


@contextmanager
def compose_by(make_loader: Callable[..., Any]) -> Iterator[None]:
    """Lets Hydra compose by a loader of ours, where it starts within this context.

    Read from hydra-core 1.3.8 and 1.4.0rc3, which asks more of the class than to be called.

    Args:
        make_loader: gives a `ConfigLoaderImpl` for a search path, `config_search_path`.
    """
    from hydra._internal import hydra

    original = hydra.ConfigLoaderImpl  # pyright: ignore[reportPrivateImportUsage]

    class Making(type(original)):
        """The type of a class that makes our loader where it is called, and is Hydra's own in all else.

        Ours is not an instance of it: Hydra 1.4 would then call private methods, past those that ours overrides.
        """

        def __call__(cls, *args: Any, **named: Any) -> Any:
            return make_loader(*args, **named)

    hydra.ConfigLoaderImpl = Making("ConfigLoaderImpl", (original,), {})  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        hydra.ConfigLoaderImpl = original  # type: ignore[misc]


def has_sdpa(model: PreTrainedModel) -> bool:
    """Tells if a model can run with torch's scaled_dot_product_attention. Read from transformers 5.23.0."""
    return bool(getattr(model, "_supports_sdpa", True))


def renamed_for_experts(model_type: str) -> tuple[str, ...]:
    """Lists the ends of the names of linear layers that PEFT's LoRA reads as names of fused experts.

    It does so in families whose experts had modules of their own in transformers 4, for every layer of that name. Read
    from peft 0.21.2 and transformers 5.23.0.
    """
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_checkpoint_conversion_mapping

    if get_checkpoint_conversion_mapping(model_type) is None:
        return ()
    return tuple(_MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), ()))


def asked_for_mode(loader: Any, overrides: Sequence[str]) -> tuple[Any, ...]:
    """Gives what Hydra's loader asks for beside the overrides to find the mode of a run.

    That is nothing in 1.3, and in 1.4 the overrides as they are read. Read from hydra-core 1.3.8 and 1.4.0rc3.
    """
    import inspect

    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    get_mode = getattr(ConfigLoaderImpl, "get_mode")  # noqa: B009 the stubs of 1.3 lack it
    if "parsed_overrides" not in inspect.signature(get_mode).parameters:
        return ()
    return (OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)),)


def logged_step(trainer: L.Trainer) -> int:
    """Returns the step that Lightning gives to the metrics it logs next, counted from 0. Read from lightning 2.6.6."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logged_step(trainer: L.Trainer, step: int) -> None:
    """Sets the step that Lightning gives to the metrics it logs next. Read from lightning 2.6.6."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def validates_now(trainer: L.Trainer) -> bool:
    """Tells if Lightning validates after the training batch that has just ended. Read from lightning 2.6.6."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def wandb_init(logger: WandbLogger) -> dict[str, Any]:
    """Returns the arguments of `wandb.init` that Lightning's logger keeps; they can be changed until the run starts.

    Read from lightning 2.6.6.
    """
    return logger._wandb_init


def add_peft_type(name: str) -> None:
    """Makes `name` a member of PEFT's enum of methods, because PEFT registers a method only under such a member.

    Read from peft 0.21.2 and the enum module of Python 3.11 to 3.14.
    """
    from peft.utils import PeftType

    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13 looks `value in PeftType` up there
        PeftType._hashable_values_.append(name)  # pyright: ignore[reportAttributeAccessIssue]


def quieten_peft() -> None:
    """Ignores the warning of a deprecated name that PEFT asks of every model. Read from peft 0.21.2."""
    warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def hub_commit(name: str, revision: str | None) -> str | None:
    """Returns the commit of a model on the hub, by the place of its config.json in the hub's cache.

    Configurations themselves carry no commit any more. Read from transformers 5.23.0.

    Args:
        name: the name of the model on the hub.
        revision: a branch, a tag or a commit; None stands for the default branch.

    Returns:
        The commit, or None where the cache does not say it.

    Raises:
        OSError: the model is neither in the cache nor on the hub.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)


def has_own_adapter(model: PreTrainedModel) -> bool:
    """Tells if transformers found an adapter in a model's folder and put it on the model.

    Read from transformers 5.23.0.
    """
    return getattr(model, "_hf_peft_config_loaded", False)


def trainer_collator(trainer: Trainer) -> Callable[[list[Any]], Any]:
    """Returns the collator of a trainer, which drops the columns of a row that its model does not take.

    Read from transformers 5.23.0.
    """
    return trainer._get_collator_with_removed_columns(trainer.data_collator)


def is_of_known_format(module: Any) -> bool:
    """Tells if `dequantised` knows the format of a layer: those of bitsandbytes, torchao and HQQ."""
    kind = type(getattr(module, "weight", None))
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao") or _is_hqq(module)


def _is_hqq(module: Any) -> bool:
    return hasattr(module, "W_q")


def dequantised(module: Any) -> Tensor:
    """Returns the weight of a layer of a known format as numbers. Read from peft 0.21.2 and bitsandbytes 0.50.2."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Any = getattr(module, "weight", None)
    if type(weight).__name__ == "Int8Params":  # PEFT's function would leave the layer without its scales
        scale_O = module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * scale_O.float()[:, None] / 127
    with unpacked([module]):
        return dequantize_module_weight(module).detach()


def compute_without_quantising_inputs(model: nn.Module) -> None:
    """Makes the 8-bit layers of bitsandbytes multiply with their dequantised weight, in the type of their input.

    Its own forward does so in training on a CPU alone. The dequantised weight is made again in the backward pass, so
    that no graph keeps it. Read from bitsandbytes 0.50.2.
    """
    for module in _quantising_inputs(model.modules()):
        module.__class__ = _weight_only(type(module))


@contextmanager
def without_quantised_inputs(modules: Iterable[Any]) -> Iterator[None]:
    """Does what `compute_without_quantising_inputs` does while the context is open."""
    quantising = [(module, type(module)) for module in _quantising_inputs(modules)]
    for module, kind in quantising:
        module.__class__ = _weight_only(kind)
    try:
        yield
    finally:
        for module, kind in quantising:
            module.__class__ = kind


def _quantising_inputs(modules: Iterable[Any]) -> list[Any]:
    """Lists the 8-bit layers that have bitsandbytes' own forward; one with weights in 16 bits is not packed."""
    return [
        module
        for module in modules
        if type(module).__name__ == "Linear8bitLt"
        and type(module).__module__.startswith("bitsandbytes")
        and not module.state.has_fp16_weights
    ]


@cache
def _weight_only(kind: type) -> type:
    from bitsandbytes.autograd._functions import MatMul8bitFp

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.weight.CB is not None:
            self.init_8bit_state()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return MatMul8bitFp.apply(x, self.weight, None, bias, self.state)  # type: ignore[return-value]

    return type("WeightOnly8bit", (kind,), {"forward": forward})


def compute_four_bits_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes the 4-bit layers of bitsandbytes dequantise their weight, and multiply, in a type.

    Read from bitsandbytes 0.50.2.
    """
    for module in model.modules():
        if type(getattr(module, "weight", None)).__name__ == "Params4bit":
            module.compute_dtype = dtype  # type: ignore[assignment]
            module.weight.quant_state.dtype = dtype  # type: ignore[union-attr]


def types_when_loaded(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """Gives the type of a parameter by its name in a model that is loaded in `dtype`: some stay in float32.

    Read from transformers 5.23.0.
    """
    plan = model._get_dtype_plan(dtype)
    kept = {re.compile(pattern.replace("*", ".*")): own for pattern, own in plan.items()}
    return lambda name: next((own for pattern, own in kept.items() if pattern.search(name)), dtype)


def keep_unpacked(model: nn.Module) -> None:
    """Keeps the 4-bit layers of bitsandbytes from repacking their weight at a forward in evaluation mode.

    They do so on processors with AVX512-BF16, and a repacked layer passes no gradient on. Read from bitsandbytes
    0.50.2.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@contextmanager
def unpacked(modules: Iterable[Any]) -> Iterator[None]:
    """Keeps the 4-bit layers of bitsandbytes unpacked while the context is open, see `keep_unpacked`."""
    packing = [each for each in modules if hasattr(each, "support_avx512bf16_for_cpu")]
    before = [each.support_avx512bf16_for_cpu for each in packing]
    for module in packing:
        module.support_avx512bf16_for_cpu = False
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                module.weight.data, module.weight.quant_state
            )
    try:
        yield
    finally:
        for module, does in zip(packing, before, strict=True):
            module.support_avx512bf16_for_cpu = does


def changes_of(tensor: Tensor) -> int | None:
    """Counts the changes in place that a tensor went through; None for an inference tensor, which does not count them.

    Read from torch 2.13.0.
    """
    return None if tensor.is_inference() else tensor._version


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Applies a function to every tensor inside nested tuples, lists and dictionaries. Read from torch 2.13.0."""
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, function, tree)
