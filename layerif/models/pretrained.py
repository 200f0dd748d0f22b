"""Sources of causal language models: the hub or a local folder."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from safetensors import SafetensorError

from layerif.checks import check_fields
from layerif.compat import hub_commit
from layerif.files import hash_files
from layerif.layers import LayerMap
from layerif.models.blocks import layer_map
from layerif.models.checkpoints import refuse_other_adapter, refuse_other_shapes, shapes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

T = TypeVar("T")
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class Pretrained(ABC):
    """A source of a model; each kind of source adds the place of its files (`location`).

    Args:
        adapter: the folder of a PEFT adapter to load on top; None loads the bare model.
        dtype: the type of the weights.
        attention: transformers' `attn_implementation`; it must not change results and is not part of the fingerprint.
    """

    adapter: str | None = None
    dtype: Dtype = "float32"
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        check_fields(self, "model")

    @abstractmethod
    def location(self) -> tuple[str, str | None]:
        """Returns the folder or hub name, and the revision, for `from_pretrained`."""

    @abstractmethod
    def weights_hash(self) -> str:
        """Returns a hash or revision that changes whenever the weights do."""

    def fingerprint(self) -> dict[str, str]:
        """Returns everything about the model that changes a measurement."""
        adapter = hash_folder(Path(self.adapter)) if self.adapter else "none"
        return {"weights": self.weights_hash(), "adapter": adapter, "dtype": self.dtype}

    def inputs(self) -> dict[str, str]:
        """Returns what makes two jobs different: the fingerprint, and the tokenizer where that does not cover it."""
        return self.fingerprint()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer. All callers share one object (see `_remembered`), so do not change it."""
        return _remembered(_tokenizer, self)

    def layers(self) -> LayerMap:
        """Returns all blocks with all their linear layers, without loading weights."""
        return _remembered(_layers, self)

    def load(self) -> PreTrainedModel:
        """Loads the model with its adapter on the CPU, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        where, revision = self.location()
        with _readable(where):
            model = AutoModelForCausalLM.from_pretrained(
                where,
                revision=revision,
                dtype=getattr(torch, self.dtype),
                attn_implementation=self.attention,
                trust_remote_code=False,
            )
        if self.adapter:
            from peft import PeftModel

            return PeftModel.from_pretrained(model, self.adapter).eval()  # type: ignore[return-value]
        return model.eval()

    def skeleton(self, *, with_adapter: bool = False) -> PreTrainedModel:
        """Builds the model without weights, on the meta device, which takes a fraction of a second.

        Args:
            with_adapter: add the adapter, as `load` does.
        """
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        where, revision = self.location()
        with _readable(where), torch.device("meta"):
            config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
            is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES  # transformers would take it silently
            if config.is_encoder_decoder or (is_encoder and not getattr(config, "is_decoder", False)):
                raise ValueError(f"the architecture {config.model_type} has an encoder")
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype), trust_remote_code=False)
        if not with_adapter or self.adapter is None:
            return model
        from peft import PeftConfig, get_peft_model

        with torch.device("meta"):
            return get_peft_model(model, PeftConfig.from_pretrained(self.adapter))  # type: ignore[return-value]

    def at(self, checkpoint: str) -> Pretrained:
        """Returns this model at a saved checkpoint, without loading weights of the model.

        Args:
            checkpoint: the folder of a PEFT adapter, which replaces the model's own, or of a whole model.

        Raises:
            ValueError: the folder holds neither, or the names and shapes of its tensors belong to another model.
        """
        folder = Path(checkpoint)
        if (folder / "adapter_config.json").is_file():
            refuse_other_adapter(self, folder)
            return replace(self, adapter=checkpoint)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"the checkpoint {checkpoint!r} holds neither adapter_config.json nor config.json; give folders "
                "written by save_pretrained, PEFT adapters or whole models"
            )
        found = LocalModel(path=checkpoint, adapter=self.adapter, dtype=self.dtype, attention=self.attention)
        refuse_other_shapes(checkpoint, shapes_of(found.skeleton()), shapes_of(self.skeleton()))
        return found


@dataclass(frozen=True, kw_only=True)
class HubModel(Pretrained):
    """A model of the Hugging Face hub: `model=hub model.name=org/name`."""

    name: str
    revision: str | None = None

    def location(self) -> tuple[str, str | None]:
        return self.name, self.revision

    def weights_hash(self) -> str:
        with _readable(self.name):
            commit = hub_commit(self.name, self.revision)
        # An old offline cache has no commit, and the name alone stays the same when the weights change.
        if commit is None:
            raise ValueError(
                f"the hub gives no commit for model.name={self.name!r}; "
                "pass model.revision=<commit>, or download it and use model=local model.path=/folder"
            )
        return f"{self.name}@{commit}"


@dataclass(frozen=True, kw_only=True)
class LocalModel(Pretrained):
    """A folder written by `save_pretrained`: `model=local model.path=/folder`."""

    path: str

    def location(self) -> tuple[str, str | None]:
        folder = Path(self.path)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"model.path={self.path!r} holds no config.json: it must be a folder written by save_pretrained "
                "(model and tokenizer); for a hub model use model=hub model.name=org/name"
            )
        return str(folder), None

    def weights_hash(self) -> str:
        return hash_folder(Path(self.location()[0]))

    def inputs(self) -> dict[str, str]:
        folder = Path(self.location()[0])
        names = {*self.tokenizer().vocab_files_names.values(), *_TOKENIZER}
        files = sorted(file for file in folder.iterdir() if file.name in names)
        return {**super().inputs(), "tokenizer": hash_files(files)}


def _remembered(make: Callable[[Pretrained], T], model: Pretrained) -> T:
    """Calls `make(model)` once per process while the files of the model's folder stay the same; for a hub, always."""
    folder = Path(model.location()[0])
    if not folder.is_dir():
        return make(model)
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    return _make_once(make, model, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@lru_cache(maxsize=8)
def _make_once(make: Callable[[Pretrained], T], model: Pretrained, files: tuple[tuple[str, int, int], ...]) -> T:
    return make(model)


def _tokenizer(model: Pretrained) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    where, revision = model.location()
    with _readable(where):
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)


def _layers(model: Pretrained) -> LayerMap:
    return layer_map(model.skeleton(), scope="all", skip_unsupported=True)


def hash_folder(folder: Path) -> str:
    """Computes the SHA-256 of the names and contents of a model folder's configuration and weight files."""
    files = sorted(
        file for file in folder.glob("*") if file.name in _CONFIGS or file.suffix in {".safetensors", ".bin", ".gguf"}
    )
    if not files:
        raise ValueError(
            f"{str(folder)!r} holds no model files: expected {', '.join(sorted(_CONFIGS))} and *.safetensors"
        )
    return hash_files(files)


_CONFIGS = {"config.json", "adapter_config.json"}
_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}


class _readable:
    """Turns the many errors of the loaders into one that says what to do."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            raise ValueError(
                f"cannot load {self.where!r}: {_first_line(error)} "
                "(a folder: model=local model.path=/folder; a hub model: model=hub model.name=org/name, online, or "
                "downloaded before and with HF_HUB_OFFLINE=1, which waits for no network)"
            ) from error
        if isinstance(error, ValueError | KeyError | ImportError | SafetensorError):
            raise ValueError(
                f"cannot load {self.where!r}: {_first_line(error)}; supported are decoder-only language models whose "
                "architecture this version of transformers holds itself (no trust_remote_code), in files that are whole"
            ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
