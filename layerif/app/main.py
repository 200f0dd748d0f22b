"""`layerif` and `python -m layerif`: one run, or with `-m` a sweep.

Hydra and what stands on it are imported where they are used, because `layerif --help` must answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from layerif.app import help
from layerif.app.overrides import options_first, with_size
from layerif.files import conf_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

WITH_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def main() -> None:
    """Runs the command line: prints the help, or starts a run or a sweep."""
    if help.is_asked(sys.argv[1:]):
        print(help.help_text())
        return
    sys.argv[1:] = with_size(sys.argv[1:])
    _start()


def _start() -> None:
    import hydra

    from layerif.app import sweep
    from layerif.app.composition import Composer, from_command_line
    from layerif.app.schema import register
    from layerif.compat import compose_by, execution_whitelist, hydra_arguments
    from layerif.targets import hydra_patterns

    register()
    _check_options()
    # Fresh pages take a fifth of a probe's time on a CPU, so torch asks for large ones unless the user says otherwise.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Waiting threads sleep: where they spin, two jobs on the same cores stop each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions come here instead of being printed by Hydra
    try:
        given = from_command_line(hydra_arguments(sys.argv[1:]).overrides)
        whitelist = execution_whitelist(hydra_patterns(given.get("trusted_targets", ())))
        with compose_by(partial(Composer, given=given)):
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config", **whitelist)(_job)()
    except KeyboardInterrupt:
        carries_on = "; the same command carries on" if sweep.Sweep.running else ""
        print(f"\ninterrupted{carries_on}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        _leave(error)
    finally:
        balance = sweep.Sweep.running and sweep.Sweep.running.balance()
        if balance:
            print(balance)
    if balance is not None and not balance:
        print("layerif: the sweep has no job, because a value such as glob(…) stands for nothing", file=sys.stderr)
    if balance is not None and not (balance and balance.is_clean):
        sys.exit(1)


def _job(config: DictConfig) -> float | None:
    from hydra.core.hydra_config import HydraConfig

    from layerif.app import sweep

    if sweep.is_swept():
        return sweep.attempt(_run, config)
    try:
        return _run(config)
    except Exception as error:
        sweep.note(error, config, Path(HydraConfig.get().runtime.output_dir))
        _leave(error)


def _run(config: DictConfig) -> float | None:
    # PEFT imports bitsandbytes wherever it is installed, which then warns of a kernel that a CPU can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from layerif.app.run import run  # torch and transformers only where there is work to do

    return run(config)


def _leave(error: Exception) -> NoReturn:
    """Ends with one sentence on an error that a user caused; any other error is a defect and keeps its traceback."""
    from layerif.app.messages import explain, of_the_user

    cause = of_the_user(error)
    if cause is None or WITH_TRACEBACK:
        raise error
    print(f"layerif: {explain(cause, _overrides())}", file=sys.stderr)
    sys.exit(1)


def _check_options() -> None:
    """Refuses a setting that is written as an option and says how to write it; argparse would only not recognise it."""
    from layerif.compat import hydra_arguments, hydra_options

    options = hydra_options()
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and not any(option.startswith(name) for option in options):
            setting = f"{name[2:].replace('-', '_')}={value if equals else 'true'}"
            print(f"layerif: {name} is not an option; settings are key=value: {setting}", file=sys.stderr)
            sys.exit(2)
    read = hydra_arguments(sys.argv[1:])
    if read.overrides and any("=" in argument for argument in read.unknown):
        print(f"layerif: {options_first(sys.argv[1:], [*read.overrides, *read.unknown])}", file=sys.stderr)
        sys.exit(2)
    if read.experimental_rerun is not None:
        print(
            "layerif: --experimental-rerun reads a pickle, which can run any code; use --config-path=/run/.hydra "
            "--config-name=config",
            file=sys.stderr,
        )
        sys.exit(2)


def _overrides() -> list[str]:
    return [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]


if __name__ == "__main__":
    main()
