"""The command `simdiff`: one module for each subcommand, with `TEXT`, `add` and `run`."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from simdiff.cli import (
    bench,
    compare,
    doctor,
    evaluate,
    export,
    info,
    plan,
    plot,
    profile,
    prune,
    push,
    recover,
    report,
    run,
    score,
    verify,
)
from simdiff.cli.config import apply_config, config_path
from simdiff.cli.parsing import CommandParser
from simdiff.errors import Note, SimdiffError

# Commands import what they need in `run`: `simdiff --help` must not wait for torch.
COMMANDS = {
    "run": run,
    "score": score,
    "plan": plan,
    "prune": prune,
    "recover": recover,
    "verify": verify,
    "export": export,
    "eval": evaluate,
    "compare": compare,
    "bench": bench,
    "report": report,
    "plot": plot,
    "push": push,
    "profile": profile,
    "info": info,
    "doctor": doctor,
}

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
  simdiff recover ./my-model --plan plan.json --text corpus.txt --output ./my-model-repaired
  simdiff eval ./my-model ./my-model-small --text other.txt
  simdiff bench ./my-model ./my-model-small --batch-sizes 1,8          how much faster it is
  simdiff compare ./my-model --text corpus.txt --num-layers 2,4,8 --output comparison
  simdiff report out --evaluation eval.json --bench bench.json -o report.html       one page

Every option can stand in a YAML file: --config run.yaml. What a command writes into a directory is
repeated by the config.yaml in it.

exit codes: 0 success, 1 unexpected error (verify, doctor: a check failed), 2 input that cannot be
used, 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words and words[0] in COMMANDS else None
    try:
        arguments = _parsed(command, words)
        arguments.command_line = shlex.join(["simdiff", *words])
        module = COMMANDS[arguments.command]
        if getattr(module, "needs_torch", lambda given: True)(arguments):
            _load_libraries()
            _set_threads(getattr(arguments, "threads", None))
        with _notes_shown():
            return module.run(arguments) or 0
    except (SimdiffError, ValueError) as error:
        # ValueError: the scorers' own errors, such as NonFiniteError; others are bugs.
        if not isinstance(error, SimdiffError) and not _is_for_users(error):
            raise
        print(f"simdiff {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        consequence = getattr(COMMANDS[command or "run"], "INTERRUPTED", "nothing was written")
        print(f"simdiff {command}: interrupted, {consequence}", file=sys.stderr)
        return 130


def _parsed(command: str | None, words: Sequence[str]) -> argparse.Namespace:
    """What the command line says, and for what it does not say the file of `--config`."""
    root, commands = _parsers()
    path = config_path(words)
    if command is not None and path is not None:
        apply_config(commands[command], path, words)
    arguments, unknown = root.parse_known_args(words)
    if unknown:
        commands[arguments.command].refuse(unknown)
    return arguments


def _load_libraries() -> None:
    """Say what the first seconds are spent on."""
    from simdiff.io.progress import step

    with step("load torch and transformers"):
        try:
            import simdiff.jobs.run  # noqa: F401
        except ValueError as error:
            if not str(error).startswith("SIMDIFF_"):  # an environment variable of ours
                raise
            raise SimdiffError(str(error)) from None


@contextlib.contextmanager
def _notes_shown() -> Iterator[None]:
    """Print every note once, in a line of standard error; other warnings as Python shows them."""
    usual, told = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, Note):
            usual(message, category, *where, **more)
        elif str(message) not in told:
            told.add(str(message))
            print(f"Note: {message}.", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        warnings.showwarning = show
        yield


def _set_threads(count: int | None) -> None:
    if count is None:
        return
    if count < 1:
        raise SimdiffError(f"--threads must be at least 1, got {count}")
    import torch

    torch.set_num_threads(count)


def _is_for_users(error: ValueError) -> bool:
    scorers = sys.modules.get("simdiff_kernels.summaries")  # not imported for this alone
    return scorers is not None and isinstance(error, scorers.NonFiniteError)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return _parsers()[0]


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, CommandParser]]:
    """The parser of all commands, and that of each."""
    result = argparse.ArgumentParser(
        prog="simdiff",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = result.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    parsers: dict[str, CommandParser] = {}
    for name, module in COMMANDS.items():
        parsers[name] = sub = commands.add_parser(name, help=module.TEXT, description=module.TEXT)
        module.add(sub)
        sub.add_general()
        sub.set_defaults(parser=sub)
    return result, parsers


def version() -> str:
    """The version of the distribution, "unknown" where the source tree is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("simdiff-kernels")
    except PackageNotFoundError:
        return "unknown"
