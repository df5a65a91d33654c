"""Tables of layers, scores, results and comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from simdiff.errors import number_of
from simdiff.planning.plan import PruningPlan
from simdiff.recovery.record import STAGES, RecoveryRecord
from simdiff.report.cells import cell_texts, layer_cells
from simdiff.report.numbers import perplexity_text, plain, speed_text
from simdiff.report.terminal.fitting import Fitting, plain_table
from simdiff.scoring.scores import LayerScores

if TYPE_CHECKING:
    from simdiff.comparison.results import Comparison
    from simdiff.scoring.profiling import PassProfile

# Largest width of a table. A narrower screen shows fewer columns, not truncated ones.
_WIDE = 100
_COLUMNS = ("layer", "1-cos", "±s.e.", "MSSD", "max sq.", "MASD", "rel.", "importance")
_LEFT_OUT = ("±s.e.", "max sq.", "MASD", "rel.")


@dataclass(frozen=True)
class LayersTable:
    """A table of every layer: its scores, its importance, and whether and why it is removed."""

    scores: LayerScores
    plan: PruningPlan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as many columns as fit."""
        yield self.table(options.max_width)

    def table(self, width: int) -> Table:
        """The table with the columns that fit into `width` characters."""
        columns = (*_COLUMNS, *(["in draws"] if self.plan.draws is not None else []))
        shown = [n for n, c in enumerate(columns) if width >= _WIDE or c not in _LEFT_OUT]
        table = plain_table(f"{self.scores.model['name']}: every layer, counted from 0")
        for index in shown:
            table.add_column(columns[index], justify="right", no_wrap=True)
        table.add_column("decision")
        for layer in range(self.plan.num_layers):
            gone = layer in self.plan.removed
            cells = layer_cells(self.scores, self.plan, layer)
            table.add_row(
                *(cells[index] for index in shown),
                f"{'REMOVE' if gone else 'keep'}: {self.plan.reason(layer)}",
                style="bold red" if gone else None,
            )
        return table


def layers_table(scores: LayerScores, plan: PruningPlan) -> LayersTable:
    """Make the table of every layer: scores, importance, and whether and why it is removed."""
    return LayersTable(scores, plan)


def scores_table(scores: LayerScores) -> Fitting:
    """A table of every layer with the means and maxima of its metrics."""
    table = plain_table(f"{scores.model['name']}: every layer, counted from 0")
    for column in ("layer", "1-cos", "MSSD", "max sq.", "at sequence:position", "MASD", "rel."):
        table.add_column(column, justify="right", no_wrap=True)
    squared = scores.metrics["squared_difference"]
    for layer in range(scores.num_layers):
        peak = squared.location[layer]
        table.add_row(
            str(layer),
            plain(scores.metrics["cosine_distance"].mean[layer]),
            plain(squared.mean[layer]),
            plain(squared.maximum[layer]),
            f"{peak.sequence}:{peak.position}",
            plain(scores.metrics["absolute_difference"].mean[layer]),
            plain(scores.metrics["relative_difference"].mean[layer]),
        )
    return Fitting(table, ("at sequence:position", "rel.", "MASD"))


def leading_table(scores: LayerScores) -> Fitting:
    """A table that compares leading tokens with all others, to show how a massive activation at the
    beginning affects MSSD."""
    leading = scores.leading
    assert leading is not None
    table = plain_table(
        f"The first {number_of(leading.skip_leading, 'token')} of each sequence "
        f"({leading.num_tokens}), "
        f"which the other statistics ({scores.num_tokens} tokens) leave out"
    )
    columns = ("layer", "1-cos", "others", "MSSD", "others", "max sq.", "others", "MSSD of all")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    total = leading.num_tokens + scores.num_tokens
    for layer in range(scores.num_layers):
        pairs = [
            (
                tables["cosine_distance"].mean[layer],
                tables["squared_difference"].mean[layer],
                tables["squared_difference"].maximum[layer],
            )
            for tables in (leading.metrics, scores.metrics)
        ]
        first, rest = pairs
        both = (first[1] * leading.num_tokens + rest[1] * scores.num_tokens) / total
        values = (*(value for pair in zip(first, rest, strict=True) for value in pair), both)
        table.add_row(str(layer), *(plain(value) for value in values))
    return Fitting(table, ("MSSD of all", "others"))


def results_table(results: Mapping[str, Any]) -> Table:
    """A table that compares the dense and the pruned model."""
    table = Table(title="Before and after", title_justify="left")
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    dense, pruned = results["dense"], results["pruned"]
    speeds = [
        (
            f"{phase}, tokens/s",
            dense["speed"][phase],
            pruned["speed"][phase],
            pruned["speed"]["times_faster"][phase],
            speed_text,
        )
        for phase in ("decode", "prefill")
        if "speed" in dense
    ]
    rows = (
        ("held-out perplexity", dense["perplexity"], pruned["perplexity"], None, perplexity_text),
        *speeds,
        ("parameters", dense["num_parameters"], pruned["num_parameters"], None, "{:,}".format),
    )
    for name, before, after, ratio, shown in rows:
        ratio = after / before if ratio is None else ratio
        table.add_row(name, shown(before), shown(after), f"{ratio:.3f}")
    return table


def recovery_table(record: RecoveryRecord) -> Table:
    """A table of the held-out perplexity of the dense, the pruned and the recovered model."""
    text = record.evaluation
    share = record.recovered_share
    recovered = "" if share is None else f", {share:.0%} of the way back in log perplexity"
    table = Table(
        title=f"{record.method} in {record.seconds:.0f} s{recovered}\n"
        f"{number_of(text['num_windows'], 'window')} of {text['window_length']} tokens, part "
        f"{text['part']}",
        title_justify="left",
    )
    for column in ("", "held-out perplexity", "± s.e. of nll", "against the plain cut"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for stage in STAGES:
        error = record.quality[stage]["standard_error"]
        table.add_row(
            {"pruned": "plain cut"}.get(stage, stage),
            f"{record.perplexity(stage):.2f}",
            "" if error is None else f"{error:.4f}",
            f"{record.perplexity(stage) / record.perplexity('pruned') - 1:+.1%}",
        )
    return table


def comparison_table(comparison: Comparison) -> Fitting:
    """A table of all cells of a comparison; the best perplexity at each number is highlighted."""
    dense = comparison.dense
    table = plain_table(
        f"{comparison.scores.model['name']}: held-out perplexity, dense "
        f"{dense.perplexity:.2f}; 95% intervals; layers count from 0"
    )
    for column in ("removed", "criterion", "perplexity", "95%", "× dense", "to plan"):
        left = column == "criterion"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    table.add_column("layers", min_width=8)
    for count in comparison.counts:
        entries = [comparison.at(name, count) for name in comparison.criteria]
        values = [entry.quality.perplexity for entry in entries if entry.quality is not None]
        for entry in entries:
            wins = entry.quality is not None and entry.quality.perplexity == min(values)
            cells = cell_texts(entry)
            del cells[5]  # the interval of the ratio, which would leave no room for the layers
            table.add_row(
                *cells,
                style="bold" if wins else None,
                end_section=entry is entries[-1],
            )
    return Fitting(table, ("to plan", "95%"), wrapping="layers")


def profile_table(profile: PassProfile) -> Table:
    """A table of the time and memory of a calibration pass, layer by layer."""
    batches = number_of(profile.num_batches, "batch")
    table = plain_table(
        f"Calibration pass: {batches}, {profile.num_tokens} tokens, on {profile.device}, scored by "
        f"{profile.backend}"
    )
    for column in ("layer", "forward, ms", "scoring, ms", "overhead, %", "peak, MB"):
        table.add_column(column, justify="right")
    content = profile.to_dict()
    rows = [(str(layer["layer"]), layer) for layer in content["layers"]]
    for index, (name, row) in enumerate([*rows, ("all", content["total"])]):
        table.add_row(
            name,
            f"{1e3 * row['forward_seconds']:.2f}",
            f"{1e3 * row['scoring_seconds']:.3f}",
            f"{100 * row['overhead']:.2f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            end_section=index == len(rows) - 1,
        )
    return table
