"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simdiff.data.text_options import TextOptions
    from simdiff.jobs.stability import ScoringOptions
    from simdiff.planning.options import PlanOptions

CRITERIA = (
    "simdiff",
    "simdiff-mssd",
    "simdiff-masd",
    "simdiff-max",
    "block-influence",
    "relative-magnitude",
    "norm-ratio",
    "last-n",
    "random",
    "cosine-block",
    "angular-block",
    "angular-block-last",
)
COMPARED = (
    *CRITERIA,
    "simdiff-mssd-swept",
    "simdiff-masd-swept",
    "simdiff-max-swept",
    "one-shot-perplexity",
    "greedy-perplexity",
)
SELECTIONS = ("lowest", "contiguous", "blocks")


def add_model(sub: argparse.ArgumentParser, several: bool = False) -> None:
    """The model argument, dtype, device and threads."""
    text = "a local directory, a hub name, or 'demo' (SmolLM2-135M-Instruct)"
    if several:
        sub.add_argument("models", nargs="+", metavar="model", help=text)
    else:
        sub.add_argument("model", help=text)
    sub.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights in memory; auto is as stored",
    )
    sub.add_argument(
        "--device",
        help="cpu, cuda, cuda:N, or auto (spread over all GPUs); the GPU "
        "if there is one and this is not given",
    )
    sub.add_argument("--threads", type=int, help="of the CPU (default: as many as cores)")


def add_text(
    sub: argparse.ArgumentParser, default: str | None = None, optional: bool = False
) -> None:
    """Which text, and how much of it."""
    sub.add_argument(
        "--text",
        default=default,
        required=default is None and not optional,
        help="'demo', a text file (blank lines separate documents), or a .jsonl file of objects "
        'with "text"; one half of the documents calibrates, the other is held out',
    )
    whole = " (0: all of the text)" if sub.prog.split()[-1] == "eval" else ""
    sub.add_argument("--windows", type=int, default=32, help="number of windows of text" + whole)
    sub.add_argument("--window-length", type=int, default=512, help="tokens in a window")
    sub.add_argument("--seed", type=int, default=0, help="of the shuffle of documents")
    if sub.prog.split()[-1] != "eval":
        sub.add_argument("--batch-size", type=int, default=8, help="windows per forward")


def add_plan(sub: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Criterion, and how many layers go."""
    sub.add_argument(
        "--criterion",
        choices=COMPARED,
        default=CRITERIA[0],
        help="what makes a layer important; those of perplexity, and those that sweep "
        "alpha, run the model without layers",
    )
    sub.add_argument(
        "--alpha", type=float, default=0.5, help="weight of difference against similarity, 0 to 1"
    )
    amount = sub.add_mutually_exclusive_group()
    amount.add_argument(
        "--ratio",
        type=float,
        help="share of the layers to remove, rounded down "
        "(0.25 if neither this nor --num-layers is given)",
    )
    amount.add_argument("--num-layers", type=int, help="number of layers to remove")
    amount.add_argument(
        "--parameter-ratio",
        type=float,
        metavar="RATIO",
        help="share of all parameters to remove, at least",
    )
    amount.add_argument(
        "--speed-up",
        type=float,
        metavar="FACTOR",
        help="as many layers as decoding at batch 1 needs to get so much faster, "
        "predicted from the bytes it reads",
    )
    amount.add_argument(
        "--max-memory",
        type=float,
        metavar="GB",
        help="as many layers as the weights need to fit (1e9 bytes)",
    )
    sub.add_argument(
        "--random-seed", type=int, default=0, metavar="SEED", help="of the criterion random"
    )
    sub.add_argument(
        "--selection",
        choices=SELECTIONS,
        help="the K lowest layers, the best "
        "contiguous block, or the best disjoint blocks (default: blocks for simdiff, "
        "contiguous for criteria of blocks, lowest for the others)",
    )
    sub.add_argument(
        "--max-blocks",
        type=int,
        metavar="N",
        help="at most N separate blocks (with --selection blocks)",
    )
    sub.add_argument(
        "--protect",
        type=layer_list,
        default=(),
        metavar="LAYERS",
        help="layers that stay, such as 0,1,28-29 (counted from 0)",
    )

    sub.add_argument(
        "--bootstrap",
        type=int,
        default=500,
        metavar="N",
        help="draws of the calibration sequences that tell how sure the plan is; 0 makes none",
    )


def add_scoring(sub: argparse.ArgumentParser) -> None:
    """What the calibration pass skips, and whether it reads until the plan is stable."""
    sub.add_argument(
        "--skip-leading",
        type=int,
        default=0,
        metavar="N",
        help="keep the statistics of the first N tokens of every window apart: a "
        "massive activation there dominates squared differences",
    )
    sub.add_argument(
        "--groups",
        type=int,
        default=128,
        metavar="N",
        help="groups of windows whose statistics are kept for the bootstrap; of no "
        "more windows than that, each is a group",
    )
    sub.add_argument(
        "--state-memory",
        metavar="SIZE",
        help="most that the hidden states of one forward may take, in bytes or such "
        "as 4GB; fewer windows run at a time where they would take more",
    )
    sub.add_argument(
        "--calibrate-until-stable",
        action="store_true",
        help="read more windows, twice as many each time, until the plan of scores "
        "alone comes again in enough bootstrap draws; --windows are those of the "
        "first check",
    )
    sub.add_argument(
        "--stable-confidence",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="of the draws that must give the same plan",
    )
    sub.add_argument(
        "--max-windows",
        type=int,
        default=128,
        metavar="N",
        help="read no more than that until the plan is stable",
    )


def add_output(sub: argparse.ArgumentParser, text: str) -> None:
    """Where the result goes."""
    sub.add_argument("--output", "-o", type=Path, required=True, help=text)
    sub.add_argument("--overwrite", action="store_true", help="replace an earlier output")


def add_evaluation(sub: argparse.ArgumentParser) -> None:
    """How a plan is chosen where the model is at hand."""
    sub.add_argument(
        "--evaluation-windows",
        type=int,
        default=4,
        metavar="N",
        help="calibration windows that searches by perplexity read; simdiff spends "
        "1/50 of greedy search on improving its plan (0: no evaluation)",
    )


def layer_list(text: str) -> tuple[int, ...]:
    """Numbers such as 0,1,28-29."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            layers += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"must be layers such as 0,1,28-29, got {text!r}"
            ) from None
    return tuple(dict.fromkeys(layers))


def text_options(arguments: argparse.Namespace) -> TextOptions:
    """What `add_text` asked for."""
    from simdiff.data.text_options import TextOptions

    return TextOptions(arguments.text, arguments.windows, arguments.window_length, arguments.seed)


def plan_options(arguments: argparse.Namespace) -> PlanOptions:
    """What `add_plan` asked for."""
    from simdiff.planning.budget import Budget
    from simdiff.planning.options import PlanOptions

    memory = arguments.max_memory
    return PlanOptions(
        criterion=arguments.criterion,
        alpha=arguments.alpha,
        budget=Budget(
            num_layers=arguments.num_layers,
            ratio=arguments.ratio,
            parameter_ratio=arguments.parameter_ratio,
            speed_up=arguments.speed_up,
            memory=None if memory is None else 1e9 * memory,
        ),
        protect=arguments.protect,
        selection=arguments.selection,
        max_blocks=arguments.max_blocks,
        random_seed=arguments.random_seed,
        evaluation_windows=getattr(arguments, "evaluation_windows", 0),
        num_resamples=arguments.bootstrap,
    )


def scoring_options(arguments: argparse.Namespace) -> ScoringOptions:
    """What `add_scoring` asked for; refuses what cannot be."""
    from simdiff.checkpoints.shards import parse_size
    from simdiff.jobs.stability import ScoringOptions

    memory = arguments.state_memory
    options = ScoringOptions(
        max_state_bytes=None if memory is None else parse_size(memory),
        skip_leading=arguments.skip_leading,
        groups=arguments.groups,
        until_stable=arguments.calibrate_until_stable,
        confidence=arguments.stable_confidence,
        max_windows=arguments.max_windows,
        sublayers=getattr(arguments, "sublayers", False),
    )
    options.check(arguments.windows, arguments.window_length)
    return options


def show(arguments: argparse.Namespace, content: dict[str, Any], *tables: Any) -> None:
    """Print either JSON or what people read."""
    if arguments.json:
        print(json.dumps(content, indent=1, allow_nan=False))
        return
    from rich.console import Console

    # Away from a terminal a table keeps its own width instead of being cut to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    for table in tables:
        console.print(table)


def plan_lines(plan: Any) -> list[str]:
    """What went and why, for people."""
    order = ", ".join(map(str, plan.removed))
    alpha = "" if plan.alpha is None else f", alpha = {plan.alpha:g}"
    return [
        f"Removed, the least important first: {order}",
        f"Why: {plan.selection} by {plan.criterion}{alpha}: {plan.formula}",
        *(f"Note: {note}." for note in plan.notes),
        "",
    ]
