"""The rows and tokens to learn from: chosen before anything else looks at the train rows, and written down."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.utilities import rank_zero_only

from layerif.adapt.train import CHECKPOINTS
from layerif.app.setup import Setup
from layerif.attribution.selection import Pool, Selected
from layerif.attribution.selection.all import AllRows
from layerif.files import claim_folder, write_text
from layerif.probe.measurements import Load
from layerif.probe.token_losses import stored_token_losses
from layerif.record.record import RunRecord

TABLE = "selection.csv"


def check_selection(setup: Setup) -> None:
    """Refuses a selection or a token filter that cannot work, before any pass over the data.

    Raises:
        ValueError: says which setting does not fit.
    """
    if not isinstance(setup.selection, AllRows):  # which looks at no row, and so not at how fine-tuning reads it
        setup.selection.check(setup.pool)
    token_filter = setup.config.data.get("token_filter", "none")
    asks = "this selection" if setup.selection.measures else f"data.token_filter={token_filter}"
    if setup.decider.spread and (setup.selection.measures or token_filter != "none"):
        raise ValueError(
            f"{asks} asks the whole model about rows, on one device; use trainer.strategy=ddp or "
            "trainer.devices=1, or selection=random with data.token_filter=none for a model that is spread over several"
        )


def as_many_rows(setup: Setup) -> Setup:
    """Returns the setup with as many train rows as the selection will take, to check what depends on their number."""
    if isinstance(setup.selection, AllRows):
        return setup
    return setup.with_rows(range(setup.selection.expected(setup.pool)))


def select_rows(setup: Setup, load: Load, record: RunRecord, folder: Path) -> Setup:
    """Selects the train rows, and writes them into the record and a table.

    A run that carries on in its folder takes the rows that it took before it was killed.

    Args:
        setup: of the run.
        load: gives the model on its device, and is called only if something is measured.
        record: gets the selection.
        folder: the run's.

    Returns:
        The setup with these rows alone.
    """
    if isinstance(setup.selection, AllRows):
        return setup
    start, pool = time.perf_counter(), setup.pool
    kept = folder / CHECKPOINTS / "selection.json"
    claim_folder(kept.parent, record.identity)
    if kept.exists():
        record.selection = json.loads(kept.read_text(encoding="utf-8"))
    else:
        selected = setup.selection(pool, load)
        record.selection = spelt_out(selected, setup, pool)
        if rank_zero_only.rank == 0:
            table_of(selected, pool).to_csv(folder / TABLE, index=False)
            write_text(kept, json.dumps(record.selection))
    record.seconds["select"] = time.perf_counter() - start
    positions = {row.id: position for position, row in enumerate(pool.rows)}
    return setup.with_rows([positions[id] for id in record.selection["rows"]])


def spelt_out(selected: Selected, setup: Setup, pool: Pool) -> dict[str, Any]:
    """Gives the part of a selection that the record keeps."""
    settings: Any = setup.selection
    found = {
        "budget": settings.budget,
        "unit": settings.unit,
        "of": {"rows": len(pool.rows), "tokens": sum(pool.num_tokens)},
        "taken": {"rows": len(selected.rows), "tokens": sum(pool.num_tokens[row] for row in selected.rows)},
        "rows": [pool.rows[row].id for row in selected.rows],
    }
    if selected.values is not None:
        found["values"] = [selected.values[row] for row in selected.rows]
    return found


def table_of(selected: Selected, pool: Pool) -> pd.DataFrame:
    """Makes a table of every row of the pool: its value, whether and at which place it was taken, and its tokens."""
    places = {row: place for place, row in enumerate(selected.rows, start=1)}
    values = selected.values or [None] * len(pool.rows)
    rows = [
        {"row": each.id, "value": value, "place": places.get(row), "tokens": tokens}
        for row, (each, value, tokens) in enumerate(zip(pool.rows, values, pool.num_tokens, strict=True))
    ]
    return pd.DataFrame(rows).astype({"place": "Int64"})


def filter_tokens(setup: Setup, load: Load, record: RunRecord) -> None:
    """Lets training learn from the tokens that `data.token_filter` keeps.

    Args:
        setup: of the run, with the rows that are learned from.
        load: gives the model before training, on its device, and is called only if something is measured.
        record: gets the numbers of tokens.
    """
    data = setup.datamodule
    if data.token_filter == "none":
        return
    start = time.perf_counter()
    record.tokens = data.filter_tokens(stored_token_losses(setup.decider, load, data.train))
    record.seconds["filter"] = time.perf_counter() - start
