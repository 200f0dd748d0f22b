"""The wheel carries the configuration and the report's page, so that `layerif` works from any folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from layerif.files import conf_folder


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_every_yaml(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("layerif-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"layerif/conf/{file.relative_to(conf_folder())}" for file in conf_folder().rglob("*.yaml")}
    own = {str(file.relative_to(root)) for kind in ("py", "jinja") for file in (root / "layerif").rglob(f"*.{kind}")}
    assert shipped | own <= names
    assert "layerif/report/page.html.jinja" in own
