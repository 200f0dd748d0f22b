"""The content of loggers besides training curves: configuration, layers, metrics, answers, routing, artifacts.

`record.json` and the tables beside it hold everything already, so `logger=csv` adds the curves alone. TensorBoard and
wandb get all of it under every method, from the record as it stands when the run ends or fails.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, singledispatch
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from layerif.compat import wandb_init
from layerif.record.frames import frames, numbers, routing_rows
from layerif.record.plots import plots_of_run
from layerif.record.record import RunRecord
from layerif.record.text import markdown

ROUTING = "routing.csv"
StoredFiles = Callable[[str], Sequence[Path]]  # the files of a measurement, by its fingerprint


class Wandb(WandbLogger):
    """Lightning's logger for wandb, named after the run's folder, with the tables and artifacts of `tracked`.

    Args:
        save_dir: the run's folder.
        project: of wandb.
        group: of wandb; the runs of a sweep share one.
        mode: `offline` writes below the run's folder, for `wandb sync`; `online` needs a key (`wandb login`, or
            WANDB_API_KEY) and a network; `disabled` does nothing.
        fallback: for an online run that cannot start, which shows before any work. None stops with a message,
            `offline` goes on with a warning.
        artifacts: also keeps the measured Grams (or other evidence), the adapter and sparsity.csv. They are uploaded
            from where they lie.
        **init: further arguments of `wandb.init`; by default wandb prints nothing itself.
    """

    def __init__(
        self,
        *,
        save_dir: str,
        project: str = "layerif",
        group: str | None = None,
        mode: Literal["online", "offline", "disabled"] = "offline",
        fallback: Literal["offline"] | None = None,
        artifacts: bool = True,
        **init: Any,
    ) -> None:
        try:
            import wandb

            init.setdefault("settings", wandb.Settings(silent=True))  # it prints sixty lines a run
            super().__init__(
                **{"name": Path(save_dir).name, "save_dir": save_dir, "project": project, "group": group, "mode": mode},
                **init,
            )
        except ModuleNotFoundError as error:
            raise ValueError(f"logger=wandb needs the package wandb ({error}): pip install 'layerif[wandb]'") from error
        wandb_init(self).pop("anonymous", None)  # wandb warns of it, even where it is not set
        self.fallback, self.artifacts = fallback, artifacts

    def start(self) -> str | None:
        """Starts the run.

        Returns:
            The address of its page, or the name of its folder; None where wandb is disabled.

        Raises:
            ValueError: wandb cannot start, and there is no fallback.
        """
        from wandb.errors import Error

        mode = wandb_init(self)["mode"]
        try:
            run = self.experiment
        except (Error, TimeoutError) as error:
            why = f"wandb cannot start in mode {mode} ({' '.join(str(error).split())})"
            if self.fallback is None or mode != "online":
                raise ValueError(
                    f"{why}; log in with `wandb login` or WANDB_API_KEY and check the network, write to the run's "
                    "folder with logger.wandb.mode=offline, or allow that with logger.wandb.fallback=offline"
                ) from error
            warnings.warn(f"{why}; it is offline now, and `wandb sync` uploads it later", RuntimeWarning, stacklevel=2)
            wandb_init(self)["mode"] = mode = self.fallback
            run = self.experiment
        if mode == "disabled":
            return None
        return run.url if mode == "online" else Path(run.dir).parent.name


@contextmanager
def tracked(loggers: Sequence[Logger], record: RunRecord, folder: Path, files: StoredFiles) -> Iterator[None]:
    """Gives all loggers the configuration and, on leaving, the record as it stands then.

    Leaving by an error or Ctrl-C counts, too. Every logger is closed in the end, wandb's run with the exit code of the
    process. A logger that fails on leaving gives a warning, because the run's result does not depend on it.

    Args:
        loggers: of this run.
        record: filled in while the run goes on.
        folder: of the run.
        files: finds what the store holds under a fingerprint, see `layerif.probe.store.Store.files`.
    """
    if rank_zero_only.rank > 0:
        yield
        return
    exit_code, started = 1, []
    try:
        for logger in loggers:
            _start(logger, record)
            started.append(logger)
        yield
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = 130
        raise
    finally:
        for logger in started:
            for leave in (partial(_write, logger, record, folder, files), partial(_finish, logger, exit_code)):
                try:
                    leave()
                except Exception as error:
                    said = f"{type(logger).__name__} did not get everything: {error}"
                    warnings.warn(said, RuntimeWarning, stacklevel=1)


def log_routing(loggers: Sequence[Logger], routing: Mapping[str, Mapping[str, Any]], step: int) -> None:
    """Logs `load/<block>/<expert>` and `entropy/<block>`; the csv logger gets a file of its own, one row a block."""
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            _append_routing(Path(logger.log_dir, ROUTING), routing, step)
        else:
            entropies = {f"entropy/{block}": usage["entropy"] for block, usage in routing.items()}
            loads = {
                f"load/{block}/{expert}": load
                for block, usage in routing.items()
                for expert, load in enumerate(usage["load"])
            }
            logger.log_metrics({**loads, **entropies}, step)


def log_again(loggers: Sequence[Logger], rows: Sequence[Mapping[str, Any]]) -> None:
    """Logs the rows that `layerif.adapt.progress.TrainingCurves` kept from an earlier process."""
    for row in rows:
        if "routing" in row:
            log_routing(loggers, row["routing"], row["step"])
        else:
            for logger in loggers:
                logger.log_metrics(dict(row["metrics"]), row["step"])
    for logger in loggers:
        logger.save()


@singledispatch
def _start(logger: Logger, record: RunRecord) -> None:
    """Gives a logger the configuration."""
    logger.log_hyperparams(dict(record.config))


@_start.register(Wandb)
def _start_wandb(logger: Wandb, record: RunRecord) -> None:
    if place := logger.start():
        record.tracking["wandb"] = place
    logger.log_hyperparams(dict(record.config))


@_start.register(CSVLogger)
def _start_csv(logger: CSVLogger, record: RunRecord) -> None:
    Path(logger.log_dir, ROUTING).unlink(missing_ok=True)  # as Lightning does with metrics.csv
    logger.log_hyperparams(dict(record.config))


def _finish(logger: Logger, exit_code: int) -> None:
    logger.finalize("success" if exit_code == 0 else "failed")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=exit_code)


@singledispatch
def _write(logger: Logger, record: RunRecord, folder: Path, files: StoredFiles) -> None:
    """Gives a logger the content of a record; nothing here for loggers of curves alone."""


@_write.register(TensorBoardLogger)
def _write_tensorboard(logger: TensorBoardLogger, record: RunRecord, folder: Path, files: StoredFiles) -> None:
    writer = logger.experiment
    for name, frame in frames(record).items():
        writer.add_text(name, markdown(frame, spell=str))
    for name, plot in plots_of_run(record).items():
        writer.add_figure(name, plot.figure)
    logger.log_hyperparams(dict(record.config), numbers(record.metrics))


@_write.register(Wandb)
def _write_wandb(logger: Wandb, record: RunRecord, folder: Path, files: StoredFiles) -> None:
    import wandb

    run: Any = logger.experiment
    found = frames(record)
    shown: dict[str, Any] = {name: wandb.Table(dataframe=frame) for name, frame in found.items()}
    if record.decision is not None:
        scores = record.decision.scores
        titles = {} if scores is None else {"score": f"score (higher: {scores.higher_means})"}
        layers = found["layers"]
        for column in layers.columns.drop(["depth", "layer", "matrix"], errors="ignore"):
            title = titles.get(column, f"allocated {column}")
            line_of = "matrix" if "matrix" in layers and column not in titles else None  # a block has one score
            table = wandb.Table(dataframe=layers)
            shown[f"layers/{column}"] = wandb.plot.line(table, "depth", column, stroke=line_of, title=title)
    if shown:
        run.log(shown)
    run.summary.update(numbers(record.metrics) | {f"seconds/{name}": value for name, value in record.seconds.items()})
    if logger.artifacts:
        for kind, name, path in _artifacts(record, folder, files):
            artifact = wandb.Artifact(f"{kind}-{name or run.id}", type=kind)
            add = artifact.add_dir if path.is_dir() else artifact.add_file
            add(str(path), policy="immutable")  # not copied: wandb reads it where it is
            run.log_artifact(artifact)


def _artifacts(record: RunRecord, folder: Path, files: StoredFiles) -> Iterator[tuple[str, str, Path]]:
    """Yields kind, name (where empty, that of the run) and path of each file worth keeping."""
    for file in files(record.fingerprint):
        yield file.parent.name, record.fingerprint[:12], file
    for path in (folder / "adapter", folder / "sparsity.csv"):
        if path.exists():
            yield path.stem, "", path


def _append_routing(file: Path, routing: Mapping[str, Mapping[str, Any]], step: int) -> None:
    rows = routing_rows(routing)
    is_new = not file.exists()
    with file.open("a", newline="") as opened:
        writer = csv.DictWriter(opened, ["step", *rows[0]])
        if is_new:
            writer.writeheader()
        writer.writerows({"step": step, **row} for row in rows)
