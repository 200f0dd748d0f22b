"""`layerif` and `python -m layerif`: one run, or with `-m` a sweep."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from layerif.config import conf_folder, explain, register

WITH_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def main() -> None:
    register()
    # Fresh pages are a fifth of a probe's time on a CPU: large ones, unless the user says otherwise.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions come here instead of being printed by Hydra
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(_job)()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        _leave(error)


def _job(config: DictConfig) -> None:
    from layerif.run import run  # torch and transformers only where there is work to do

    try:
        run(config)
    except Exception as error:
        _leave(error)


def _leave(error: Exception) -> None:
    """Say what a user caused in a sentence; anything else is a defect and keeps its traceback."""
    cause = _of_the_user(error)
    if cause is None or WITH_TRACEBACK:
        raise error
    print(f"layerif: {explain(cause, _overrides())}", file=sys.stderr)
    sys.exit(1)


def _of_the_user(error: BaseException) -> BaseException | None:
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return _of_the_user(error.__cause__)
    if isinstance(error, HydraException | OmegaConfBaseException | OSError):
        return error
    # A ValueError raised by our own code is written for the user; one of torch or numpy is a defect of ours.
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return error if isinstance(error, ValueError) and Path(__file__).parent in raised_in.parents else None


def _overrides() -> list[str]:
    return [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]


if __name__ == "__main__":
    main()
