"""The table of `simdiff eval`: a row for each measure, a column for each model."""

from __future__ import annotations

import itertools

from rich.table import Table

from simdiff.evaluation.quality import Quality
from simdiff.report.cells import quality_rows


def quality_table(quality: Quality) -> Table:
    """Perplexity and tasks of every model, and what is retained of the dense one."""
    names, rows = quality_rows(quality.to_dict())
    table = Table(title=f"Quality; dense: {quality.dense.name}", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for _, group in itertools.groupby(rows, key=lambda row: row.group):
        for row in group:
            table.add_row(row.label, *row.cells)
        table.add_section()
    return table
