"""Private parts of other libraries that layerif reads or changes, one function each.

A library may change its private parts in any release. Each function names the version that it was read from, and
tests/test_compat.py fails where a new version behaves differently. Subclasses of PEFT's tuner classes are not here:
they override methods that PEFT asks its methods to override.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    import lightning as L
    from lightning.pytorch.loggers import WandbLogger
    from torch import Tensor
    from transformers import PreTrainedModel


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


@contextmanager
def compose_by(make_loader: Callable[..., Any]) -> Iterator[None]:
    """Lets Hydra compose by a loader of ours, where it starts within this context. Read from hydra-core 1.3.8.

    Args:
        make_loader: gives a `ConfigLoaderImpl` for a search path, `config_search_path`.
    """
    from hydra._internal import hydra

    original = hydra.ConfigLoaderImpl  # pyright: ignore[reportPrivateImportUsage]
    hydra.ConfigLoaderImpl = make_loader  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        hydra.ConfigLoaderImpl = original  # type: ignore[misc]


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
