"""The content of loggers besides training curves: configuration, layers, metrics, answers, routing, artifacts.

`record.json` and the tables beside it hold everything already, so `logger=csv` adds the curves alone. TensorBoard,
wandb and mlflow get all of it under every method, from the record as it stands when the run ends or fails.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, singledispatch
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from layerif.compat import wandb_init
from layerif.record.frames import frames, numbers, routing_rows
from layerif.record.plots import plots_of_run
from layerif.record.record import FILE, RunRecord
from layerif.record.search import read_state, write_state
from layerif.record.text import markdown

ROUTING = "routing.csv"
WANDB_RUN = "wandb_run.json"  # the id of a run that has not finished
_SQLITE = "sqlite:///"
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
        artifacts: also keeps the record, the pages that the run wrote, the measured Grams (or other evidence), the
            adapter and sparsity.csv. All but the record are uploaded from where they lie. Evidence that came from the
            store is an input of the run, which wandb knows online only; all else is an output.
        **init: further arguments of `wandb.init`; by default wandb prints nothing itself.
    """

    _known_until: int = -1  # the last step that wandb's server has of a run that is resumed

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
            init.setdefault("name", Path(save_dir).name)
            super().__init__(**{"save_dir": save_dir, "project": project, "group": group, "mode": mode}, **init)
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
        import wandb
        from wandb.errors import Error

        mode = wandb_init(self)["mode"]
        try:
            run = self.experiment
        except (Error, TimeoutError) as error:
            wandb.teardown()  # its other process would hold on to the run's id
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
        if mode != "online":
            return Path(run.dir).parent.name
        if run.resumed:
            known = run.summary.get("trainer/global_step")
            self._known_until = -1 if known is None else int(known)
        return run.url

    def take_up(self, folder: Path, job: Mapping[str, Any]) -> bool:
        """Gives the run the id that it had, where it did not finish in this folder, or else a new one.

        An id among the settings, or one of wandb's own agents (WANDB_RUN_ID), stays.

        Args:
            folder: of the run.
            job: its identity.

        Returns:
            True if the run has the id of one that did not finish.
        """
        settings = wandb_init(self)
        if settings["mode"] == "disabled" or settings.get("id") or os.environ.get("WANDB_RUN_ID"):
            return False
        file, key = folder / WANDB_RUN, hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        kept = read_state(file, key)
        settings["id"] = kept["id"] if kept else secrets.token_hex(8)
        write_state(file, key, {"id": settings["id"]})
        return kept is not None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs as Lightning does, and leaves out the steps of a resumed run that wandb's server has already."""
        if step is None or step > self._known_until:
            super().log_metrics(metrics, step)  # type: ignore[arg-type]


class Mlflow(MLFlowLogger):
    """Lightning's logger for mlflow, named after the run's folder, with the record and the files of a run as artifacts.

    Args:
        save_dir: the run's folder.
        tracking_uri: of mlflow: a database, or a server.
        experiment: of mlflow; the runs of a sweep share one.
        artifact_location: the folder or address of the artifacts of a new experiment; None: a folder beside the file
            of an SQLite database, and what the server chooses elsewhere.
        artifacts: also keeps the record, the pages that the run wrote, the adapter and sparsity.csv.
    """

    def __init__(
        self,
        *,
        save_dir: str,
        tracking_uri: str,
        experiment: str = "layerif",
        artifact_location: str | None = None,
        artifacts: bool = True,
    ) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would send what is called, and from where
        if tracking_uri.startswith(_SQLITE):
            database = Path(tracking_uri.removeprefix(_SQLITE)).absolute()
            database.parent.mkdir(parents=True, exist_ok=True)
            artifact_location = artifact_location or str(database.with_suffix(""))
        try:
            super().__init__(
                experiment_name=experiment,
                run_name=Path(save_dir).name,
                tracking_uri=tracking_uri,
                artifact_location=artifact_location,
            )
        except ModuleNotFoundError as error:
            raise ValueError(f"logger=mlflow needs mlflow ({error}): pip install 'layerif[mlflow]'") from error
        except Exception as error:  # mlflow's own, which are at hand only where it is
            raise self._refused(tracking_uri, error) from error
        self.artifacts = artifacts

    def start(self) -> str:
        """Starts the run, and returns its id.

        Raises:
            ValueError: mlflow cannot start it.
        """
        from mlflow.exceptions import MlflowException

        try:
            return str(self.run_id)
        except MlflowException as error:
            raise self._refused(self._tracking_uri, error) from error

    @staticmethod
    def _refused(tracking_uri: str, error: Exception) -> ValueError:
        return ValueError(
            f"mlflow cannot start at {tracking_uri} ({' '.join(str(error).split())}); give a database "
            "(logger.mlflow.tracking_uri=sqlite:////folder/mlflow.db) or the address of a server that runs"
        )


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
            _start(logger, record, folder)
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
def _start(logger: Logger, record: RunRecord, folder: Path) -> None:
    """Gives a logger the configuration."""
    logger.log_hyperparams(dict(record.config))


@_start.register(Wandb)
def _start_wandb(logger: Wandb, record: RunRecord, folder: Path) -> None:
    is_taken_up = logger.take_up(folder, record.identity)
    place = logger.start()
    if is_taken_up and logger.experiment.offline:
        record.notes.append(
            f"wandb/{place} holds this run from its first step, under the id that it had before it was stopped; sync "
            "this folder and not the one before"
        )
    if place:
        record.tracking["wandb"] = place
    logger.log_hyperparams(dict(record.config))


@_start.register(Mlflow)
def _start_mlflow(logger: Mlflow, record: RunRecord, folder: Path) -> None:
    record.tracking["mlflow"] = logger.start()
    logger.log_hyperparams(dict(record.config))


@_start.register(CSVLogger)
def _start_csv(logger: CSVLogger, record: RunRecord, folder: Path) -> None:
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


@_write.register(Mlflow)
def _write_mlflow(logger: Mlflow, record: RunRecord, folder: Path, files: StoredFiles) -> None:
    client, run = logger.experiment, logger.run_id
    assert run is not None
    logger.log_metrics(numbers(record.metrics) | {f"seconds/{name}": value for name, value in record.seconds.items()})
    for name, frame in frames(record).items():
        client.log_text(run, frame.to_csv(index=False), f"{name}.csv")
    for name, plot in plots_of_run(record).items():
        client.log_figure(run, plot.figure, f"{name}.png")
    if logger.artifacts:
        client.log_text(run, record.to_json(), FILE)
        for _, path in _of_run(folder):
            if path.is_dir():
                client.log_artifacts(run, str(path), path.name)
            else:
                client.log_artifact(run, str(path))


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
        _keep(run, record, folder, files)


def _keep(run: Any, record: RunRecord, folder: Path, files: StoredFiles) -> None:
    """Keeps the record and the files of a run as artifacts of wandb; what the store answered is an input of the run."""
    import wandb

    written = wandb.Artifact(f"record-{run.id}", type="record")
    with written.new_file(FILE, mode="w") as opened:
        opened.write(record.to_json())
    run.log_artifact(written)
    came_from_store = {(taken["kind"], taken["key"]) for taken in record.measurements if taken["reused"]}
    for kind, name, path in _artifacts(record, folder, files):
        artifact = wandb.Artifact(f"{kind}-{name or run.id}", type=kind)
        add = artifact.add_dir if path.is_dir() else artifact.add_file
        add(str(path), policy="immutable")  # not copied: wandb reads it where it is
        is_input = (kind, path.stem) in came_from_store and not run.offline  # wandb refuses an input of an offline run
        (run.use_artifact if is_input else run.log_artifact)(artifact)


def _artifacts(record: RunRecord, folder: Path, files: StoredFiles) -> Iterator[tuple[str, str, Path]]:
    """Yields kind, name (where empty, that of the run) and path of each file worth keeping."""
    for file in files(record.fingerprint):
        yield file.parent.name, record.fingerprint[:12], file
    for kind, path in _of_run(folder):
        yield kind, "", path


def _of_run(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields kind and path of what a run leaves in its folder and a tracker keeps."""
    for path in (folder / "adapter", folder / "sparsity.csv", *sorted(folder.glob("*.html"))):
        if path.exists():
            yield path.stem, path


def track_report(files: Sequence[Path], name: str, folder: Path) -> str:
    """Keeps the files of a report as an artifact of wandb, in a run of its own in the group of the sweep.

    WANDB_MODE and WANDB_PROJECT say how and where, as they do for runs.

    Args:
        files: of the report.
        name: of the sweep.
        folder: where wandb writes.

    Returns:
        The address of the run's page, or its folder.

    Raises:
        ValueError: wandb is not installed, or it cannot start.
    """
    title, mode = f"report-{name}", os.environ.get("WANDB_MODE", "offline")
    where: Any = {"save_dir": str(folder), "project": os.environ.get("WANDB_PROJECT", "layerif"), "mode": mode}
    logger = Wandb(**where, group=name, name=title, job_type="report")
    place = logger.start()
    if place is None:
        return "nowhere, because wandb is disabled"
    import wandb

    run: Any = logger.experiment
    artifact = wandb.Artifact(title, type="report")
    for file in files:
        artifact.add_file(str(file), policy="immutable")
    run.log_artifact(artifact)
    run.finish()
    return place if place.startswith("http") else str(folder / "wandb" / place)


def _append_routing(file: Path, routing: Mapping[str, Mapping[str, Any]], step: int) -> None:
    rows = routing_rows(routing)
    is_new = not file.exists()
    with file.open("a", newline="") as opened:
        writer = csv.DictWriter(opened, ["step", *rows[0]])
        if is_new:
            writer.writeheader()
        writer.writerows({"step": step, **row} for row in rows)
