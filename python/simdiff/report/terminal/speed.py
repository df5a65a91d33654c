"""Tables of `simdiff bench` for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from simdiff.errors import number_of
from simdiff.report.numbers import speed_text
from simdiff.report.speed_notes import (
    busy_note,
    draft_caption,
    draft_rows,
    measured_notes,
)
from simdiff.report.terminal.fitting import Fitting, plain_table

# Shares are of the median ratio. "whole" is the measure of the paper: new tokens over all seconds.
_UNITS = {"prefill": "prefill", "decode": "decode", "whole": "both"}


def speed_table(content: Mapping[str, Any]) -> Fitting:
    """A table of tokens per second of every setting, their ratio, and its share of the ideal."""
    table = plain_table(_title(content))
    for column in (
        "batch",
        "prompt",
        "new",
        "phase",
        "dense, tok/s",
        "pruned, tok/s",
        "ratio",
        "interval",
        "ideal",
        "of ideal",
        "roofline",
        "of roofline",
    ):
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=True)
    for setting in content["settings"]:
        for phase, what in _UNITS.items():
            found = setting["phases"][phase]
            ratio = found["ratio"]
            new = f"{setting['new_tokens']}{'*' if setting['shortened'] else ''}"
            head = (str(setting["batch_size"]), str(setting["prompt_length"]), new)
            shares = (
                (
                    f"{found['ideal']:.3f}",
                    f"{found['share_of_ideal']:.3f}",
                    f"{found['roofline_ideal']:.3f}",
                    f"{found['share_of_roofline_ideal']:.3f}",
                )
                if "ideal" in found
                else ("", "", "", "")
            )
            table.add_row(
                *(head if phase == "prefill" else ("", "", "")),
                what,
                *(
                    _spread(setting[name]["tokens_per_second"][phase])
                    for name in ("dense", "pruned")
                ),
                f"{ratio['median']:.3f}",
                f"{ratio['low']:.3f}-{ratio['high']:.3f}" if ratio["coverage"] else "",
                *shares,
                end_section=phase == "whole",
            )
    return Fitting(table, ("of roofline", "roofline", "interval", "new", "ideal"))


def memory_table(content: Mapping[str, Any]) -> Table:
    """A table of the bytes of weights and KV cache."""
    table = Table(title="Memory", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    dense, pruned = content["models"]["dense"], content["models"]["pruned"]
    for name, key, unit, scale in (
        ("layers", "num_layers", "", 1.0),
        ("parameters", "num_parameters", " M", 1e6),
        ("weights", "weight_bytes", " MB", 1e6),
        ("KV cache, per token", "cache_bytes_per_token", " kB", 1e3),
    ):
        table.add_row(name, *_bytes(dense[key], pruned[key], unit, scale))
    for setting in content["settings"]:
        tokens = setting["prompt_length"] + setting["new_tokens"] - 1
        before, after = (setting[name]["cache_bytes"] for name in ("dense", "pruned"))
        name = f"KV cache, batch {setting['batch_size']}, {number_of(tokens, 'token')}"
        table.add_row(name, *_bytes(before, after, " MB", 1e6))
    return table


def draft_table(content: Mapping[str, Any]) -> list[Table | str]:
    """A table of what the pruned model brings as a draft, and how that was measured; or nothing."""
    rows = draft_rows(content)
    if not rows:
        return []
    table = Table(title="Draft", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.show_header = False
    table.add_column("", justify="left", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return [table, draft_caption(content), ""]


def speed_notes(content: Mapping[str, Any]) -> list[str]:
    """Notes that readers of the numbers must know."""
    settings = content["settings"]
    rounds = ", ".join(dict.fromkeys(str(setting["repeats"]) for setting in settings))
    coverage = min(s["phases"]["decode"]["ratio"]["coverage"] for s in settings)
    interval = f"with its {100 * coverage:.0f}% interval" if coverage else "without an interval"
    notes = [
        f"{rounds} {'round' if rounds == '1' else 'rounds'} after "
        f"{content['protocol']['warm_up']} of warm-up; dense and pruned take "
        "turns, in alternating order; tokens per second: median and quartiles.",
        f"ratio: median of the rounds' ratios, {interval}; ideal: "
        "ratio of bytes (decode), of flops (prefill); roofline: with the read and matmul rates "
        "measured here; of ideal, of roofline: ratio by that; both: new tokens by the seconds of "
        "both phases.",
    ]
    busy = busy_note(content)
    return [*notes, *measured_notes(content), *([] if busy is None else [busy])]


def _title(content: Mapping[str, Any]) -> str:
    threads = (
        ""
        if content["device"].startswith("cuda")
        else f"{number_of(content['num_threads'], 'thread')}, "
    )
    preset = f"preset {content['preset']}, " if content["preset"] else ""
    names = " against ".join(content["models"][key]["name"] for key in ("dense", "pruned"))
    return (
        f"Speed of {names}: {preset}{content['dtype']}, {threads}{content['decoding']}, "
        f"{content['attention']} attention\n{content['machine']}"
    )


def _spread(value: Mapping[str, float]) -> str:
    low, median, high = (value[k] for k in ("lower_quartile", "median", "upper_quartile"))
    return f"{speed_text(median)} [{speed_text(low)}-{speed_text(high)}]"


def _bytes(dense: float, pruned: float, unit: str, scale: float) -> tuple[str, str, str]:
    digits = 0 if scale == 1 else 2
    return (
        f"{dense / scale:.{digits}f}{unit}",
        f"{pruned / scale:.{digits}f}{unit}",
        f"{pruned / dense:.3f}" if dense else "",
    )
