"""The objects of a configuration on the tiny model and task."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from layerif.app.schema import check, register
from layerif.app.setup import Setup
from layerif.files import conf_folder


@pytest.fixture
def setup_of(tiny_overrides):
    """Composes overrides, checks them and makes their objects."""

    def make(*overrides: str) -> Setup:
        register()
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config = compose("config", [*tiny_overrides, "logger=none", *overrides])
        check(config)
        return Setup(config)

    return make
