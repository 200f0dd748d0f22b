"""A report of a large sweep takes seconds, and no more memory than a small one leaves free."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.records import record, written

# Linux counts the memory of the process that starts another as the other's own, and that of a test run is large. So a
# small process starts the report.
REPORT = """
import json, resource, subprocess, sys
subprocess.run([sys.executable, "-m", "layerif.report", sys.argv[1]], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)]))
"""


@pytest.mark.soak
def test_three_hundred_runs_of_five_hundred_answers_are_reported_in_seconds(tmp_path, record_property):
    rng = np.random.default_rng(0)
    runs = [
        record("datainf", list(rng.random(500) < 0.5 + arm / 50), seed=seed, settings={"allocator.beta": float(arm)})
        for arm in range(10)
        for seed in range(30)
    ]
    written(tmp_path, runs)
    done = subprocess.run(
        [sys.executable, "-c", REPORT, str(tmp_path)], capture_output=True, text=True, timeout=600, check=True
    )
    seconds, memory = json.loads(done.stdout)
    record_property("seconds", seconds)
    record_property("megabytes", memory / 1e6)
    text = (tmp_path / "report.md").read_text()
    assert all(f"allocator.beta={float(arm)} |" in text for arm in range(10))
    assert seconds < 20, memory
    assert memory < 400e6, seconds
