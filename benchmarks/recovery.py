"""What closed-form recovery brings back: held-out perplexity of dense, plainly cut and corrected.

Calibration and held-out text are disjoint halves of one source; a second text may be given, which
is only evaluated. Rows of other cuts that the output holds already, made with the same settings,
are kept: one cut at a time may be run. The time is that of the correction alone.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import provenance
import torch

from simdiff.cli.options import layer_list
from simdiff.data.text import token_windows
from simdiff.evaluation.window_perplexity import perplexity
from simdiff.io.machine import describe_machine
from simdiff.jobs.plans import fitted
from simdiff.jobs.recover import recovered
from simdiff.models.loading import load_model
from simdiff.planning.plan import PruningPlan
from simdiff.recovery.record import STAGES
from simdiff.surgery.layers import layers_removed

# SmolLM2: the default criterion's plans for 7 layers, which greedy search by perplexity gives too,
# and for 8 from scores alone.
CUTS = ("12-18", "12-18,26")


def measure(model: Any, tokenizer: Any, cut: str, arguments: argparse.Namespace) -> dict[str, Any]:
    size = {"window_length": arguments.window_length, "seed": arguments.seed}
    calibration = token_windows(arguments.text, tokenizer, num_windows=arguments.windows, **size)
    held_out = token_windows(
        arguments.text, tokenizer, part="held-out", num_windows=arguments.held_out_windows, **size
    )
    plan = fitted(PruningPlan(layer_list(cut)), model, arguments.model)
    pruned, record = recovered(model, plan, calibration, held_out, method="closed-form")
    plain = record.perplexity("pruned")
    row = {
        "removed": cut,
        "perplexity": {stage: record.perplexity(stage) for stage in STAGES},
        "nll_standard_error": {s: record.quality[s]["standard_error"] for s in STAGES},
        "against_plain_cut": record.perplexity("recovered") / plain - 1,
        "recovered_share": record.recovered_share,
        "seconds": record.seconds,
        "corrected_layers": record.details["corrected"],
        "notes": list(record.notes),
    }
    if arguments.other_text is not None:
        other = token_windows(
            arguments.other_text,
            tokenizer,
            part="all",
            num_windows=arguments.held_out_windows,
            **size,
        ).tokens
        found = {"dense": perplexity(model, other), "recovered": perplexity(pruned, other)}
        with layers_removed(model, plan.removed):
            found["pruned"] = perplexity(model, other)
        row["other_text"] = {
            "source": Path(arguments.other_text).name,
            "perplexity": {stage: found[stage].perplexity for stage in STAGES},
            "against_plain_cut": found["recovered"].perplexity / found["pruned"].perplexity - 1,
        }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| removed | text | dense | plain cut | corrected | | way back, in log | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for text in (row, row.get("other_text")):
            if text is None:
                continue
            cells = [row["removed"], text.get("source", "held-out half")]
            cells += [f"{text['perplexity'][stage]:.2f}" for stage in STAGES]
            cells.append(f"{text['against_plain_cut']:+.1%}")
            share = text.get("recovered_share")
            cells += ["" if share is None else f"{share:.0%}"]
            cells.append(f"{text['seconds']:.0f}" if "seconds" in text else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--other-text")
    parser.add_argument("--removed", nargs="+", default=CUTS)
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--held-out-windows", type=int, default=32)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    settings = {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "text": Path(arguments.text).name,
        "windows": [arguments.windows, arguments.window_length],
        "held_out_windows": arguments.held_out_windows,
        "seed": arguments.seed,
    }
    rows: dict[str, dict[str, Any]] = {}
    if arguments.output is not None and arguments.output.exists():
        earlier = json.loads(arguments.output.read_text())
        if {key: earlier[key] for key in settings} == settings:
            rows = {row["removed"]: row for row in earlier["rows"]}
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype)
    for cut in arguments.removed:
        rows[cut] = measure(model, tokenizer, cut, arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows[cut]["peak_resident_bytes"] = peak
        if arguments.output is not None:
            content = settings | {"rows": list(rows.values())}
            arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.output is not None:
        provenance.keep([arguments.output], ["recovery"])
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
