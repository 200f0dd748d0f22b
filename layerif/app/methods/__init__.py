"""Methods: what a run does with scores and an allocation. One file and one YAML in `conf/method/` each.

A method is a frozen dataclass whose fields are its settings, with the members of `Method`. Nothing is registered: the
`_target_` of its YAML finds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from layerif.app.setup import Setup
    from layerif.record.record import RunRecord
    from layerif.scores import Kind


class Method(Protocol):
    """The members that the shell knows of a method.

    Attributes:
        name: its choice in the group `method`.
        allocates: the kind of allocation that it spends; None if any will do.
        evaluates: whether it evaluates a model after its work, so that the evaluation is checked beforehand.
        fine_tunes: whether it leaves a fine-tuned model, whose validation loss a search can ask for.
    """

    name: ClassVar[str]
    allocates: ClassVar[Kind | None]
    evaluates: ClassVar[bool]

    @property
    def fine_tunes(self) -> bool: ...

    def check(self, setup: Setup) -> None:
        """Raise ValueError for everything that can be refused before any work."""
        ...

    def preview(self, setup: Setup) -> dict[str, str]:
        """Say what a run would do, as lines of a dry run by their name."""
        ...

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        """Do the work and put what came of it into the record and the run's folder."""
        ...
