"""`simdiff score`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff.cli.options import (
    add_amount,
    add_model,
    add_output,
    add_scoring,
    add_text,
    scoring_options,
    text_of,
    text_options,
)
from simdiff.cli.output import show, write_output
from simdiff.cli.parsing import CommandParser, rare
from simdiff.cli.streaming import add_stream, stream_options
from simdiff.errors import SimdiffError, number_of

if TYPE_CHECKING:
    from simdiff.scoring.scores import LayerScores

TEXT = "Score every layer on calibration text; write scores.json."
SHARED = True
INTERRUPTED = (
    "nothing was written; a streamed model goes on from its last finished layer if it is started "
    "again"
)


def add(sub: CommandParser) -> None:
    """The options of `simdiff score`."""
    add_model(sub)
    add_stream(sub)
    add_text(sub)
    add_scoring(sub)
    sub.group("calibration").add_argument(
        "--sublayers",
        action="store_true",
        help="also score the attention and the MLP of every layer, for `simdiff plan --unit`",
    )
    rare(
        sub.group("calibration"),
        "--states",
        type=Path,
        metavar="DIR",
        help="score hidden states that were saved elsewhere, in place of a text: a .safetensors "
        "file for each prompt with hidden_states (tokens, layers + 1, hidden_size) and token_ids, "
        "as vLLM writes them; of MODEL only the config is read",
    )
    stable = "the plan that has to be stable, with --calibrate-until-stable"
    sub.group(stable, "Of the default criterion; `simdiff run` takes any other.")
    add_amount(sub, stable)
    add_output(sub, "file to write, such as scores.json; - is standard output")


def check(arguments: argparse.Namespace) -> None:
    """Refuse a model of the user's own without a text or saved states."""
    if arguments.states is None:
        text_of(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff score`."""
    from simdiff.jobs.calibrate import calibrate
    from simdiff.models.loading import load_model
    from simdiff.models.sweep import remove_states
    from simdiff.planning.budget import Budget
    from simdiff.planning.options import PlanOptions

    if arguments.states is not None:
        return _of_states(arguments)
    scoring = scoring_options(arguments)
    plan = PlanOptions(budget=Budget(num_layers=arguments.num_layers, ratio=arguments.ratio))
    text = text_options(arguments)
    text.check()
    model, tokenizer = load_model(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        stream=stream_options(arguments),
    )
    scores, _ = calibrate(
        model,
        tokenizer,
        arguments.model,
        text=text,
        plan=plan,
        scoring=scoring,
        batch_size=arguments.batch_size,
    )
    _show(arguments, scores)
    remove_states(model)


def _of_states(arguments: argparse.Namespace) -> None:
    """From saved states; what needs the text or the model itself is refused."""
    from simdiff.jobs.states import score_states

    needed = {
        "--text": arguments.text is not None,
        "--sublayers": arguments.sublayers,
        "--calibrate-until-stable": arguments.calibrate_until_stable,
    }
    if any(needed.values()):
        raise SimdiffError(
            "--states has the states that entered and left whole layers, and no text: not with "
            + ", ".join(option for option, given in needed.items() if given)
        )
    scores = score_states(
        arguments.model,
        arguments.states,
        device=arguments.device,
        groups=arguments.groups,
        skip_leading=arguments.skip_leading,
    )
    _show(arguments, scores)


def _show(arguments: argparse.Namespace, scores: LayerScores) -> None:
    """Write scores and print them."""
    from simdiff.report.terminal.sublayers import sublayers_table
    from simdiff.report.terminal.tables import leading_table, scores_table

    write_output(arguments, scores.to_dict())
    notes = [] if scores.stability is None else [f"Note: {scores.stability['note']}."]
    tables = [scores_table(scores), *([leading_table(scores)] if scores.leading else [])]
    tables += [sublayers_table(scores)] if arguments.sublayers else []
    read = scores.calibration
    what = (
        f"{number_of(read['num_windows'], 'file')} with {read['num_tokens']} tokens in "
        f"{read['states']}"
        if "states" in read
        else f"{number_of(read['num_windows'], 'window')} of {read['window_length']} tokens of the "
        f"{read['part']} half of {read['source']}"
    )
    show(
        arguments,
        scores.to_dict(),
        *tables,
        f"Read: {what}. What the columns mean: docs/guide.md.",
        *notes,
        f"Scores: {arguments.output}",
        f"Next: simdiff plan {shlex.quote(str(arguments.output))} --model "
        f"{shlex.quote(arguments.model)} --num-layers N",
    )
