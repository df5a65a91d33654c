"""What the calibration text does to a plan: its source, number, length, template and positions.

    python benchmarks/calibration_study.py MODEL --output RESULT.json

Each setting differs in one thing from the base, 16 windows of 512 tokens of Wikipedia; with each, a
plan is made from scores alone and by `--effort quick`, and measured on held-out Wikipedia and on
held-out Python code. Settings named "draw" are the base on other documents of the same text: what
they differ by is what chance does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import provenance
import quality
import texts
import torch
from calibration_tables import EFFORTS, HELD_OUT, LENGTH, TOKENS
from torch import Tensor

from simdiff.data.conversations import Conversation
from simdiff.data.text import token_windows
from simdiff.io.machine import describe_machine
from simdiff.io.progress import silent
from simdiff.models.loading import load_model
from simdiff.planning.bypass import BypassEvaluator
from simdiff.planning.make_plan import make_plan
from simdiff.scoring.calibration_pass import score

SHARES = (0.1, 0.25)
LENGTHS = (32, 128, 2048)
SKIPPED = (1, 4, 16)
HELD_OUT_LENGTH = 256


def documents(source: str, pool: str, seed: int) -> list[str]:
    """The calibration half of a source; "chat" is Wikipedia as answers in a conversation."""
    if source == "mixture":
        both = zip(
            documents("wikipedia", pool, seed), documents("python", pool, seed), strict=False
        )
        return [document for pair in both for document in pair]
    if source != "chat":
        return texts.halves(source, pool, seed).calibration
    return [
        Conversation.of(
            [
                {"role": "user", "content": "Write a paragraph of an encyclopedia."},
                {"role": "assistant", "content": document},
            ]
        )
        for document in documents("wikipedia", pool, seed)
    ]


def settings(tokenizer: Any, options: argparse.Namespace) -> Iterator[tuple[str, str, Tensor, int]]:
    """Axis, setting, windows and number of leading positions left out."""

    def windows(source: str, count: int, length: int, seed: int = options.seed) -> Tensor:
        return token_windows(
            documents(source, options.pool, seed),
            tokenizer,
            part="all",
            num_windows=count,
            window_length=length,
        ).tokens

    base = windows("wikipedia", TOKENS // LENGTH, LENGTH)
    yield "base", "base", base, 0
    for draw in range(1, 4):
        yield "draw", str(draw), windows("wikipedia", TOKENS // LENGTH, LENGTH, 100 + draw), 0
    chat = ["chat"] if getattr(tokenizer, "chat_template", None) else []
    for source in ("python", "mixture", *chat):
        yield "source", source, windows(source, TOKENS // LENGTH, LENGTH), 0
    noise = torch.Generator().manual_seed(options.seed)
    yield "source", "random tokens", torch.randint(len(tokenizer), base.shape, generator=noise), 0
    for count in (1, 4, 64):
        yield "windows", str(count), windows("wikipedia", count, LENGTH), 0
    for length in LENGTHS:
        yield "length", str(length), windows("wikipedia", TOKENS // length, length), 0
    for skipped in SKIPPED:
        yield "positions skipped", str(skipped), base, skipped
    first = tokenizer.bos_token_id
    if first is not None:
        starts = bool((base[:, 0] == first).all())
        other = base[:, 1:] if starts else torch.cat([torch.full((len(base), 1), first), base], 1)
        yield "BOS", "none" if starts else "each window", other, 0


def study(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every setting, effort and number of layers; held-out losses by plan at the end."""
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    evaluators = {
        text: BypassEvaluator(
            model,
            token_windows(
                texts.halves(text, options.pool, options.seed).held_out,
                tokenizer,
                part="all",
                num_windows=options.held_out_windows,
                window_length=HELD_OUT_LENGTH,
            ).tokens,
        )
        for text in HELD_OUT
    }
    known: dict[tuple[str, tuple[int, ...]], list[float]] = {}

    def losses(text: str, plan: tuple[int, ...]) -> list[float]:
        if (text, plan) not in known:
            found = torch.tensor(evaluators[text].losses(plan), dtype=torch.float64)
            known[text, plan] = [round(value, 5) for value in found.tolist()]
        return known[text, plan]

    yield {"axis": "dense", **{text: losses(text, ()) for text in HELD_OUT}}
    for axis, setting, windows, skipped in settings(tokenizer, options):
        each = max(1, 4096 // windows.shape[1])
        scores = score(model, list(windows.split(each)), skip_leading=skipped, progress=False)
        for share in SHARES:
            count = max(1, round(share * scores.num_layers))
            for effort in EFFORTS:
                plan = make_plan(
                    scores, count, model=model, windows=windows, effort=effort, evaluation_windows=4
                ).removed
                found = tuple(sorted(plan))
                print(f"  {axis} {setting}, {effort}, {count}: {found}", flush=True)
                yield {
                    "axis": axis,
                    "setting": setting,
                    "tokens": windows.numel(),
                    "effort": effort,
                    "removed": count,
                    "layers": " ".join(map(str, found)),
                    **{text: losses(text, found) for text in HELD_OUT},
                }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a directory, or demo")
    parser.add_argument("--pool", choices=texts.POOLS, default="reporting")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-out-windows", type=int, default=12)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


@silent()
def main() -> None:
    """Study one model, and write after every row."""
    options = arguments()
    result: dict[str, Any] = {
        "model": quality.model_record(options.model),
        "settings": {k: v for k, v in vars(options).items() if k not in ("model", "output")},
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        **provenance.origin(["planning", "calibration pass"]),
        "rows": [],
    }
    for row in study(options):
        result["rows"].append(row)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
