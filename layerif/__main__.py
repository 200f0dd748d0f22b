"""`layerif` and `python -m layerif`: one run, or with `-m` a sweep."""

from __future__ import annotations

import os
import sys

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig

from layerif.config import conf_folder, explain, register

# What users cause is said in a sentence; anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ModuleNotFoundError, HydraException)


def main() -> None:
    register()
    # Fresh pages are a fifth of a probe's time on a CPU: large ones, unless the user says otherwise.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions come here instead of being printed by Hydra
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(_job)()
    except KeyboardInterrupt:
        print("interrupted; nothing half-written remains, the same command carries on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        cause = _user_error(error)
        if traceback_wanted or cause is None:
            raise
        print(f"layerif: {explain(cause, _overrides())}", file=sys.stderr)
        sys.exit(1)


def _job(config: DictConfig) -> None:
    from layerif.run import run  # torch and transformers only where there is work to do

    run(config)


def _user_error(error: BaseException) -> BaseException | None:
    """The error of ours inside what Hydra or OmegaConf wrapped around it."""
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return _user_error(error.__cause__)
    return error if isinstance(error, (*USER_ERRORS, OmegaConfBaseException)) else None


def _overrides() -> list[str]:
    return [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]


if __name__ == "__main__":
    main()
