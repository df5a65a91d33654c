"""`simdiff recover`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from simdiff.cli.options import add_model, add_output, add_text, show, text_options
from simdiff.recovery.methods import METHODS, STARTS, TRAINING_PRESETS

TEXT = "Cut a model by a plan and repair the layers that stay; writes a stock checkpoint."


INTERRUPTED = "give the same command again: a training goes on where it stopped"

# By name: type, or choices, and what help says. Defaults are those of the preset.
TRAINING_OPTIONS: dict[str, tuple[Any, str]] = {
    "preset": (
        tuple(dict.fromkeys(sum(TRAINING_PRESETS.values(), ()))),
        "recipe that the other options change: text and paper of lora, distillation",
    ),
    "start": (
        STARTS,
        "train from the closed form's weights, or from the plain cut, as the preset paper does",
    ),
    "training_text": (
        str,
        "other text to train on (its calibration half), or .json or .jsonl "
        "of objects with instruction, input and output",
    ),
    "examples": (int, "train on at most so many examples"),
    "train_on_prompts": (bool, "of instructions, predict the prompts too"),
    "train_length": (int, "tokens in an example"),
    "train_batch_size": (int, "examples in a step"),
    "micro_batch_size": (int, "examples in a forward; gradients are added up"),
    "train_seed": (int, "of adapters, dropout and the order of examples"),
    "rank": (int, "of the adapters"),
    "alpha": (float, "the adapters' output is multiplied by alpha / rank"),
    "dropout": (float, "of an adapter's input"),
    "targets": (str, "last names of the projections, by commas (default: all linear ones)"),
    "distillation_weight": (
        float,
        "of the divergence from the dense model, 0 to 1; the rest is the cross-entropy of the text",
    ),
    "temperature": (float, "of the distillation"),
    "epochs": (float, "passes over the examples"),
    "steps": (int, "so many updates, instead of epochs"),
    "max_minutes": (float, "as many steps as fit, by the measured time of one"),
    "learning_rate": (float, "at its peak"),
    "schedule": (("cosine", "linear", "constant"), "of the learning rate after the warm-up"),
    "warmup_steps": (int, "steps until the peak"),
    "weight_decay": (float, "of AdamW"),
    "max_gradient_norm": (float, "longer gradients are shortened to it"),
    "set_apart": (int, "examples that are not trained on, to choose the best weights by"),
    "evaluations": (int, "on the examples set apart, over the whole training"),
    "patience": (int, "evaluations without a better one that end training; 0 never"),
    "checkpoint_minutes": (float, "between states that an interrupted training goes on from"),
    "gradient_checkpointing": (bool, "compute activations twice instead of keeping them"),
    "compute_dtype": (
        ("auto", "float32", "bfloat16"),
        "of the products; auto is bfloat16 where it is fast",
    ),
}


def add(sub: argparse.ArgumentParser) -> None:
    """The options of `simdiff recover`."""
    add_model(sub)
    sub.add_argument("--plan", type=Path, required=True, help="file written by `simdiff plan`")
    methods = "; ".join(f"{name}: {method.text}" for name, method in METHODS.items())
    sub.add_argument("--method", choices=tuple(METHODS), default="closed-form", help=methods)
    add_text(sub)
    sub.add_argument(
        "--held-out",
        metavar="TEXT",
        help="another text to evaluate on, whole (default: the held-out half of --text)",
    )
    add_output(sub, "new directory for the recovered checkpoint")
    _add_method_options(sub)
    sub.set_defaults(windows=64)


def _add_method_options(sub: argparse.ArgumentParser) -> None:
    """Options of single methods; None where not given, their defaults are the method's."""
    group = sub.add_argument_group("closed-form")
    group.add_argument(
        "--features",
        choices=("auto", "inputs", "outputs"),
        default=argparse.SUPPRESS,
        help="what the correction of a projection is "
        "linear in: its inputs, its outputs (cheaper, weaker), or outputs only "
        "where inputs would take over 8 GiB (default: auto)",
    )
    group.add_argument(
        "--norm-power",
        type=float,
        metavar="P",
        default=argparse.SUPPRESS,
        help="tokens count by the dense state's norm to the power -P (default: 2)",
    )
    training = sub.add_argument_group("training (lora, distillation)")
    for name, (kind, text) in TRAINING_OPTIONS.items():
        kinds: dict[str, Any] = {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}
        if kind is bool:
            kinds = {"action": "store_true"}
        elif isinstance(kind, tuple):
            kinds = {"choices": kind}
        flag = f"--{name.replace('_', '-')}"
        training.add_argument(flag, **kinds, default=argparse.SUPPRESS, help=text)
    training.add_argument(
        "--restart",
        action="store_true",
        help="forget what an interrupted training left in OUTPUT.training",
    )


def method_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of methods that were given, by the names in `Method.options`."""
    names = {name for method in METHODS.values() for name in method.options}
    given = {name: getattr(arguments, name, None) for name in sorted(names)}
    return {name: value for name, value in given.items() if value is not None}


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff recover`."""
    from simdiff.jobs.recover import recover
    from simdiff.planning.plan import PruningPlan
    from simdiff.report.terminal.tables import recovery_table

    record = recover(
        arguments.model,
        arguments.output,
        plan=PruningPlan.load(arguments.plan),
        method=arguments.method,
        text=text_options(arguments),
        held_out_source=arguments.held_out,
        options=method_options(arguments),
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=arguments.device,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
    )
    show(
        arguments,
        record.to_dict() | {"output": str(arguments.output)},
        recovery_table(record),
        *(f"Note: {note}." for note in record.notes),
        f"Checkpoint: {arguments.output}",
    )
