"""Plot of `simdiff bench`: tokens per second, dense and pruned, and where the ideal lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from simdiff.report.plots import KEPT, REMOVED, png


def speed_plot(content: Mapping[str, Any]) -> bytes:
    """One panel for each phase; bars are medians, lines quartiles, a dash the ideal."""
    settings = content["settings"]
    labels = [f"{s['batch_size']} × {s['prompt_length']} + {s['new_tokens']}" for s in settings]
    figure = Figure(figsize=(4 + 2.2 * len(settings), 4), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        for shift, name, color in ((-0.2, "dense", KEPT), (0.2, "pruned", REMOVED)):
            speeds = [s[name]["tokens_per_second"][phase] for s in settings]
            medians = [speed["median"] for speed in speeds]
            errors = [
                [speed["median"] - speed["lower_quartile"] for speed in speeds],
                [speed["upper_quartile"] - speed["median"] for speed in speeds],
            ]
            places = [index + shift for index in range(len(settings))]
            axes.bar(places, medians, 0.36, yerr=errors, color=color, label=name, capsize=3)
        ideals = [
            s["dense"]["tokens_per_second"][phase]["median"] * s["phases"][phase]["ideal"]
            for s in settings
        ]
        places = [index + 0.2 for index in range(len(settings))]
        by = "bytes" if phase == "decode" else "flops"
        axes.scatter(places, ideals, marker="_", s=900, color="black", zorder=3,
                     label=f"ideal by {by}")  # fmt: skip
        axes.set_xticks(range(len(settings)), labels)
        axes.set_xlabel("batch × prompt + new tokens")
        axes.set_ylabel("tokens per second")
        axes.set_title(phase)
        axes.set_ylim(0, 1.35 * max(ideals))
        axes.legend(frameon=False, fontsize="small", loc="upper left", ncols=3)
    return png(figure)
