"""Times `import layerif` and `layerif --help`, in `make bench`.

    python experiments/benchmark_startup/run.py

Each figure is the best of five processes. Python's own start is part of it and stands in the first row.
"""

from __future__ import annotations

import subprocess
import sys
import time

COMMANDS = {
    "python": ["-c", "pass"],
    "import layerif": ["-c", "import layerif"],
    "layerif --help": ["-m", "layerif", "--help"],
}
GOAL = 1.0  # seconds that `layerif --help` may take on an idle core


def main() -> None:
    seconds = {name: min(started(arguments) for _ in range(5)) for name, arguments in COMMANDS.items()}
    for name, best in seconds.items():
        print(f"{name:<16}{best:6.2f} s")
    if seconds["layerif --help"] > GOAL:
        sys.exit(f"layerif --help takes {seconds['layerif --help']:.2f} s; the goal is {GOAL:g} s on an idle core")


def started(arguments: list[str]) -> float:
    """Returns the seconds from the start of a Python process to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
