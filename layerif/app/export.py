"""`layerif-export`: hands a finished run over to other programs, with a model card.

Nothing heavy is imported before the arguments are checked, because `layerif-export --help` must answer at once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerif.checks import check_choice
from layerif.compress.outcome import EXPORTS, Outcome, check_form, outcome_of, refusals
from layerif.files import check_yaml, full_disk_explained, whole, write_text
from layerif.record.record import FAILURE, FILE, RunRecord

if TYPE_CHECKING:
    from layerif.compress.card import Base
    from layerif.formats import Format
    from layerif.models.pretrained import Pretrained

_CONFIG = Path(".hydra", "config.yaml")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; None takes the arguments from the command line."""
    given = _parser().parse_args(arguments)
    into = given.into or given.run / "export" / given.to
    try:
        export(given.run, given.to, into)
    except (ValueError, OSError) as error:
        print(f"layerif-export: {error}", file=sys.stderr)
        sys.exit(1)
    print(into)


def export(run: Path, form: str, into: Path) -> None:
    """Writes a run in a form that other programs read, with its model card, as a whole or not at all.

    Args:
        run: the folder of the run.
        form: one of `EXPORTS`.
        into: a folder that is not there yet, or empty.

    Raises:
        ValueError: the folder is not of a finished run, the form does not fit it, or its model has changed since.
    """
    check_choice("--to", form, EXPORTS)
    record = _record_of(run)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ValueError(f"{str(into)!r} is there already; name a new folder with --into")
    outcome = outcome_of(record, run)
    found = refusals(outcome)
    if "gguf" in found:  # nothing fits, whatever the kind of model
        check_form(form, outcome, found)
    hand_over = HandOver(record=record, outcome=outcome, model=_model_of(run))
    check_form(form, outcome, found | hand_over.without_gguf())
    hand_over.check_unchanged()
    into.parent.mkdir(parents=True, exist_ok=True)
    advice = "free some space, or name another folder with --into"
    with full_disk_explained(f"--to {form} to {into}", advice), whole(into) as unfinished:
        unfinished.mkdir()
        hand_over.write(form, unfinished)


@dataclass(frozen=True, kw_only=True)
class HandOver:
    """A finished run with its model.

    Attributes:
        record: of the run.
        outcome: what the run left.
        model: the run's own model.
    """

    record: RunRecord
    outcome: Outcome
    model: Pretrained

    @cached_property
    def source(self) -> Pretrained:
        """The model that is handed over: the one that the run left, with its adapter, or the one it started from."""
        from layerif.models.pretrained import LocalModel

        if self.outcome.model is None:
            found = self.model
        else:
            names = ("dtype", "attention", "trust_remote_code")
            settings: dict[str, Any] = {name: getattr(self.model, name) for name in names}
            found = LocalModel(path=str(self.outcome.model), **settings)
        return replace(found, adapter=str(self.outcome.adapter)) if self.outcome.adapter else found

    @cached_property
    def formats(self) -> dict[str, Format]:
        """The format of each quantised weight, by parameter name."""
        from layerif.formats import FORMATS

        return {f"{matrix}.weight": FORMATS[name] for matrix, name in self.outcome.formats.items()}

    def without_gguf(self) -> dict[str, str]:
        """Says why the forms of GGUF do not fit the kind of model; empty where they do."""
        from layerif.compress.gguf import why_no_gguf

        why = why_no_gguf(self.source.skeleton().config, list(self.formats.values()))
        return {} if why is None else {"gguf": why, "gguf-types": why}

    def check_unchanged(self) -> None:
        """Refuses a base model whose weights are not those of the run any more.

        Raises:
            ValueError: names the model.
        """
        then = self.record.inputs.get("weights")
        if self.outcome.model is None and then is not None and self.model.weights_hash() != then:
            raise ValueError(
                f"the weights of {self.model.location()[0]!r} have changed since the run, and what it left belongs to "
                "those of then; put them back, or run the job again"
            )

    def write(self, form: str, folder: Path) -> None:
        """Writes one form and the card into a folder."""
        from layerif.compress.card import card

        base = self._base()
        writers = {
            "merged": self._write_merged,
            "peft": self._write_peft,
            "gguf": self._write_gguf,
            "gguf-types": self._write_types,
            "compressor": self._write_groups,
        }
        remarks = writers[form](folder)
        title = f"{Path(base.name).name} after method={self.outcome.method}"
        write_text(folder / "README.md", card(self.record, base, form, name=title, remarks=remarks))

    def _base(self) -> Base:
        from layerif.compress.card import Base
        from layerif.models.embedded import EmbeddedModel
        from layerif.models.licence import licence_of

        where, revision = self.model.location()
        is_local = Path(where).is_dir()
        name = Path(self.model.file).stem if isinstance(self.model, EmbeddedModel) else where
        return Base(
            name=Path(name).name if is_local else name,
            is_on_hub=not is_local,
            licence=licence_of(self.model),
            revision=revision,
        )

    def _write_merged(self, folder: Path) -> list[str]:
        from layerif.compress.export import merged

        if self.outcome.adapter is None:
            assert self.outcome.model is not None
            shutil.copytree(self.outcome.model, folder, dirs_exist_ok=True)
            return []
        model: Any = merged(self._loaded())
        model.save_pretrained(folder)
        self.source.tokenizer().save_pretrained(folder)
        return []

    def _write_peft(self, folder: Path) -> list[str]:
        from layerif.compress.export import write_plain_adapter

        assert self.outcome.adapter is not None
        config = write_plain_adapter(self.outcome.adapter, folder)
        remarks = [
            f"Every tensor has the rank r = {config.r}, padded with zeros where the run gave it less, and "
            f"α/r = {config.lora_alpha / config.r:g}."
        ]
        if scheme := self.outcome.quantised:
            remarks.append(f"The adapter was trained on the base quantised to {scheme}; load the base like that.")
        return remarks

    def _write_gguf(self, folder: Path) -> list[str]:
        from layerif.compress.export import merged
        from layerif.compress.gguf import write_gguf

        model, name = merged(self._loaded()), self._base().name
        why = write_gguf(model, self.source.tokenizer(), self.formats, folder / "model.gguf", name=name)
        return [] if why is None else [f"The file has no tokenizer: {why}. Use that of the base model."]

    def _write_types(self, folder: Path) -> list[str]:
        from layerif.compress.gguf import gguf_names
        from layerif.compress.quantise import tensor_types

        names = gguf_names(self.source.skeleton().config, list(self.formats))
        write_text(folder / "tensor_types.txt", tensor_types(self.formats, names))
        return []

    def _write_groups(self, folder: Path) -> list[str]:
        from layerif.compress.quantise import config_groups

        linear = {param: self.formats[param] for param in self.source.layers().matrices if param in self.formats}
        write_text(folder / "config_groups.json", json.dumps(config_groups(linear), indent=1) + "\n")
        return []

    def _loaded(self) -> Any:
        import layerif.moe  # noqa: F401 - so that PEFT knows a LoRA-MoE of one expert each

        return self.source.load()


def _record_of(run: Path) -> RunRecord:
    if not run.is_dir():
        raise ValueError(f"{str(run)!r} is not a folder; give that of a finished run, which has a {FILE}")
    if not (run / FILE).is_file():
        below = next(iter(sorted(run.glob(f"*/{FILE}"))), None)
        meant = f" (did you mean {str(below.parent)!r}?)" if below else ""
        why = "its run failed" if (run / FAILURE).is_file() else f"it has no {FILE}"
        raise ValueError(f"{str(run)!r} is not the folder of a finished run, {why}{meant}; give one that is")
    return RunRecord.read(run)


def _model_of(run: Path) -> Pretrained:
    """Makes the model that the run started from, by the configuration that Hydra kept."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from layerif.app.resolvers import register_resolvers
    from layerif.app.schema import check_nodes
    from layerif.targets import build

    file = run / _CONFIG
    if not file.is_file():
        raise ValueError(f"{file} is missing, which says what model the run had; give the folder as the run left it")
    check_yaml(file)
    register_resolvers()
    config = OmegaConf.load(file)
    found = OmegaConf.select(config, "model") if isinstance(config, DictConfig) else None
    if not isinstance(found, DictConfig) or "_target_" not in found:
        raise ValueError(f"{file} names no model with a _target_; give the folder as the run left it")
    try:
        settings: Any = OmegaConf.to_container(found, resolve=True)
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{file} cannot be resolved: {said}; give the folder as the run left it") from error
    check_nodes({"model": settings})
    return build(settings, "model")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="layerif-export", description="Hand a finished run over to other programs, with a model card."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    parser.add_argument("--to", required=True, metavar="FORM", help=f"one of {', '.join(EXPORTS)}")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="where to write (RUN/export/FORM)")
    return parser


if __name__ == "__main__":
    main()
