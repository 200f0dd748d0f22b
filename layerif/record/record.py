"""The record of one run: `record.json` with all that a rerun or a report needs, or `failure.json` if it failed."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import MinLen

from layerif import PACKAGE
from layerif.checks import is_finite, is_number
from layerif.files import parse_json, write_text
from layerif.layers import block_of, depths, kinds_of, within_block
from layerif.record.job import identity
from layerif.record.older import in_todays_shape

FILE = "record.json"
FAILURE = "failure.json"
LOSSES = ("loss", "loss_sum", "margin")  # metrics in nats, whose values of each row are kept
VERSION = 2  # raised when the shape of a record changes
_PACKAGES = ("layerif", "torch", "transformers", "peft", "lightning", "hydra-core", "numpy", "scipy")


@dataclass(kw_only=True)
class ScoresRecord:
    """One non-negative score per layer, and the meaning of a higher one (`undertrained` or `important`).

    The layers are blocks, or matrices where every matrix was scored by itself. `intervals` holds the bounds of each
    score's 95 % interval, if the estimator has them.
    """

    layers: list[str]
    values: list[float]
    higher_means: str
    intervals: list[tuple[float, float]] | None = None

    def by_block(self) -> dict[str, float]:
        """Returns the score of each block: the sum over its matrices where these were scored."""
        found: dict[str, float] = {}
        for layer, value in zip(self.layers, self.values, strict=True):
            block = block_of(layer) if within_block(layer) else layer
            found[block] = found.get(block, 0.0) + value
        return found


@dataclass(kw_only=True)
class AllocationRecord:
    """The values that the units (blocks or matrices) get, and the budget that they spend.

    `sizes` weights the budget where the kind needs it: the parameters of each unit for a sparsity or bits. `source`
    says what the values belong to, where they must not be spent elsewhere.
    """

    kind: str
    units: list[str]
    values: list[int] | list[float]
    budget: int | float
    sizes: list[int] | None = None
    source: dict[str, str] = field(default_factory=dict)

    @property
    def is_by_matrix(self) -> bool:
        """Tells if matrices have values of their own."""
        return any(within_block(unit) for unit in self.units)

    def by_block(self) -> dict[str, float]:
        """Returns the value of each block, in the order of the model: the mean of its units, weighted by `sizes`."""
        parts: dict[str, list[tuple[float, int]]] = {}
        for unit, value, size in zip(self.units, self.values, self.sizes or [1] * len(self.units), strict=True):
            parts.setdefault(block_of(unit), []).append((value, size))
        order = depths(list(parts))
        found = {}
        for block in sorted(parts, key=lambda name: order[name]):
            values, sizes = zip(*parts[block], strict=True)
            total = math.fsum(value * size for value, size in parts[block])
            found[block] = values[0] if len(values) == 1 else total / sum(sizes)
        return found

    def by_matrix(self) -> dict[str, dict[str, float]]:
        """Returns the value of each matrix, by its name inside the block and then by block, in the order of the model.

        A value of a whole block is that of its matrices without one of their own. A matrix without any is left out.
        """
        given = dict(zip(self.units, self.values, strict=True))
        found: dict[str, dict[str, float]] = {}
        blocks = list(self.by_block())
        for kind in kinds_of(self.units):
            found[kind] = {}
            for block in blocks:
                name = f"{block}.{kind}"
                while name and name not in given:
                    name = name.rpartition(".")[0]
                if name:
                    found[kind][block] = given[name]
        return found


@dataclass(kw_only=True)
class DecisionRecord:
    """The decision made before fine-tuning or pruning, and figures that say how far its scores can be trusted.

    Attributes:
        source: the origin of the scores, or of the allocation where there are none.
        allocation: the values that the units get.
        scores: None where the allocator looks at no scores.
        curves: a summary of the curves that were spent; None where scores were.
        reliability: Spearman's rank correlation of the scores of two disjoint halves of the samples.
        fidelity: where the measurement was not exact (projection, half precision), how well it ranks like an exact one.
        samples: the number of `train` and `validation` samples behind the scores.
        rows: the ids of the rows of these samples, by part.
    """

    source: str
    allocation: AllocationRecord
    scores: ScoresRecord | None = None
    curves: dict[str, Any] | None = None
    reliability: float | None = None
    fidelity: dict[str, float] | None = None
    samples: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)


@dataclass(kw_only=True)
class RunRecord:
    """One finished run. Metrics are fractions (0–1) or nats, seconds are wall clock.

    Attributes:
        version: of this shape. A record without one was written by 0.1.0, see `layerif.record.older`.
        choices: by group, the YAML of `conf/` that the run was composed from.
        config: the resolved configuration without incidental keys, see `layerif.record.job`.
        inputs: hashes of the content that the configuration only names (model, rows, files).
        decision: None where the method decides nothing.
        answers: by metric, whether each evaluated question was answered right, by its id. Paired tests use them.
        losses: by metric (`loss`, `loss_sum`, `margin`), the value of each evaluated row in nats, by its id. Paired
            tests use them, too.
        context_free: by metric, the value that token frequencies alone would reach on the same rows or text. A model
            beyond it has collapsed.
        parameters: total and trainable, and those of the model that a baseline of equal size is compared with.
        sparsity: the fraction of zeros in each pruned matrix, by name.
        formats: the number format of each quantised matrix, by name.
        ranks: the rank of each matrix, by name, where the fine-tuning itself moved ranks (EVA, AdaLoRA).
        recovery: how the pruned model was fine-tuned: its `method` and its `decision`.
        routing: the use of an evaluated LoRA-MoE's experts, by block with routers: `load` (the share of the tokens'
            assignments that each expert got) and `entropy` (of the routers, in nats). Both are means over
            the routers of the block and over the tokens. Of a mixed task also the same of each of its `tasks`, and
            `between_tasks`, see `layerif.moe.usage.between_tasks`, the mean over the routers in nats.
        selection: the train rows that `selection` took: their ids in `rows`, the first taken first, with their
            `values`, the `budget` in its `unit`, and the rows and tokens `taken` out of those there were (`of`).
        tokens: what `data.token_filter` did: the tokens `counted` before it and `kept`, and the `rows_left_out` that
            have none.
        training: the cost of fine-tuning, without validation and saving: `seconds_per_step` (the median) and
            `memory_gb`, the most memory that was taken: on a GPU that of the tensors (`memory_of` is `cuda`), elsewhere
            that of the whole process (`process`).
        tracking: where wandb has this run: the address of its page, or the name of its folder below `wandb/`.
        measurements: the requests to the store, see `layerif.probe.store.Store`.
        memory_gb: the most main memory that the process held.
        fingerprint: names the measurement; the store's files are called after it.
        notes: every departure and warning.
    """

    version: int = VERSION
    name: str
    seed: int
    choices: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any]
    overrides: list[str]
    inputs: Mapping[str, str] = field(default_factory=dict)
    decision: DecisionRecord | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, dict[str, bool]] = field(default_factory=dict)
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    context_free: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    sparsity: dict[str, float] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, dict[str, Any]] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    memory_gb: float = 0.0
    fingerprint: str = ""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: {name: _version(name) for name in _PACKAGES})
    git_sha: str | None = field(default_factory=lambda: _git_sha())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The identity of its job, see `layerif.record.job.identity`."""
        return identity(self.choices, self.config, self.inputs)

    @property
    def objective(self) -> float | None:
        """The figure that a search judges the job by; None where the configuration names none.

        It never depends on evaluated rows.

        Raises:
            ValueError: it is the reliability, and these scores have none.
        """
        wanted = self.config.get("objective")
        if wanted != "reliability":
            return self.metrics[wanted] if wanted else None
        if self.decision is None or self.decision.reliability is None:
            raise ValueError(
                "objective=reliability: these scores have none, because their evidence is not kept sample by sample, "
                "or half of it ranks nothing; use an estimator on gradients, such as datainf"
            )
        return self.decision.reliability

    def to_json(self) -> str:
        """Returns the content of `record.json`."""
        return _to_json(self)

    def write(self, folder: Path) -> Path:
        """Writes `record.json` whole or not at all, and removes an earlier failure from the folder."""
        file = _write(self, folder / FILE)
        (folder / FAILURE).unlink(missing_ok=True)
        return file

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Reads the record of a folder.

        Raises:
            ValueError: says why the file is not a record of layerif.
        """
        return _read(cls, folder / FILE, "record")


@dataclass(kw_only=True)
class Failure:
    """A job that ended in an error; name, seed, choices, config and overrides are those of `RunRecord`.

    Attributes:
        error: the message in one line.
        traceback: shows where it was raised.
    """

    name: str
    seed: int
    config: Mapping[str, Any]
    overrides: list[str]
    error: str
    traceback: str
    choices: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The identity of its job without `inputs`, which a failed job may not have read."""
        return identity(self.choices, self.config)

    def write(self, folder: Path) -> Path:
        """Writes `failure.json` whole or not at all; the record of an earlier run stays in the folder."""
        return _write(self, folder / FAILURE)

    @classmethod
    def read(cls, folder: Path) -> Failure:
        """Reads the failure of a folder.

        Raises:
            ValueError: says why the file is not a failure of layerif.
        """
        return _read(cls, folder / FAILURE, "failure")


Job = RunRecord | Failure
_Job = TypeVar("_Job", RunRecord, Failure)


@dataclass
class _Usage:
    load: Annotated[list[float], MinLen(1)]
    entropy: float


@dataclass
class _Measured:
    kind: str
    reused: bool
    seconds: float | None


@dataclass
class _Within:
    """The structure that readers expect within those fields of a record that are not empty."""

    routing: dict[str, _Usage] | None = None
    measurements: list[_Measured] | None = None


def _read(kind: type[_Job], file: Path, what: str) -> _Job:
    try:
        content = in_todays_shape(parse_json(file.read_text(encoding="utf-8")))
        _check_keys(kind, content)
        _check_finite(content)
        job = _checker(kind).validate_json(json.dumps(content), strict=True)
        _checker(_Within).validate_json(
            json.dumps({key: value for key, value in content.items() if value}), strict=True
        )
        _check_lengths(job)
        _check_metrics(job)
    except json.JSONDecodeError as error:
        why = f"{error}; if its job was killed while writing, run that again, or delete the file"
    except OSError as error:
        why = f"{error.strerror}; check the path and its permissions"
    except ValueError as error:
        why = f"{_first_problem(error)}; is it another program's file? Move it elsewhere, or run its job again"
    else:
        return job
    raise ValueError(f"{file} is not a readable {what} of layerif: {why}")


def _check_keys(kind: type, content: object) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    if unknown := sorted(content.keys() - {known.name for known in fields(kind)}):
        raise ValueError(f"unknown key {unknown[0]!r}")


def _check_finite(node: Any, where: str = "") -> None:
    """Refuses NaN, infinity, and whole numbers that are too large to calculate with."""
    if isinstance(node, float | int) and not is_finite(node):
        raise ValueError(f"{where}={str(node)[:40]}: input should be a finite number")
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        if not isinstance(value, str | bool | None):
            _check_finite(value, f"{where}.{key}".lstrip("."))


def _check_metrics(job: Job) -> None:
    """Refuses a metric that the report could not average or draw: an accuracy is a fraction, a perplexity positive."""
    if isinstance(job, Failure):
        return
    for name, value in job.metrics.items():
        last = name.rpartition("/")[2]
        is_share, is_perplexity = (word in last for word in ("accuracy", "perplexity"))
        is_averaged = is_share or is_perplexity or last in LOSSES or name.startswith("lm_eval/")
        if is_averaged and not is_number(value):
            raise ValueError(f"metrics.{name}={str(value)[:40]!r}: input should be a number")
        if is_share and not 0 <= value <= 1:
            raise ValueError(f"metrics.{name}={value}: input should be a fraction from 0 to 1")
        if is_perplexity and value <= 0:
            raise ValueError(f"metrics.{name}={value}: input should be above 0")
        of_interval = re.fullmatch(r"(.*accuracy)_(?:low|high)", name)
        if of_interval and of_interval[1] not in job.metrics:
            raise ValueError(f"it lacks metrics.{of_interval[1]}")


def _check_lengths(job: Job) -> None:
    if isinstance(job, Failure) or job.decision is None:
        return
    given, scores = job.decision.allocation, job.decision.scores
    counted: dict[str, tuple[Sequence, Sequence[str]]] = {"decision.allocation.values": (given.values, given.units)}
    if given.sizes is not None:
        counted["decision.allocation.sizes"] = given.sizes, given.units
        if (least := min(given.sizes, default=1)) < 1:
            raise ValueError(f"decision.allocation.sizes holds {least}: input should be at least 1")
    if scores:
        counted["decision.scores.values"] = scores.values, scores.layers
        if scores.intervals is not None:
            counted["decision.scores.intervals"] = scores.intervals, scores.layers
    for key, (values, names) in counted.items():
        if len(values) != len(names):
            raise ValueError(f"{key} has {len(values)} numbers for {len(names)} names")


@cache
def _checker(kind: type) -> Any:
    from pydantic import TypeAdapter  # its import takes a moment, which `layerif --help` does not pay

    return TypeAdapter(kind)


def _first_problem(error: ValueError) -> str:
    """Words pydantic's first problem: the key, its value, and the reason."""
    if not hasattr(error, "errors"):
        return str(error)
    first: Any = error.errors()[0]  # type: ignore[attr-defined]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"it lacks {where}"
    return f"{where}={str(first['input'])[:40]!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _write(content: Job, file: Path) -> Path:
    write_text(file, _to_json(content))
    return file


def _to_json(content: Job) -> str:
    return json.dumps(asdict(content), indent=1, allow_nan=False) + "\n"


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@cache  # cached, because the code may change on disk after this process loaded it
def _git_sha() -> str | None:
    """Returns the commit of the running code, with `-dirty` if it was changed; None for an installed package."""
    folder = PACKAGE
    if "site-packages" in folder.parts:  # git would find the commit of some other project there
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
