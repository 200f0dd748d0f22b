"""`method=quantise`: decide, quantise every matrix to the format that takes its bits, write it, and evaluate."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeGuard

import pandas as pd
from torch import nn

from layerif.allocate.allocation import Allocation
from layerif.allocate.bits import Bits
from layerif.app.methods._steps import (
    check_bare,
    check_calibration_apart,
    evaluate,
    evaluate_before,
    loader,
    record_decision,
    record_rise,
    watched_text,
)
from layerif.app.setup import Setup
from layerif.checks import check_choice, check_fields, require
from layerif.compress.gguf import gguf_names, why_no_gguf, write_gguf
from layerif.compress.quantise import (
    Rounded,
    bits_of,
    config_groups,
    embeddings_of,
    formats_of_matrices,
    quantise,
    tensor_types,
)
from layerif.decide import Decider
from layerif.estimators.bits_curve import BitsCurve
from layerif.files import full_disk_explained, write_text
from layerif.formats import FORMATS, Format, check_rows, formats_called
from layerif.layers import is_expert
from layerif.models.blocks import bare
from layerif.probe.curves.formats import check_widths, kept_formats, left_out
from layerif.probe.curves.request import model_hash
from layerif.probe.curves.text import mean_loss
from layerif.probe.measurements import Load
from layerif.pruning.calibration import Calibration
from layerif.pruning.source import check_source
from layerif.record.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Quantise:
    """Quantises every matrix to the number format whose bits its allocation says.

    A run leaves `formats.csv`, and where they can be written `model.gguf`, `tensor_types.txt` and `config_groups.json`.

    Attributes:
        formats: `gguf` (those that the package `gguf` writes), `all` (with ours of round-to-nearest), or their names.
        calibration: the text whose loss the curves watch.
        embeddings: the format of embedding and head; None: they stay as they are. The budget does not count them.
        save: write the files beside `formats.csv`.
        dense: also measure the perplexity of the model as it was, where perplexity is measured at all.
    """

    name: ClassVar[str] = "quantise"
    allocates: ClassVar[Literal["bits"]] = "bits"
    evaluates: ClassVar[bool] = True
    further_metrics: ClassVar[tuple[str, ...]] = ("perplexity",)
    selects_rows: ClassVar[bool] = False
    takes_parts: ClassVar[bool] = False
    fine_tunes: ClassVar[bool] = False

    formats: str | Sequence[str] = "gguf"
    calibration: Calibration
    embeddings: str | None = None
    save: bool = True
    dense: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "method")
        formats_called(self.formats, "method.formats")
        if self.embeddings is not None:
            check_choice("method.embeddings", self.embeddings, FORMATS)

    def check(self, setup: Setup) -> None:
        check_bare(setup, "quantising")
        decider, formats = setup.decider, formats_called(self.formats)
        wanted = [*formats, *([FORMATS[self.embeddings]] if self.embeddings else [])]
        if any(each.is_gguf for each in wanted):
            require("gguf", "embedded")
        for where, each in (("estimator", decider.estimator), ("allocator", decider.allocator)):
            others = (
                [one.name for one in formats_called(each.formats) if one not in formats] if _has_formats(each) else []
            )
            if others:
                raise ValueError(
                    f"{where}.formats has {', '.join(others)}, which method.formats={self.formats} does not have; give "
                    f"method.formats alone, which {where}.formats follows"
                )
        check_widths(decider, formats)
        allocation = decider.preview()
        formats_of_matrices(decider.layers(), allocation.by_name(), formats)
        self._check_source(allocation, decider)
        if self.embeddings is not None:
            ends = embeddings_of(setup.model.skeleton())
            check_rows([FORMATS[self.embeddings]], {name: weight.shape[1] for name, weight in ends.items()})
        if decider.reads_windows:
            check_calibration_apart(setup, self.calibration)

    def preview(self, setup: Setup) -> dict[str, str]:
        layers, names = setup.decider.layers(), ", ".join(each.name for each in formats_called(self.formats))
        return {"quantise": f"{len(layers.matrices)} matrices of {sum(layers.numel):,} parameters together to {names}"}

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        load = loader(setup)
        evaluate_before(load, setup, record, dense=self.dense)
        decision = self._decider(setup.decider, load, record)(load)
        record_decision(decision, record)
        self._check_source(decision.allocation, setup.decider)
        chosen = formats_of_matrices(
            setup.decider.layers(), decision.allocation.by_name(), formats_called(self.formats)
        )
        model, watched = load(), watched_text(setup)
        dense = None if watched is None else mean_loss(model, watched)
        start = time.perf_counter()
        ends = embeddings_of(model) if self.embeddings else {}
        everything = chosen | dict.fromkeys(ends, FORMATS[self.embeddings or "Q8_0"])
        if self.save:
            self._write(model, setup, everything, record, folder)
        found = quantise(model, everything)
        record.seconds["quantise"] = time.perf_counter() - start
        _record_formats(model, chosen, everything, found, record, folder)
        if watched is not None and dense is not None:
            record_rise(record, dense, mean_loss(model, watched))
        evaluate(model, setup, record)

    def _decider(self, decider: Decider, load: Load, record: RunRecord) -> Decider:
        """Gives the decider that prices and spends no format that gives the model back as it was.

        Raises:
            ValueError: no format is left, or the target lies outside those that are.
        """
        if decider.allocator.spends == "nothing":
            return decider
        for where in ("estimator", "allocator"):
            each: Any = getattr(decider, where)
            if _has_formats(each):
                formats = formats_called(each.formats)
                kept = kept_formats(decider, formats, load)
                record.notes.extend(left_out(formats, kept))
                decider = replace(decider, **{where: replace(each, formats=[one.name for one in kept])})
        decider.preview()
        return decider

    def _check_source(self, allocation: Allocation, decider: Decider) -> None:
        """Refuses an allocation by curves of another model, or of other formats of the same bits."""
        source = allocation.source
        if source and decider.allocator.spends != "curves":
            check_source(source, {"model": model_hash(decider.model)})
        spent = formats_of_matrices(decider.layers(), allocation.by_name(), formats_called(self.formats))
        names = {each.name for each in spent.values()}
        if "formats" in source and (others := names - {*source["formats"].split(", ")}):
            raise ValueError(
                f"the allocation was made by curves of the formats {source['formats']}, and method.formats would spend "
                f"{', '.join(sorted(others))} in place of one of them; give those formats in method.formats"
            )

    def _write(
        self, model: nn.Module, setup: Setup, chosen: Mapping[str, Format], record: RunRecord, folder: Path
    ) -> None:
        """Writes the GGUF file and the texts for other quantisers, or says in a note why not."""
        linear = {name: each for name, each in chosen.items() if name in setup.decider.layers().matrices}
        if experts := [name for name in linear if is_expert(name)]:
            linear = {name: each for name, each in linear.items() if name not in {*experts}}
            record.notes.append(
                f"config_groups.json leaves out {len(experts)} matrices of fused experts, whose names no engine knows"
            )
        write_text(folder / "config_groups.json", json.dumps(config_groups(linear), indent=1) + "\n")
        config: Any = bare(model).config
        if why := why_no_gguf(config, list(chosen.values())):
            record.notes.append(f"no GGUF file was written: {why}")
            return
        write_text(folder / "tensor_types.txt", tensor_types(chosen, gguf_names(config, list(chosen))))
        name = Path(setup.model.location()[0]).name
        with full_disk_explained(f"the GGUF file to {folder}", "free some space, or use method.save=false"):
            why = write_gguf(model, setup.tokenizer, chosen, folder / "model.gguf", name=name)
        if why:
            record.notes.append(f"the GGUF file has no tokenizer: {why}; transformers reads its weights all the same")


def _has_formats(choice: Any) -> TypeGuard[Bits | BitsCurve]:
    """Tells if an estimator or an allocator has formats of its own."""
    return isinstance(choice, Bits | BitsCurve)


def _record_formats(
    model: nn.Module,
    chosen: Mapping[str, Format],
    everything: Mapping[str, Format],
    found: Mapping[str, Rounded],
    record: RunRecord,
    folder: Path,
) -> None:
    """Writes format, bits and error of every weight to `formats.csv`, and the true mean bits to the record."""
    rows = [
        {
            "matrix": param.removesuffix(".weight"),
            "parameters": found[param].numel,
            "format": each.name,
            "bits": each.bits,
            "error": found[param].error,
        }
        for param, each in everything.items()
    ]
    pd.DataFrame(rows).to_csv(folder / "formats.csv", index=False)
    record.formats = {str(row["matrix"]): str(row["format"]) for row in rows}
    numel = {param: each.numel for param, each in found.items()}
    record.metrics["bits"] = bits_of(chosen, numel)
    if len(everything) > len(chosen):
        record.metrics["bits_with_embeddings"] = bits_of(everything, numel)
    total = sum(parameter.numel() for parameter in model.parameters())
    record.parameters = {"total": total, "quantised": sum(numel.values())}
