"""No number is cut: what does not fit a terminal is a column less."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from simdiff.report.numbers import plain
from simdiff.report.terminal.fitting import Fitting, plain_table
from simdiff.report.terminal.sublayers import sublayers_table
from simdiff.report.terminal.tables import leading_table, profile_table, scores_table
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.profiling import LayerProfile, PassProfile
from simdiff.sublayers.plan import plan_sublayers
from simdiff.sublayers.scores import score_with_sublayers


def printed(table: object, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_columns_go_in_their_order() -> None:
    table = plain_table("a title")
    for heading in ("layer", "one", "two", "three"):
        table.add_column(heading, no_wrap=True)
    table.add_row("12", "1.011e+05", "2.022e+05", "3.033e+05")
    shown = {width: printed(Fitting(table, ("two", "one")), width) for width in (40, 30, 20)}
    assert shown[40][2].split() == ["layer", "one", "two", "three"]
    assert shown[30][2].split() == ["layer", "one", "three"]
    assert shown[30][4].split() == ["12", "1.011e+05", "3.033e+05"]
    assert shown[20][2].split() == ["layer", "three"]
    assert len(table.columns) == 4, "the table itself stays as it is"


@pytest.mark.parametrize("width", [60, 80, 130])
def test_the_tables_of_every_command_fit(llama, token_batches, width: int) -> None:
    scores = score(llama, token_batches, name="org/a-model", progress=False, skip_leading=2)
    squared = scores.metrics["squared_difference"]
    long = dataclasses.replace(squared, mean=tuple(1.2345e15 * m for m in squared.mean))
    scores = dataclasses.replace(scores, metrics=scores.metrics | {"squared_difference": long})
    found = score_with_sublayers(llama, token_batches, name="org/a-model", progress=False)
    plan = plan_sublayers(found, "sublayer", 3)
    profile = PassProfile((LayerProfile(0, 0.1, 0.01, 10**9),), "reference", "cpu", 4, 4096)
    for table in (
        scores_table(scores),
        leading_table(scores),
        sublayers_table(found),
        sublayers_table(found, plan),
        profile_table(profile),
    ):
        lines = printed(table, width)
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines), lines[:5]
    assert plain(long.mean[3]) in " ".join(printed(scores_table(scores), width))
