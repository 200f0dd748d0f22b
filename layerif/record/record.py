"""What happened in one run: `record.json`, enough to rerun it and to report from it; of a failed one `failure.json`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from layerif import PACKAGE
from layerif.files import whole
from layerif.record.job import identity

FILE = "record.json"
FAILURE = "failure.json"
_PACKAGES = ("layerif", "torch", "transformers", "peft", "lightning", "hydra-core", "numpy", "scipy")


@dataclass(kw_only=True)
class RunRecord:
    """One finished run. Metrics are fractions (0–1), seconds are wall clock, layers are block names in order.

    choices: by group, the YAML of `conf/` it was composed from. inputs: hashes of what the configuration only names
    (model, rows, files). samples: (train, validation) behind the
    scores. scores: one non-negative number per layer, none where the allocation needs none; higher_means, source: what
    a higher one means and where they are from; reliability: how well two disjoint halves of the samples agree on them
    (Spearman); fidelity: where the measurement was not exact (projection, half precision), how well it ranks like one
    that is, see `layerif.decide.Decision`. allocation: kind, budget, values. questions: by metric, whether each
    evaluated question was answered right, by its id, for paired tests. parameters: total and trainable, and of what a
    baseline of equal size is compared with. sparsity: the fraction of zeros in each pruned matrix, by name; recovery:
    how the pruned model was fine-tuned, the experts it got, and the `layerif.decide.Decision` behind them. routing: of
    an evaluated LoRA-MoE, by block with routers, `load` (share of the tokens' assignments each expert got) and
    `entropy` (of the routers, in nats), means over the routers of the block and the tokens that evaluation ran.
    tracking: where wandb has this run (the address of its page, or the name of its folder below `wandb/`).
    measurements: what was asked of the store, see `layerif.probe.store.Store`. memory_gb: peak of the process in main memory.
    notes: every departure and warning.
    """

    name: str
    seed: int
    config: Mapping[str, Any]
    overrides: list[str]
    choices: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    samples: dict[str, int] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    higher_means: str = ""
    source: str = ""
    reliability: float | None = None
    fidelity: dict[str, float] | None = None
    allocation: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    questions: dict[str, dict[str, bool]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    sparsity: dict[str, float] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, dict[str, Any]] = field(default_factory=dict)
    tracking: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    memory_gb: float = 0.0
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: {name: _version(name) for name in _PACKAGES})
    git_sha: str | None = field(default_factory=lambda: _git_sha())

    @property
    def identity(self) -> dict[str, Any]:
        """What the record of the same job has equal."""
        return identity(self.choices, self.config, self.inputs)

    @property
    def objective(self) -> float | None:
        """What a search judges the job by, where its configuration says so; none of it is of evaluated rows."""
        wanted = self.config.get("objective")
        if wanted != "reliability":
            return self.metrics[wanted] if wanted else None
        if self.reliability is None:
            raise ValueError(
                "objective=reliability: these scores have none, for their evidence is not kept sample by sample, or a "
                "half of it ranks nothing; use an estimator on gradients, such as datainf"
            )
        return self.reliability

    def write(self, folder: Path) -> Path:
        """Write `record.json` whole or not at all; a failure of the same folder is past then."""
        file = _write(self, folder / FILE)
        (folder / FAILURE).unlink(missing_ok=True)
        return file

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Raises ValueError for a file that is no record of ours, saying what is wrong with it."""
        return _read(cls, folder / FILE, "record")


@dataclass(kw_only=True)
class Failure:
    """A job that ended in an error; name, seed, choices, config and overrides as in `RunRecord`.

    error: what there is to say of it, in one line. traceback: where it was raised.
    """

    name: str
    seed: int
    config: Mapping[str, Any]
    overrides: list[str]
    error: str
    traceback: str
    choices: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What a failure of the same job has equal."""
        return identity(self.choices, self.config)

    def write(self, folder: Path) -> Path:
        """Write `failure.json` whole or not at all; a record of an earlier run of the folder stays."""
        return _write(self, folder / FAILURE)

    @classmethod
    def read(cls, folder: Path) -> Failure:
        """Raises ValueError for a file that is no failure of ours, saying what is wrong with it."""
        return _read(cls, folder / FAILURE, "failure")


Job = TypeVar("Job", RunRecord, Failure)


@dataclass
class _Allocation:
    kind: str
    values: list[float]
    budget: float


@dataclass
class _Usage:
    load: list[float]
    entropy: float


@dataclass
class _Measured:
    kind: str
    reused: bool
    seconds: float | None


@dataclass
class _Within:
    """What readers take for granted within a record's fields, where these are not empty."""

    allocation: _Allocation | None = None
    routing: dict[str, _Usage] | None = None
    measurements: list[_Measured] | None = None


def _read(kind: type[Job], file: Path, what: str) -> Job:
    try:
        text = file.read_text()
        content = json.loads(text)
        _check_keys(kind, content)
        job = _checker(kind).validate_json(text, strict=True)
        _checker(_Within).validate_json(
            json.dumps({key: value for key, value in content.items() if value}), strict=True
        )
        _check_lengths(job)
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


def _check_lengths(job: RunRecord | Failure) -> None:
    if isinstance(job, Failure):
        return
    for key, values in (("scores", job.scores), ("allocation.values", job.allocation.get("values", ()))):
        if len(values) not in (0, len(job.layers)):
            raise ValueError(f"{key} has {len(values)} numbers for {len(job.layers)} layers")


@cache
def _checker(kind: type) -> Any:
    from pydantic import TypeAdapter  # a moment that `layerif --help` does not pay

    return TypeAdapter(kind)


def _first_problem(error: ValueError) -> str:
    """Of pydantic's: where, what, and what stands there."""
    if not hasattr(error, "errors"):
        return str(error)
    first: Any = error.errors()[0]  # type: ignore[attr-defined]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"it lacks {where}"
    return f"{where}={str(first['input'])[:40]!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _write(content: RunRecord | Failure, file: Path) -> Path:
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps(asdict(content), indent=1, allow_nan=False) + "\n")
    return file


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@cache  # of the code as this process loaded it, not as it may have become since
def _git_sha() -> str | None:
    """The commit of the code that runs, with `-dirty` where it was changed; None for an installed package."""
    folder = PACKAGE
    if "site-packages" in folder.parts:  # a commit found from there would be of some other project
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
