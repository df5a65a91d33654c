"""`simdiff plan`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff.cli.options import add_evaluation, add_output, add_plan, plan_options
from simdiff.cli.output import on_standard_output, plan_lines, show, write_output
from simdiff.cli.parsing import CommandParser
from simdiff.cli.streaming import add_stream, stream_options
from simdiff.planning.names import UNITS

if TYPE_CHECKING:
    from simdiff.scoring.scores import LayerScores

TEXT = "Choose the layers that go, from saved scores; a model helps, but is not needed."
SHARED = True
INTERRUPTED = "no plan was written; a search goes on where it stopped if it is started again"


def add(sub: CommandParser) -> None:
    """The options of `simdiff plan`."""
    sub.add_argument("scores", type=Path, metavar="SCORES", help="file written by `simdiff score`")
    add_plan(sub)
    group = sub.group("layers to remove")
    group.add_argument(
        "--unit",
        choices=UNITS,
        default=UNITS[0],
        help="what goes: whole layers, or attention or MLP sub-layers or both against each other "
        "(then --num-layers counts sub-layers, and the scores are of `simdiff score --sublayers`)",
    )
    group.add_argument(
        "--model",
        help="the model of the scores: simdiff then chooses among a few plans by perplexity on the "
        "text that calibrated",
    )
    add_stream(sub)
    add_evaluation(sub, 4, " (0: no evaluation)")
    add_output(
        sub,
        "file to write, such as plan.json; - is standard output (default: the plan is shown only)",
        required=False,
    )


def needs_torch(arguments: argparse.Namespace) -> bool:
    """Scores are numbers; only a model needs more."""
    return arguments.model is not None


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff plan`."""
    from simdiff.io import ranks
    from simdiff.planning.options import search_journal
    from simdiff.report.terminal.tables import layers_table
    from simdiff.scoring.scores import LayerScores

    scores = LayerScores.load(arguments.scores)
    if arguments.unit != "layer":
        return _of_sublayers(arguments, scores)
    options = plan_options(arguments)
    kept = arguments.output is not None and not on_standard_output(arguments)
    journal = search_journal(arguments.output) if kept else None
    if arguments.model is None:
        plan = options.plan(scores)
    else:
        from simdiff.jobs.calibrate import calibrated
        from simdiff.models.sweep import remove_states

        model, windows = calibrated(arguments.model, scores, stream=stream_options(arguments))
        plan = options.plan(scores, model, windows, journal)
    write_output(arguments, plan.to_dict())
    if arguments.model is not None:
        remove_states(model)
    if journal is not None:
        ranks.first(partial(journal.unlink, missing_ok=True))
    show(
        arguments,
        plan.to_dict(),
        layers_table(scores, plan),
        *plan_lines(plan),
        _last_line(arguments),
    )


def _last_line(arguments: argparse.Namespace) -> str:
    if arguments.output is None:
        return "This is a preview; --output plan.json keeps the plan."
    return f"Plan: {arguments.output}"


def _of_sublayers(arguments: argparse.Namespace, scores: LayerScores) -> None:
    """`--unit` attention, mlp or sublayer."""
    from simdiff.errors import SimdiffError
    from simdiff.io import ranks
    from simdiff.report.terminal.sublayers import plan_lines, sublayers_table
    from simdiff.sublayers.plan import plan_sublayers

    others = ("ratio", "parameter_ratio", "speed_up", "max_memory", "max_blocks")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name)]
    if arguments.num_layers is None or given or arguments.selection not in (None, "lowest"):
        raise SimdiffError(
            f"--unit {arguments.unit} must go with --num-layers, a number of sub-layers, of which "
            f"the lowest are removed; got {', '.join(given) or 'no --num-layers'}"
        )
    model, windows, journal = None, None, None
    if arguments.model is not None:
        from simdiff.jobs.calibrate import calibrated
        from simdiff.planning.options import search_journal

        model, windows = calibrated(arguments.model, scores)
        kept = arguments.output is not None and not on_standard_output(arguments)
        journal = search_journal(arguments.output) if kept else None
    plan = plan_sublayers(
        scores,
        arguments.unit,
        arguments.num_layers,
        criterion=arguments.criterion,
        alpha=arguments.alpha,
        protect=arguments.protect,
        random_seed=arguments.random_seed,
        model=model,
        windows=windows,
        effort=arguments.effort,
        evaluation_windows=arguments.evaluation_windows,
        journal=journal,
    )
    write_output(arguments, plan.to_dict())
    if journal is not None:
        ranks.first(partial(journal.unlink, missing_ok=True))
    show(
        arguments,
        plan.to_dict(),
        sublayers_table(scores, plan),
        *plan_lines(plan),
        _last_line(arguments),
    )
