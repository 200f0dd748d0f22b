"""Methods: the ways to use scores and an allocation in a run. Each has one file and one YAML in `conf/method/`.

A method is a frozen dataclass whose fields are its settings, with the members of `Method`. Nothing is registered: the
`_target_` of its YAML finds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from layerif.app.setup import Setup
    from layerif.record.record import RunRecord
    from layerif.scores import AllocationKind


class Method(Protocol):
    """The members that the shell knows of a method.

    Attributes:
        name: its choice in the group `method`.
        allocates: the kind of allocation that it spends, or the kinds; None if any will do.
        evaluates: it evaluates a model after its work, so the evaluation is checked beforehand.
        further_metrics: what it measures beside the default metrics of the task.
        selects_rows: it looks only at the train rows that `selection` takes.
        takes_parts: it works with weights that are divided among processes (`trainer.strategy=fsdp`).
        fine_tunes: it leaves a fine-tuned model, whose validation loss a search can ask for.
    """

    name: ClassVar[str]
    allocates: ClassVar[AllocationKind | tuple[AllocationKind, ...] | None]
    evaluates: ClassVar[bool]
    further_metrics: ClassVar[tuple[str, ...]]
    selects_rows: ClassVar[bool]
    takes_parts: ClassVar[bool]

    @property
    def fine_tunes(self) -> bool:
        """Tells if the work leaves a fine-tuned model."""
        ...

    def check(self, setup: Setup) -> None:
        """Checks all that can be checked before any work.

        Raises:
            ValueError: the method cannot work with this setup.
        """
        ...

    def preview(self, setup: Setup) -> dict[str, str]:
        """Returns the lines that a dry run prints about the work, by their name."""
        ...

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        """Does the work and puts its results into the record and the run's folder.

        Args:
            setup: the objects of the configuration.
            record: gets decision, metrics, seconds and notes.
            folder: the run's.
        """
        ...


class SpendsNothing:
    """The members of a method that spends no allocation and leaves no model: it has only work of its own to add."""

    allocates: ClassVar[None] = None
    evaluates: ClassVar[bool] = False
    further_metrics: ClassVar[tuple[str, ...]] = ()
    selects_rows: ClassVar[bool] = False
    takes_parts: ClassVar[bool] = False
    fine_tunes: ClassVar[bool] = False

    def check(self, setup: Setup) -> None:
        """Refuses nothing, because the decider has already checked everything."""

    def preview(self, setup: Setup) -> dict[str, str]:
        """Returns no line."""
        return {}
