"""`simdiff recover`."""

from __future__ import annotations

import argparse
from typing import Any

from simdiff.cli.config import config_text
from simdiff.cli.layers import add_plan_source, plan_source
from simdiff.cli.log import add_log, log_of
from simdiff.cli.options import (
    add_held_out,
    add_model,
    add_output,
    add_text,
    text_of,
    text_options,
)
from simdiff.cli.output import show
from simdiff.cli.parsing import CommandParser, rare
from simdiff.cli.streaming import add_stream, stream_options
from simdiff.recovery.methods import METHODS, check_option_names
from simdiff.recovery.training.option_table import TRAINING_OPTIONS

TEXT = "Cut a model by a plan and repair the layers that stay; writes a stock checkpoint."

# Shown by the first help; the others are those of the preset for most trainings.
_COMMON = ("preset",)


def interrupted(arguments: argparse.Namespace) -> str:
    """What an interruption leaves: the state of what trains, or is streamed."""
    if arguments.method == "closed-form":
        return "nothing was written; of a streamed model, what is finished serves the same command"
    return (
        "nothing was written; given again the command goes on from the last state of the training, "
        "if it had begun, with --restart it begins anew"
    )


def add(sub: CommandParser) -> None:
    """The options of `simdiff recover`."""
    add_model(sub)
    add_stream(sub)
    methods = "; ".join(f"{name}: {method.text}" for name, method in METHODS.items())
    group = sub.group("recovery")
    add_plan_source(sub, "recovery")
    rare(
        group,
        "--choose",
        type=int,
        metavar="N",
        help="repair the N best plans that the search of --plan evaluated, in closed form, and "
        "take the one of lowest loss after it",
    )
    group.add_argument("--method", choices=tuple(METHODS), default="closed-form", help=methods)
    add_text(sub, num_windows=80)
    add_held_out(sub)
    _add_closed_form(sub)
    _add_training(sub)
    add_output(sub, "new directory for the recovered checkpoint, its record and report.html")
    add_log(sub)


def _add_closed_form(sub: CommandParser) -> None:
    """Options of one method; absent where not given, their defaults are the method's."""
    group = sub.group("closed-form")
    rare(
        group,
        "--features",
        choices=("auto", "inputs", "outputs"),
        default=argparse.SUPPRESS,
        help="what the correction of a projection is linear in: its inputs, its outputs (cheaper, "
        "weaker), or outputs only where inputs would take over 8 GiB (default: auto)",
    )
    rare(
        group,
        "--norm-power",
        type=float,
        metavar="P",
        default=argparse.SUPPRESS,
        help="tokens count by the dense state's norm to the power -P (default: 1.5)",
    )
    rare(
        group,
        "--after-cut",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="layers behind each cut that are corrected, beside the one before it (default: 2)",
    )


def _add_training(sub: CommandParser) -> None:
    """Options of the methods that train; their defaults are the preset's."""
    group = sub.group("training (lora, distillation, partial); defaults are those of the preset")
    for name, option in TRAINING_OPTIONS.items():
        kind = option.kind
        kinds: dict[str, Any] = {"default": argparse.SUPPRESS, "help": option.text}
        if isinstance(kind, tuple):
            kinds["choices"] = kind
        elif kind is bool:
            kinds["action"] = "store_true"
        else:
            kinds |= {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}
        flag = f"--{name.replace('_', '-')}"
        if name in _COMMON:
            group.add_argument(flag, **kinds)
        else:
            rare(group, flag, **kinds)
    rare(
        group,
        "--restart",
        action="store_true",
        help="forget what an interrupted training left in OUTPUT.training",
    )


def method_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of methods that were given, by the names in `Method.options`."""
    names = {name for method in METHODS.values() for name in method.options}
    given = {name: getattr(arguments, name, None) for name in sorted(names)}
    return {name: value for name, value in given.items() if value is not None}


def check(arguments: argparse.Namespace) -> None:
    """Refuse layers named twice or not at all, no text, and options of another method."""
    plan_source(arguments)
    check_option_names(arguments.method, method_options(arguments))
    text_of(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff recover`."""
    from simdiff.jobs.recover import recover
    from simdiff.jobs.tracking import recovery_tracked
    from simdiff.report.terminal.tables import recovery_table

    with log_of(arguments) as log:
        record = recover(
            arguments.model,
            arguments.output,
            plan=plan_source(arguments),
            method=arguments.method,
            text=text_options(arguments),
            choose=arguments.choose,
            held_out_source=arguments.held_out,
            options=method_options(arguments),
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            device=arguments.device,
            stream=stream_options(arguments),
            overwrite=arguments.overwrite,
            restart=arguments.restart,
            config=config_text(arguments),
            told=log.metrics,
        )
        recovery_tracked(log, record, arguments.output)
    show(
        arguments,
        record.to_dict() | {"output": str(arguments.output)},
        recovery_table(record),
        *(f"Note: {note}." for note in record.notes),
        f"Checkpoint: {arguments.output}",
        f"Report:     {arguments.output / 'report.html'}",
    )
