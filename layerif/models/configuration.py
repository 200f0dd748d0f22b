"""A model of which the configuration alone is at hand: no weights, no tokenizer. `method=plan` reads its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from layerif.files import hash_file
from layerif.models.pretrained import HubModel, LocalModel, Pretrained

_ALONE = (
    "model=configuration has no weights and no tokenizer, so only method=plan can use it; for all else use model=local "
    "model.path=/folder or model=hub model.name=org/name"
)


@dataclass(frozen=True, kw_only=True)
class Configuration(Pretrained):
    """The configuration of a model: `model=configuration model.path=/folder`, or `model.name=org/name` on the hub.

    Args:
        path: a folder with config.json; nothing else in it is read.
        name: a model on the hub, of which config.json alone is downloaded.
        revision: of that model.
    """

    path: str | None = None
    name: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (self.name is None):
            raise ValueError(
                "model=configuration needs one of model.path=/folder (with config.json) and model.name=org/name; got "
                f"{'neither' if self.path is None else 'both'}"
            )
        if self.adapter is not None:
            raise ValueError(f"model.adapter={self.adapter!r} has no weights to stand on; {_ALONE}")

    def location(self) -> tuple[str, str | None]:
        return self._source.location()

    def weights_hash(self) -> str:
        if isinstance(self._source, LocalModel):
            return hash_file(Path(self.location()[0], "config.json"))
        return self._source.weights_hash()

    def inputs(self) -> dict[str, str]:
        return {"configuration": self.weights_hash()}

    def check(self) -> None:
        self.layers()

    def load(self) -> NoReturn:
        raise ValueError(_ALONE)

    def tokenizer(self) -> Any:
        raise ValueError(_ALONE)

    @property
    def _source(self) -> Pretrained:
        if self.path is not None:
            return LocalModel(path=self.path)
        assert self.name is not None
        return HubModel(name=self.name, revision=self.revision)
