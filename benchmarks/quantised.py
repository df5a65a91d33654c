"""What 4-bit weights change: scores of layers and plans, beside those of the unquantised model.

    python benchmarks/quantised.py demo --output RESULT.json

The same windows are scored with the weights as they are and as bitsandbytes packs them on loading
(NF4 and FP4, computed in float32). Reported are, for each metric, Spearman's rank correlation over
the layers and the largest relative difference; every plan of both by scores alone; and a plan of
both that a search by perplexity improved (effort "quick"). Where such a plan, or one of `simdiff`,
differs, both are measured on held-out text with the unquantised model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import provenance
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from simdiff.data.text import token_windows
from simdiff.evaluation.window_perplexity import perplexity
from simdiff.io.machine import describe_machine
from simdiff.io.progress import silent
from simdiff.models.loading import load_model, source_directory
from simdiff.planning.make_plan import make_plan
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from simdiff.surgery.layers import layers_removed

KINDS = ("nf4", "fp4")
METRICS = (
    "cosine_distance",
    "squared_difference",
    "absolute_difference",
    "relative_difference",
)
CRITERIA = (
    "simdiff",
    "simdiff-mssd",
    "simdiff-masd",
    "block-influence",
    "cosine-block",
    "angular-block",
    "relative-magnitude",
)
SHARES = (1 / 15, 2 / 15, 7 / 30, 1 / 3, 2 / 5)
SEARCHED = 7 / 30


def packed(name: str, kind: str) -> PreTrainedModel:
    """A model with the weights of its linear maps in 4 bits."""
    quantiser = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        source_directory(name), quantization_config=quantiser, dtype=torch.float32, device_map="cpu"
    ).eval()


def versions() -> dict[str, str | None]:
    """Of the packages that packed and ran the weights."""
    found: dict[str, str | None] = {}
    for name in ("bitsandbytes", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def ranks(values: Sequence[float]) -> Tensor:
    """The place of each value in rising order; no two of these are equal."""
    return torch.tensor(values).argsort().argsort().double()


def difference(full: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Of one metric of all layers: Spearman's rank correlation, and the largest relative change."""
    both = torch.stack([ranks(full), ranks(other)])
    return {
        "rank_correlation": float(torch.corrcoef(both)[0, 1]),
        "largest_relative_difference": max(
            abs(b - a) / abs(a) for a, b in zip(full, other, strict=True) if a
        ),
    }


def plans(full: LayerScores, other: LayerScores) -> Iterator[dict[str, Any]]:
    """The layers that each criterion removes by either scores, at several numbers of layers."""
    for criterion in CRITERIA:
        for share in SHARES:
            count = max(1, round(share * full.num_layers))
            yield {
                "criterion": criterion,
                "num_layers": count,
                "full": removed(make_plan(full, count, criterion=criterion)),
                "quantised": removed(make_plan(other, count, criterion=criterion)),
            }


def removed(plan: Any) -> list[int]:
    return sorted(plan.removed)


def searched(model: PreTrainedModel, scores: LayerScores, windows: Tensor) -> list[int]:
    """The layers of the plan that perplexity on this model improves."""
    count = max(1, round(SEARCHED * scores.num_layers))
    return removed(make_plan(scores, count, model=model, windows=windows, effort="quick"))


def measured(model: PreTrainedModel, row: dict[str, Any], held_out: Tensor) -> dict[str, Any]:
    """With the perplexity of both plans, where they differ and it is of interest."""
    if row["full"] == row["quantised"] or row["criterion"] != CRITERIA[0]:
        return row
    found = {}
    for which in ("full", "quantised"):
        with layers_removed(model, row[which]):
            found[which] = perplexity(model, held_out).perplexity
    return row | {"perplexity": found}


@silent()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-length", type=int, default=256)
    parser.add_argument("--held-out-windows", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype="float32", device="cpu")

    def text(part: str, count: int) -> Tensor:
        return token_windows(
            "demo", tokenizer, part=part, num_windows=count, window_length=options.window_length
        ).tokens

    calibration, held_out = (
        text("calibration", options.windows),
        text("held-out", options.held_out_windows),
    )

    def scored(one: PreTrainedModel) -> tuple[LayerScores, list[int], float]:
        start = time.perf_counter()
        scores = score(one, list(calibration.split(4)), progress=False)
        seconds = time.perf_counter() - start
        return scores, searched(one, scores, calibration), seconds

    full, plan, seconds = scored(model)
    rows = []
    for kind in KINDS:
        quantised = packed(options.model, kind)
        other, other_plan, spent = scored(quantised)
        del quantised
        search = {"criterion": CRITERIA[0], "num_layers": len(plan)}
        search |= {"full": plan, "quantised": other_plan}
        rows.append(
            {
                "kind": kind,
                "seconds": spent,
                "metrics": {
                    name: difference(full.metrics[name].mean, other.metrics[name].mean)
                    for name in METRICS
                },
                "plans": [measured(model, row, held_out) for row in plans(full, other)],
                "searched": measured(model, search, held_out),
            }
        )
        print(json.dumps(rows[-1]["metrics"]), flush=True)
    content = {
        "machine": describe_machine(),
        "model": options.model,
        "dtype": "float32",
        "versions": versions(),
        "windows": options.windows,
        "held_out_windows": options.held_out_windows,
        "window_length": options.window_length,
        "seconds": seconds,
        "kinds": rows,
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    provenance.keep([options.output], ["calibration pass", "planning"])


if __name__ == "__main__":
    main()
