"""Sources of causal language models: the hub or a local folder."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from layerif.checks import check_choice, check_fields
from layerif.compat import has_own_adapter, has_sdpa, hub_commit
from layerif.files import hash_files, read_json
from layerif.layers import LayerMap
from layerif.models.blocks import Scope, layer_map, note_left_out
from layerif.models.checkpoints import refuse_other_adapter, refuse_other_shapes, shapes_of
from layerif.models.quantised import (
    Quantised,
    check_computed_type,
    check_quantised_config,
    compute_in,
    loading,
    prepare_quantised,
)
from layerif.models.weights import hash_folder, model_files, refuse_incomplete

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

T = TypeVar("T")
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class Pretrained(ABC):
    """A source of a model; each kind of source adds the place of its files (`location`).

    Args:
        adapter: the folder of a PEFT adapter to load on top; None loads the bare model.
        dtype: the type of the weights; of a quantised model that of the rest, and of the products of its layers.
        attention: transformers' `attn_implementation`; it must not change results and is not part of the fingerprint.
        trust_remote_code: run the Python files that come with the model, with all rights of this process.
        quantised: quantise the linear layers of the blocks while they are loaded (nf4: 4 bits, int8: 8 bits), by
            bitsandbytes; none takes the weights as they are in the files, which may be quantised.
    """

    adapter: str | None = None
    dtype: Dtype = "float32"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    quantised: Quantised = "none"

    def __post_init__(self) -> None:
        check_fields(self, "model")
        check_computed_type(self.quantised, self.dtype)
        if self.adapter == "":
            raise ValueError("model.adapter='' is not allowed; allowed: the folder of an adapter, or null for none")

    @abstractmethod
    def location(self) -> tuple[str, str | None]:
        """Returns the folder or hub name, and the revision, for `from_pretrained`."""

    @abstractmethod
    def weights_hash(self) -> str:
        """Returns a hash or revision that changes whenever the weights do."""

    def fingerprint(self) -> dict[str, str]:
        """Returns everything about the model that changes a measurement."""
        adapter = hash_folder(Path(self.adapter)) if self.adapter else "none"
        found = {"weights": self.weights_hash(), "adapter": adapter, "dtype": self.dtype}
        if self.trust_remote_code and (files := sorted(Path(self.location()[0]).glob("*.py"))):
            found["code"] = hash_files(files)
        return found if self.quantised == "none" else {**found, "quantised": self.quantised}

    @property
    def quantisation(self) -> str | None:
        """Names the way in which the weights are quantised, here or in the files; None where they are not."""
        return _remembered(_scheme_of_files, self) or (None if self.quantised == "none" else self.quantised)

    @property
    def has_dense_weights(self) -> bool:
        """Tells if the weights are there as they were before they were quantised."""
        return _remembered(_scheme_of_files, self) is None

    def inputs(self) -> dict[str, str]:
        """Returns what makes two jobs different: the fingerprint, and the tokenizer where that does not cover it."""
        return self.fingerprint()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer. All callers share one object (see `_remembered`), so do not change it."""
        return _remembered(_tokenizer, self)

    def layers(self) -> LayerMap:
        """Returns all blocks with all their linear layers, without loading weights."""
        return _remembered(_layers_and_vocabulary, self)[0]

    def left_out(self, scope: Scope) -> str | None:
        """Says which matrices of the blocks no measurement takes, see `note_left_out`."""
        return _remembered(_layers_and_vocabulary, self)[2][scope]

    def num_embeddings(self) -> int:
        """Returns the number of token ids that the model has an embedding for."""
        return _remembered(_layers_and_vocabulary, self)[1]

    def check(self) -> None:
        """Checks configuration, tokenizer and adapter against one another, without loading weights.

        Raises:
            ValueError: the model cannot be built, or is quantised in a way that cannot be loaded, its vocabulary lacks
                ids of the tokenizer, or the adapter is of another model or of another quantisation.
        """
        num_embeddings = self.num_embeddings()  # first, because a tokenizer reads the configuration, too
        _check_vocabulary(self.location()[0], self.tokenizer(), num_embeddings)
        if self.adapter:
            refuse_other_adapter(self, Path(self.adapter))

    def load(self) -> PreTrainedModel:
        """Loads the model with its adapter on the CPU, in evaluation mode.

        Raises:
            ValueError: the files do not hold exactly the weights of this model, see `refuse_incomplete`, the adapter is
                of another model, or quantised layers do not compute in `dtype`.
        """
        where, revision = self.location()
        config = self._config()
        in_files = check_quantised_config(where, config, self.quantised)
        if Path(where).is_dir():
            model_files(Path(where))
        with _readable(where):
            loaded: Any = auto_class(config).from_pretrained(
                where,
                revision=revision,
                dtype=getattr(torch, self.dtype),
                attn_implementation=self.attention,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that `found` says which
                **({} if in_files else loading(self.quantised, getattr(torch, self.dtype))),
            )
        model, found = loaded
        if has_own_adapter(model):
            raise ValueError(
                f"cannot load {where!r}: there is an adapter beside the model (adapter_config.json); move the adapter "
                "into a folder of its own, and name that with model.adapter=/folder"
            )
        refuse_incomplete(where, model, found)
        if in_files or self.quantised != "none":
            prepare_quantised(model)
        if in_files:
            compute_in(model, getattr(torch, self.dtype), where=where, scheme=in_files)
        if self.adapter:
            from peft import PeftModel

            refuse_other_adapter(self, Path(self.adapter))
            return PeftModel.from_pretrained(model, self.adapter).eval()  # type: ignore[return-value]
        return model.eval()

    def copy(self) -> PreTrainedModel:
        """Returns a model that nobody else holds."""
        return self.load()

    def in_dtype(self, dtype: Dtype) -> Pretrained:
        """Returns this model with weights of another type, and not quantised."""
        return replace(self, dtype=dtype, quantised="none")

    def skeleton(self, *, with_adapter: bool = False) -> PreTrainedModel:
        """Builds the model without weights, on the meta device, which takes a fraction of a second.

        Args:
            with_adapter: add the adapter, as `load` does.
        """
        config = self._config()
        if getattr(config, "quantization_config", None):
            delattr(config, "quantization_config")  # the skeleton has the shapes of the weights before
        with _readable(self.location()[0]), torch.device("meta"):
            model = auto_class(config).from_config(
                config,
                dtype=getattr(torch, self.dtype),
                attn_implementation="eager",  # which every machine has; it never runs
                trust_remote_code=self.trust_remote_code,
            )
        if not with_adapter or self.adapter is None:
            return model
        from peft import PeftConfig, get_peft_model

        with torch.device("meta"):
            return get_peft_model(model, PeftConfig.from_pretrained(self.adapter))  # type: ignore[return-value]

    def _config(self) -> PreTrainedConfig:
        """Reads the configuration, and refuses one that is not of a causal language model that can be measured."""
        from transformers import AutoConfig
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        # A name with a slash is a kernel of the hub, which transformers looks up by the package `kernels`.
        if "/" not in self.attention or find_spec("kernels") is None:
            check_choice("model.attention", self.attention, ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()))
        where, revision = self.location()
        if self.trust_remote_code:
            warnings.warn(_TRUSTED.format(where=where), RuntimeWarning, stacklevel=2)
        if (file := Path(where, "config.json")).is_file():
            _check_sizes(file)
        with _readable(where):
            config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=self.trust_remote_code)
            is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES  # transformers would take it silently
            if config.is_encoder_decoder or (is_encoder and not getattr(config, "is_decoder", False)):
                raise ValueError(f"its architecture {config.model_type} has an encoder")
            if (names := config.architectures or ()) and all(name.endswith(_OTHER_HEADS) for name in names):
                raise ValueError(f"it is a {names[0]}, which has no head that predicts the next token")
            _check_heads(config.get_text_config())
        if in_files := check_quantised_config(where, config, self.quantised):
            check_computed_type(in_files, self.dtype)
        return config

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
        settings = {field.name: getattr(self, field.name) for field in fields(Pretrained)}
        found = LocalModel(path=checkpoint, **settings)
        refuse_other_shapes(f"the checkpoint {checkpoint!r}", shapes_of(found.skeleton()), shapes_of(self.skeleton()))
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


def auto_class(config: PreTrainedConfig) -> Any:
    """Returns transformers' class that builds a model: some families that read images have no other with a head."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if reads_images and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


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


def _scheme_of_files(model: Pretrained) -> str | None:
    """Names the way in which the files of a model are quantised."""
    return check_quantised_config(model.location()[0], model._config(), model.quantised)


def _tokenizer(model: Pretrained) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    where, revision = model.location()
    with _readable(where, "tokenizer"):
        trusted = model.trust_remote_code
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trusted)


def _layers_and_vocabulary(model: Pretrained) -> tuple[LayerMap, int, dict[Scope, str | None]]:
    """Returns the layers, the number of token ids that the model has an embedding for, and what is left out."""
    skeleton = model.skeleton()
    if model.attention == "sdpa" and not has_sdpa(skeleton):
        raise ValueError(
            f"model.attention=sdpa is not allowed for a {type(skeleton).__name__}, which has no such attention in this "
            "version of transformers; use model.attention=eager"
        )
    layers = layer_map(skeleton, scope="all", skip_unsupported=True)
    notes = {scope: note_left_out(skeleton, scope) for scope in get_args(Scope)}
    return layers, skeleton.get_input_embeddings().weight.shape[0], notes  # type: ignore[index, union-attr]


def _check_vocabulary(where: str, tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Refuses a tokenizer with ids that the model has no embedding for.

    An added token that no text holds by chance may lie beyond them: `<image_soft_token>` does in Gemma 3.
    """
    added: list[int] = [id for id in getattr(tokenizer, "added_tokens_decoder", {}) if id >= num_embeddings]
    used = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    beyond = [f"the {name} token is {id}" for name, id in used.items() if id in added]
    if tokenizer.vocab_size > num_embeddings:
        beyond.insert(0, f"its ids reach {tokenizer.vocab_size - 1}")
    if beyond:
        raise ValueError(
            f"the tokenizer of {where!r} does not fit its model: {beyond[0]}, and the model has embeddings for the ids "
            f"below {num_embeddings} (vocab_size in config.json); give the tokenizer that the model was trained with"
        )


def _check_sizes(file: Path) -> None:
    """Refuses a config.json that is no object, or that has a size of zero, which transformers would divide by."""
    content = read_json(file, what="model configuration")
    if not isinstance(content, dict):
        raise ValueError(
            f"model configuration {str(file)!r} must hold an object, got a {type(content).__name__}; give a folder "
            "written by save_pretrained"
        )
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        size = content.get(name, 1)
        if isinstance(size, int) and size < 1:
            raise ValueError(f"model configuration {str(file)!r}: {name}={size} is not allowed; allowed: at least 1")


def _check_heads(config: PreTrainedConfig) -> None:
    """Refuses query heads that cannot be dealt out to the key heads; transformers finds out in the forward pass."""
    queries, keys = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(queries, int) and isinstance(keys, int) and queries % keys:
        raise ValueError(f"its num_attention_heads={queries} is not a multiple of num_key_value_heads={keys}")


_TRUSTED = (
    "model.trust_remote_code=true runs the Python files that come with {where!r}, with all rights of this process; "
    "layerif finds blocks and linear layers in them by their form, and no test has seen them"
)

# Ends of the names of classes whose files may hold everything but the head of a language model.
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}


class _readable:
    """Turns every error of the loaders into one that says what to do; files are the user's, whatever they raise."""

    def __init__(self, where: str, made: Literal["model", "tokenizer"] = "model") -> None:
        self.what = repr(where) if made == "model" else f"the tokenizer in {where!r}"
        self.made = made

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            raise ValueError(
                f"cannot load {self.what}: {_first_line(error)} "
                "(a folder: model=local model.path=/folder; a hub model: model=hub model.name=org/name, online, or "
                "downloaded before and with HF_HUB_OFFLINE=1, which waits for no network)"
            ) from error
        if isinstance(error, Exception) and not isinstance(error, MemoryError):
            raise ValueError(
                f"cannot load {self.what}: {_reason(error, self.made)}; supported are decoder-only language models "
                "in files that are whole, whose architecture this version of transformers holds itself, or whose own "
                "code you have read and trust (model.trust_remote_code=true)"
            ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _reason(error: Exception, made: str) -> str:
    """Words an error of a loader; the kind of error is left out where the text says enough."""
    if isinstance(error, StrictDataclassError):  # transformers' own check of a configuration; the cause stands last
        return str(error).strip().splitlines()[-1].partition(": ")[2].rstrip(".")
    said = _first_line(error)
    if isinstance(error, ValueError | ImportError | RuntimeError | SafetensorError):
        return said
    return f"config.json and files make no {made} ({type(error).__name__}: {said})"
