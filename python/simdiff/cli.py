"""The command `simdiff`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simdiff.errors import SimdiffError

# Handlers import what they need: `simdiff --help` must not wait for torch and transformers.
if TYPE_CHECKING:
    from simdiff.pipeline import PlanOptions, TextOptions

CRITERIA = ("simdiff-mssd", "simdiff-masd", "simdiff-max", "block-influence")

_DESCRIPTION = """\
Make a language model smaller by removing whole decoder layers.

Every layer is scored from the hidden states that enter and leave it while the model reads some
calibration text: how much it turns them (cosine distance) and how much it moves them (squared and
absolute difference). The layers that matter least are removed, and the result is written as an
ordinary checkpoint that transformers loads."""

_EPILOG = """\
examples:
  simdiff run demo --output out                     the whole way on the built-in demo model
  simdiff run ./my-model --text corpus.txt --ratio 0.25 --output out
  simdiff score ./my-model --text corpus.txt --output scores.json      the slow part, once ...
  simdiff plan scores.json --num-layers 8 --output plan.json           ... plans as often as liked
  simdiff prune ./my-model --plan plan.json --output ./my-model-small
  simdiff eval ./my-model ./my-model-small --text other.txt

exit codes: 0 success, 1 unexpected error, 2 input that cannot be used, 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    handler: Callable[[argparse.Namespace], None] = arguments.handler
    try:
        _load_libraries()
        _set_threads(getattr(arguments, "threads", None))
        handler(arguments)
    except (SimdiffError, ValueError) as error:
        # ValueError: the scorers' own errors, such as NonFiniteError; others are bugs.
        if not isinstance(error, SimdiffError) and not _is_for_users(error):
            raise
        print(f"simdiff {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"simdiff {arguments.command}: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def _load_libraries() -> None:
    """Say what the first seconds are spent on."""
    from simdiff.progress import step

    with step("load torch and transformers"):
        try:
            import simdiff.pipeline  # noqa: F401
        except ValueError as error:
            if not str(error).startswith("SIMDIFF_"):  # an environment variable of ours
                raise
            raise SimdiffError(str(error)) from None


def _set_threads(count: int | None) -> None:
    import torch

    if count is None:
        return
    if count < 1:
        raise SimdiffError(f"--threads must be at least 1, got {count}")
    torch.set_num_threads(count)


def _is_for_users(error: ValueError) -> bool:
    from simdiff_kernels import NonFiniteError

    return isinstance(error, (SimdiffError, NonFiniteError))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="simdiff",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, handler: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(handler=handler)
        sub.add_argument("--json", action="store_true", help="print JSON on standard output")
        return sub

    sub = command("run", _run, "The whole way: score, plan, prune, reload, evaluate, report.")
    _add_model(sub)
    _add_text(sub, default="demo")
    sub.add_argument("--held-out", metavar="TEXT", help="evaluate on this text (default: the half "
                     "of --text that does not calibrate)")  # fmt: skip
    _add_plan(sub)
    _add_output(sub, "new directory for model/, report.html, scores.json, plan.json, results.json")

    sub = command("score", _score, "Score every layer on calibration text; write scores.json.")
    _add_model(sub)
    _add_text(sub)
    _add_output(sub, "file to write, such as scores.json")

    sub = command("plan", _plan, "Choose the layers that go, from saved scores; no model needed.")
    sub.add_argument("scores", type=Path, help="file written by `simdiff score`")
    _add_plan(sub)
    _add_output(sub, "file to write, such as plan.json")

    sub = command("prune", _prune, "Write the model without the layers of a plan.")
    _add_model(sub)
    sub.add_argument("--plan", type=Path, required=True, help="file written by `simdiff plan`")
    _add_output(sub, "new directory for the pruned checkpoint")

    sub = command("eval", _eval, "Perplexity of one or more models on the same text.")
    _add_model(sub, several=True)
    _add_text(sub)
    sub.add_argument("--part", choices=("held-out", "calibration", "all"), default="held-out",
                     help="part of the text; `score` does not read held-out")  # fmt: skip

    sub = command("profile", _profile, "Time and memory of a calibration pass, layer by layer.")
    _add_model(sub)
    _add_text(sub, default="demo")
    sub.set_defaults(windows=8)
    _add_output(sub, "trace to write, .json or .json.gz; Perfetto opens it")

    command("info", _info, "Which backends can score here, and on what they run.")
    return parser


def _version() -> str:
    from importlib.metadata import version

    return version("simdiff-kernels")


def _add_model(sub: argparse.ArgumentParser, several: bool = False) -> None:
    text = "a local directory, a hub name, or 'demo' (SmolLM2-135M-Instruct)"
    if several:
        sub.add_argument("models", nargs="+", metavar="model", help=text)
    else:
        sub.add_argument("model", help=text)
    sub.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                     help="of the weights in memory; auto is as stored")  # fmt: skip
    sub.add_argument("--device", help="cpu, cuda, cuda:N, or auto (spread over all GPUs); the GPU "
                     "if there is one and this is not given")  # fmt: skip
    sub.add_argument("--threads", type=int, help="of the CPU (default: as many as cores)")


def _add_text(sub: argparse.ArgumentParser, default: str | None = None) -> None:
    sub.add_argument(
        "--text",
        default=default,
        required=default is None,
        help="'demo', a text file (blank lines separate documents), or a .jsonl file of objects "
        'with "text"; one half of the documents calibrates, the other is held out',
    )
    sub.add_argument("--windows", type=int, default=32, help="number of windows of text")
    sub.add_argument("--window-length", type=int, default=512, help="tokens in a window")
    sub.add_argument("--seed", type=int, default=0, help="of the shuffle of documents")
    if sub.prog.split()[-1] != "eval":
        sub.add_argument("--batch-size", type=int, default=8, help="windows per forward")


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--criterion", choices=CRITERIA, default=CRITERIA[0],
                     help="what makes a layer important")  # fmt: skip
    sub.add_argument("--alpha", type=float, default=0.5,
                     help="weight of difference against similarity, 0 to 1")  # fmt: skip
    amount = sub.add_mutually_exclusive_group()
    amount.add_argument("--ratio", type=float, help="share of the layers to remove, rounded down "
                        "(0.25 if neither this nor --num-layers is given)")  # fmt: skip
    amount.add_argument("--num-layers", type=int, help="number of layers to remove")
    sub.add_argument("--protect", type=_layer_list, default=(), metavar="LAYERS",
                     help="layers that stay, such as 0,1,28-29 (counted from 0)")  # fmt: skip


def _add_output(sub: argparse.ArgumentParser, text: str) -> None:
    sub.add_argument("--output", "-o", type=Path, required=True, help=text)
    sub.add_argument("--overwrite", action="store_true", help="replace an earlier output")


def _layer_list(text: str) -> tuple[int, ...]:
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


def _text_options(arguments: argparse.Namespace) -> TextOptions:
    from simdiff.pipeline import TextOptions

    return TextOptions(arguments.text, arguments.windows, arguments.window_length, arguments.seed)


def _plan_options(arguments: argparse.Namespace) -> PlanOptions:
    from simdiff.pipeline import PlanOptions

    return PlanOptions(
        arguments.criterion,
        arguments.alpha,
        arguments.ratio,
        arguments.num_layers,
        arguments.protect,
    )


def _show(arguments: argparse.Namespace, content: dict[str, Any], *tables: Any) -> None:
    """Print either JSON or what people read."""
    if arguments.json:
        print(json.dumps(content, indent=1, allow_nan=False))
        return
    from rich.console import Console

    # Away from a terminal a table keeps its own width instead of being cut to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    for table in tables:
        console.print(table)


def _run(arguments: argparse.Namespace) -> None:
    from simdiff.pipeline import run
    from simdiff.tables import layers_table, results_table

    outcome = run(
        arguments.model,
        arguments.output,
        text=_text_options(arguments),
        plan=_plan_options(arguments),
        held_out_source=arguments.held_out,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=arguments.device,
        overwrite=arguments.overwrite,
    )
    plan, results = outcome.plan, outcome.results
    sample = results["pruned"]["generation"]
    agrees = "agrees with" if sample["equals_uncached"] else "DIFFERS from"
    _show(
        arguments,
        {
            **results,
            "output": str(outcome.directory),
            "removed": list(plan.removed),
            "notes": list(plan.notes),
        },
        layers_table(outcome.scores, plan),
        *_plan_lines(plan),
        results_table(results),
        f"The pruned model continues with the KV cache, which {agrees} a forward without:\n"
        f"  {sample['prompt']}{sample['text']}\n",
        f"Checkpoint: {outcome.directory / 'model'}",
        f"Report:     {outcome.directory / 'report.html'}",
    )


def _plan_lines(plan: Any) -> list[str]:
    order = ", ".join(map(str, plan.removed))
    alpha = "" if plan.alpha is None else f", alpha = {plan.alpha:g}"
    return [
        f"Removed, the least important first: {order}",
        f"Why: lowest importance by {plan.criterion}{alpha}: {plan.formula}",
        *(f"Note: {note}." for note in plan.notes),
        "",
    ]


def _score(arguments: argparse.Namespace) -> None:
    from simdiff.files import check_new_file
    from simdiff.models import load_model
    from simdiff.scores import score
    from simdiff.tables import scores_table

    check_new_file(arguments.output.absolute(), arguments.overwrite)
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    windows = _text_options(arguments).windows(tokenizer, "calibration")
    scores = score(
        model,
        windows.batches(arguments.batch_size),
        name=arguments.model,
        calibration=windows.identity.to_dict(),
    )
    scores.save(arguments.output)
    _show(arguments, scores.to_dict(), scores_table(scores), f"Scores: {arguments.output}")


def _profile(arguments: argparse.Namespace) -> None:
    from simdiff.files import check_new_file
    from simdiff.models import load_model
    from simdiff.profiling import profile_pass
    from simdiff.tables import profile_table

    check_new_file(arguments.output.absolute(), arguments.overwrite)
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    windows = _text_options(arguments).windows(tokenizer, "calibration")
    batches = windows.batches(arguments.batch_size)
    result = profile_pass(model, batches, arguments.output, overwrite=arguments.overwrite)
    _show(
        arguments,
        {**result.to_dict(), "trace": str(arguments.output)},
        profile_table(result),
        f"Trace: {arguments.output} (open it in https://ui.perfetto.dev)",
    )


def _plan(arguments: argparse.Namespace) -> None:
    from simdiff.files import check_new_file
    from simdiff.scores import LayerScores
    from simdiff.tables import layers_table

    check_new_file(arguments.output.absolute(), arguments.overwrite)
    scores = LayerScores.load(arguments.scores)
    plan = _plan_options(arguments).plan(scores)
    plan.save(arguments.output)
    _show(
        arguments,
        plan.to_dict(),
        layers_table(scores, plan),
        *_plan_lines(plan),
        f"Plan: {arguments.output}",
    )


def _prune(arguments: argparse.Namespace) -> None:
    from simdiff.checkpoint import write_pruned
    from simdiff.files import check_new_path, new_directory
    from simdiff.models import load_model
    from simdiff.selection import PruningPlan

    check_new_path(arguments.output.absolute(), arguments.overwrite)
    plan = PruningPlan.load(arguments.plan)
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    with new_directory(arguments.output, arguments.overwrite) as scratch:
        write_pruned(model, tokenizer, plan, scratch)
    removed = ", ".join(map(str, sorted(plan.removed)))
    _show(
        arguments,
        {"output": str(arguments.output), "removed": list(plan.removed), "kept": list(plan.kept)},
        f"Removed {len(plan.removed)} of {plan.num_layers} layers: {removed} (counted from 0)",
        f"Checkpoint: {arguments.output}",
    )


def _eval(arguments: argparse.Namespace) -> None:
    from simdiff.pipeline import evaluate
    from simdiff.tables import evaluation_table

    results = evaluate(
        arguments.models,
        text=_text_options(arguments),
        part=arguments.part,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    _show(arguments, results, evaluation_table(results))


def _info(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    import torch

    from simdiff.machine import describe_machine
    from simdiff.tables import backends_table
    from simdiff_kernels import backend_status, default_backend

    statuses = backend_status()
    defaults = {device: default_backend(device) for device in ("cpu", "cuda")}
    content = {
        "version": _version(),
        "torch": torch.__version__,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "default_backend": defaults,
        "backends": [asdict(status) for status in statuses],
    }
    _show(
        arguments,
        content,
        f"simdiff-kernels {content['version']}, torch {content['torch']}",
        f"{content['machine']}; {content['threads']} torch threads",
        backends_table(statuses),
        f"Chosen for CPU tensors: {defaults['cpu']}; for CUDA tensors: {defaults['cuda']}",
    )


if __name__ == "__main__":
    sys.exit(main())
