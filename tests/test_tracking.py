"""Loggers: what a run, or one that fails, leaves in each, read back from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import wandb
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import layerif.fit
from layerif.config import conf_folder, register
from layerif.record import RunRecord
from layerif.run import run
from layerif.tracking import tables
from tests import wandb_file


def job(overrides: list[str], folder: Path) -> RunRecord:
    """One job in this process, in `folder`, as the command line would run it."""
    folder.mkdir(parents=True)
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
    config.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(config)
    del config["hydra"]
    run(config)
    return RunRecord.read(folder)


def table(folder: Path, row: dict, name: str) -> pd.DataFrame:
    """A wandb table of a history row."""
    (files,) = folder.glob("wandb/*run-*/files")
    content = json.loads((files / row[name]["path"]).read_text())
    return pd.DataFrame(content["data"], columns=content["columns"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, request):
    pass
