"""The table of `simdiff reproduce`: what was measured beside what was published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from simdiff.evaluation.task_scores import CLASSIFICATION, GENERATION
from simdiff.models.layer_indices import spans
from simdiff.report.numbers import perplexity_text, ratio_text
from simdiff.report.terminal.fitting import plain_table

HEADS = (
    "model",
    "layers chosen by",
    "perplexity",
    "× dense",
    "classification retained, %",
    "without tasks at chance",
    "generation retained, %",
    "decoding, × dense",
    "published retained, %",
    "without WSC",
    "removed",
)


def reproduction_rows(content: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The cells of the table, a row for the dense model and one for each criterion."""
    published = content["published"]["published"]
    for name, found in content["models"].items():
        averages = found["dense"]["averages"]
        yield (
            name,
            "dense",
            perplexity_text(found["dense"]["perplexity"]),
            "",
            *(_average(averages, kind, key) for kind, key in _AVERAGES),
            "",
            f"{content['published']['dense']:.2f} average",
            "",
            "",
        )
        speed = "" if found["speed"] is None else f"{found['speed']['decode']:.2f}"
        for criterion, row in found["rows"].items():
            quality, known = row["quality"], published.get(criterion, {})
            yield (
                name,
                criterion,
                "none" if quality is None else perplexity_text(quality["perplexity"]),
                "" if quality is None else ratio_text(quality["ratio"]),
                *(_retained(row["averages"], kind, key) for kind, key in _AVERAGES),
                speed,
                *(_percent(known.get(key)) for key in ("retained", "without")),
                row["problem"] or spans(row["removed"]),
            )


_AVERAGES = (
    (CLASSIFICATION, "all_tasks"),
    (CLASSIFICATION, "above_chance"),
    (GENERATION, "above_chance"),
)


def _average(averages: Mapping[str, Any], kind: str, key: str) -> str:
    found = averages.get(kind, {}).get(key, {})
    value = found.get("average")
    return "" if value is None else f"{100 * value:.1f} average of {len(found['tasks'])}"


def _retained(averages: Mapping[str, Any], kind: str, key: str) -> str:
    found = averages.get(kind, {}).get(key, {})
    value, error = found.get("retained"), found.get("retained_error")
    if value is None:
        return ""
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def reproduction_table(content: Mapping[str, Any]) -> Table:
    """For the terminal."""
    table = plain_table(f"{content['table']}; published: {content['published']['model']}")
    for head in HEADS:
        table.add_column(head, overflow="fold", no_wrap=head == HEADS[1])
    for row in reproduction_rows(content):
        table.add_row(*row)
    return table


def markdown(content: Mapping[str, Any]) -> str:
    """The table and its notes as a page of Markdown."""
    head = f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}\n"
    rows = "".join(f"| {' | '.join(row)} |\n" for row in reproduction_rows(content))
    notes = "".join(f"- {note}.\n" for note in content["notes"])
    return f"# {content['table']}\n\n{head}{rows}\n{notes}"
