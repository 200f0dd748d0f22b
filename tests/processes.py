"""A pair of processes that work together by gloo, for one task after the other: starting them is what costs time."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 2


class Pair:
    """Two processes that run the same function, each with its rank, as a process group of its own for every task."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(SIZE)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, theirs), daemon=True) for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], folder: Path, *args: Any, **options: Any) -> list[str]:
        """Calls `function(rank, *args, **options)` in both processes.

        Args:
            function: a function of a module; what it needs is pickled.
            folder: where the processes meet.
            *args: passed on.
            **options: passed on.

        Returns:
            For each process the error that it ended with; empty where there was none.
        """
        number = len(list(folder.glob("meeting-*")))
        for end in self._ends:
            end.send((function, str(folder / f"meeting-{number}"), args, options))
        return [end.recv() for end in self._ends]

    def close(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(timeout=30)
            process.kill()


def _serve(rank: int, end: Any) -> None:
    torch.set_num_threads(1)
    while (task := end.recv()) is not None:
        function, meeting, args, options = task
        error = ""
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE)
        try:
            function(rank, *args, **options)
        except Exception as raised:
            error = str(raised) or traceback.format_exc()
        finally:
            dist.destroy_process_group()
        end.send(error)
