"""Options that several commands share, and what they asked for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff.cli.parsing import CommandParser, Several, layer_list, names, rare, weights
from simdiff.errors import SimdiffError
from simdiff.planning.entry_points import known_criteria, known_selections
from simdiff.planning.names import (
    ABOUT,
    DEFAULT_ALPHA,
    DEFAULT_CRITERION,
    EFFORTS,
    NUM_RESAMPLES,
)

if TYPE_CHECKING:
    from simdiff.data.documents import Text
    from simdiff.data.text_options import TextOptions
    from simdiff.jobs.stability import ScoringOptions
    from simdiff.planning.options import PlanOptions

DEMO = "demo"
"""`simdiff.data.demo.DEMO`."""


def add_model(sub: CommandParser, several: bool = False) -> None:
    """The model argument, dtype, device and threads."""
    text = "a local directory, a hub name, or 'demo' (SmolLM2-135M-Instruct)"
    if several:
        sub.add_argument("models", nargs="+", metavar="MODEL", help=text)
    else:
        sub.add_argument("model", metavar="MODEL", help=text)
    add_placement(sub)


def add_placement(sub: CommandParser) -> None:
    """Where and in which dtype a model runs, and on how many threads."""
    group = sub.group("model")
    group.add_argument(
        "--device",
        help="where the model runs: cpu, cuda, cuda:N, or auto, spread over all GPUs (default: the "
        "GPU if there is one)",
    )
    rare(
        group,
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the weights in memory; auto keeps that of the files",
    )
    add_threads(group)


def add_threads(group: argparse._ArgumentGroup) -> None:
    """How many threads torch runs on."""
    rare(
        group,
        "--threads",
        type=int,
        metavar="N",
        help="number of threads on the CPU (default: one for each core)",
    )


def add_text(sub: CommandParser, *, num_windows: int = 32, optional: bool = False) -> None:
    """Which text, and how much of it unless given; `optional` where the command may do without."""
    missing = "" if optional else "; may be left out for the model 'demo' alone, which reads 'demo'"
    add_source(sub, f"; its first half calibrates, its second is held out{missing}")
    group = sub.group("text")
    whole = " (0: all of the text)" if optional else ""
    group.add_argument(
        "--num-windows",
        "--windows",
        type=int,
        default=num_windows,
        metavar="N",
        help="number of windows of text to read" + whole,
    )
    rare(
        group,
        "--window-length",
        type=int,
        default=512,
        metavar="TOKENS",
        help="number of tokens in a window",
    )
    if not optional:
        add_batch_size(group, "windows per forward")


def add_source(sub: CommandParser, meant: str) -> None:
    """The texts, their columns and weights, and the seed; `meant` says what they are for."""
    group = sub.group("text")
    group.add_argument(
        "--text",
        action=Several,
        help="'demo', a text file (blank lines separate documents), a .jsonl file of objects with "
        '"text" or "messages", a Parquet or Arrow file, a folder of them, - for standard input, or '
        "hf:NAME[:CONFIG[:SPLIT]], a data set by name; given several times, texts are mixed"
        + meant,
    )
    rare(
        group,
        "--text-column",
        type=names,
        metavar="NAME",
        help="where the text or the messages stand in data sets, JSON Lines, Parquet and Arrow "
        "files (default: text); one name, or between commas one for each --text",
    )
    rare(
        group,
        "--text-weights",
        type=weights,
        metavar="X,Y",
        help="shares of several texts, in the order of --text (default: equal)",
    )
    rare(
        group,
        "--seed",
        type=int,
        default=0,
        help="seed of the shuffle of the text's documents; nothing else depends on it",
    )


def add_batch_size(group: argparse._ArgumentGroup, text: str) -> None:
    """How much is run at a time."""
    rare(group, "--batch-size", type=int, default=8, metavar="N", help=text)


def add_held_out(sub: CommandParser) -> None:
    """Another text to evaluate on."""
    sub.group("text").add_argument(
        "--held-out",
        metavar="TEXT",
        help="another text to evaluate on, whole (default: the half of --text that does not "
        "calibrate)",
    )


def add_amount(sub: CommandParser, title: str) -> argparse._MutuallyExclusiveGroup:
    """How many layers go, in the group of this title; returns what excludes it."""
    amount = sub.group(title).add_mutually_exclusive_group()
    amount.add_argument("--num-layers", type=int, metavar="N", help="number of layers to remove")
    amount.add_argument(
        "--ratio",
        type=float,
        help="share of the layers to remove, rounded down (0.25 if no amount is given)",
    )
    return amount


def add_criterion(sub: CommandParser) -> None:
    """By what layers are chosen."""
    sub.group("layers to remove").add_argument(
        "--criterion",
        choices=known_criteria(),
        default=DEFAULT_CRITERION,
        metavar="NAME",
        help="what makes a layer important, see below",
    )
    add_criteria_text(sub)


def add_criteria_text(sub: CommandParser) -> None:
    """End the help with a line for every criterion."""
    about = {name: ABOUT.get(name, "of another package") for name in known_criteria()}
    lines = "\n".join(f"  {name:<21}{text}" for name, text in about.items())
    sub.epilog = f"criteria:\n{lines}\n\nFormulas and sources: docs/method.md."


def add_choice(sub: CommandParser) -> None:
    """What several commands take to choose layers by: alpha, protected layers, the random seed."""
    group = sub.group("layers to remove")
    rare(
        group,
        "--protect",
        type=layer_list,
        default=(),
        metavar="LAYERS",
        help="layers that stay, such as 0,1,28-29 (counted from 0)",
    )
    rare(
        group,
        "--alpha",
        type=float,
        default=DEFAULT_ALPHA,
        help="weight of difference against similarity, 0 to 1, for the paper's criteria; those "
        "named -swept sweep it",
    )
    rare(
        group,
        "--random-seed",
        type=int,
        default=0,
        metavar="SEED",
        help="seed of the criterion random; nothing else depends on it",
    )


def add_plan(sub: CommandParser) -> None:
    """Criterion, and how many layers go."""
    add_criterion(sub)
    amount = add_amount(sub, "layers to remove")
    rare(
        amount,
        "--parameter-ratio",
        type=float,
        metavar="RATIO",
        help="share of all parameters to remove, at least",
    )
    rare(
        amount,
        "--speed-up",
        type=float,
        metavar="FACTOR",
        help="as many layers as decoding at batch 1 needs to get so much faster, predicted from "
        "the bytes it reads",
    )
    rare(
        amount,
        "--max-memory",
        type=float,
        metavar="GB",
        help="as many layers as the weights need to fit (1e9 bytes)",
    )
    add_choice(sub)
    group = sub.group("layers to remove")
    rare(
        group,
        "--selection",
        choices=known_selections(),
        help="the K lowest layers, the best contiguous block, or the best disjoint blocks "
        "(default: blocks for simdiff, contiguous for criteria of blocks, lowest for the others)",
    )
    rare(
        group,
        "--max-blocks",
        type=int,
        metavar="N",
        help="at most N separate blocks (with --selection blocks)",
    )
    rare(
        group,
        "--bootstrap",
        type=int,
        default=NUM_RESAMPLES,
        metavar="N",
        help="number of draws of the calibration sequences that tell how sure the plan is; 0 "
        "skips them",
    )


def add_scoring(sub: CommandParser) -> None:
    """What the calibration pass skips, and whether it reads until the plan is stable."""
    group = sub.group("calibration")
    rare(
        group,
        "--skip-leading",
        type=int,
        default=0,
        metavar="N",
        help="keep the statistics of the first N tokens of every window apart: a massive "
        "activation there dominates squared differences",
    )
    rare(
        group,
        "--groups",
        type=int,
        default=128,
        metavar="N",
        help="number of groups of windows whose statistics are kept apart for the bootstrap; with "
        "N windows or fewer every window is a group",
    )
    rare(
        group,
        "--max-state-bytes",
        metavar="SIZE",
        help="most that the hidden states of one forward may take, in bytes or such as 4GB; fewer "
        "windows run at a time where they would take more",
    )
    rare(
        group,
        "--calibrate-until-stable",
        action="store_true",
        help="read more windows, twice as many each time, until the plan of scores alone comes "
        "again in enough bootstrap draws; --num-windows are those of the first check",
    )
    rare(
        group,
        "--stable-confidence",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="share of the bootstrap draws that must give the same plan",
    )
    rare(
        group,
        "--max-windows",
        type=int,
        default=128,
        metavar="N",
        help="read at most N windows until the plan is stable",
    )


def add_evaluation(sub: CommandParser, default: int | None, text: str) -> None:
    """How much simdiff spends, and how much text searches read; `text` ends the help."""
    group = sub.group("layers to remove")
    group.add_argument(
        "--effort",
        choices=tuple(EFFORTS),
        help="what simdiff spends on its plan, of what greedy search by perplexity costs: nothing "
        "but the scores, 1/50 (quick, default for a streamed model), a fifth (normal, default "
        "otherwise), or as much",
    )
    rare(
        group,
        "--evaluation-windows",
        type=int,
        default=default,
        metavar="N",
        help="calibration windows that searches by perplexity read, and the greedy search by which "
        f"--effort is measured{text}",
    )


def add_output(sub: CommandParser, text: str, *, required: bool = True) -> None:
    """Where the result goes."""
    group = sub.group("output")
    group.add_argument("--output", "-o", type=Path, required=required, metavar="PATH", help=text)
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier output of the same kind, which simdiff wrote",
    )


def text_of(arguments: argparse.Namespace) -> Text:
    """The text to read: the demo's own for the demo model alone.

    Raises:
        SimdiffError: a model of the user's own, and no text.
    """
    if arguments.text is not None:
        from simdiff.data.documents import text_of_words

        texts = arguments.text if isinstance(arguments.text, list) else [arguments.text]
        more = [getattr(arguments, f"text_{name}", None) or () for name in ("column", "weights")]
        return text_of_words(texts, *more)
    if arguments.model == DEMO:
        return DEMO
    raise SimdiffError(
        "--text must be given for a model of your own: a text file, a .jsonl file, a folder, - for "
        "standard input, or 'demo' for the passages that come with the demo model"
    )


def text_options(arguments: argparse.Namespace) -> TextOptions:
    """What `add_text` asked for."""
    from simdiff.data.text_options import TextOptions

    return TextOptions(
        text_of(arguments), arguments.num_windows, arguments.window_length, arguments.seed
    )


def plan_options(arguments: argparse.Namespace) -> PlanOptions:
    """What `add_plan` asked for."""
    from simdiff.planning.budget import Budget
    from simdiff.planning.options import PlanOptions

    return PlanOptions(
        criterion=arguments.criterion,
        alpha=arguments.alpha,
        budget=Budget(
            num_layers=arguments.num_layers,
            ratio=arguments.ratio,
            parameter_ratio=arguments.parameter_ratio,
            speed_up=arguments.speed_up,
            max_memory=arguments.max_memory,
        ),
        protect=arguments.protect,
        selection=arguments.selection,
        max_blocks=arguments.max_blocks,
        random_seed=arguments.random_seed,
        evaluation_windows=arguments.evaluation_windows,
        effort=arguments.effort,
        bootstrap=arguments.bootstrap,
    )


def scoring_options(arguments: argparse.Namespace) -> ScoringOptions:
    """What `add_scoring` asked for; refuses what cannot be."""
    from simdiff.checkpoints.shards import parse_size
    from simdiff.jobs.stability import ScoringOptions

    memory = arguments.max_state_bytes
    options = ScoringOptions(
        max_state_bytes=None if memory is None else parse_size(memory),
        skip_leading=arguments.skip_leading,
        groups=arguments.groups,
        until_stable=arguments.calibrate_until_stable,
        confidence=arguments.stable_confidence,
        max_windows=arguments.max_windows,
        sublayers=getattr(arguments, "sublayers", False),
    )
    options.check(arguments.num_windows, arguments.window_length)
    return options
