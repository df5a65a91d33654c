"""`simdiff bench`."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff.cli.options import add_model, add_output, add_source, text_of
from simdiff.cli.output import STANDARD_OUTPUT, show, write_output
from simdiff.cli.parsing import CommandParser, layer_list, rare
from simdiff.errors import SimdiffError, number_of
from simdiff.io.kinds import Kind
from simdiff.io.outputs import check_new_file, write_new

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from simdiff.speed.drafting import Drafting
    from simdiff.speed.protocol import Protocol

TEXT = "Prefill and decoding of a model with and without some layers, beside the ideal."
PRESETS = ("paper",)


def add(sub: CommandParser) -> None:
    """The options of `simdiff bench`."""
    add_model(sub)
    sub.add_argument(
        "pruned", nargs="?", metavar="PRUNED", help="the pruned model, a directory or a hub name"
    )
    group = sub.group("instead of PRUNED")
    group.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="file written by `simdiff plan`, or a list of layers, applied in memory on the same "
        "weights",
    )
    group.add_argument(
        "--remove",
        type=layer_list,
        metavar="LAYERS",
        help="layers such as 8-19, counted from 0",
    )
    _add_protocol(sub)
    group = sub.group("speculative decoding")
    group.add_argument(
        "--draft",
        action="store_true",
        help="also measure the pruned model as the draft of its own parent, by transformers, on "
        "prompts of --text",
    )
    rare(
        group,
        "--draft-tokens",
        type=int,
        default=5,
        metavar="N",
        help="tokens that the draft proposes in a step",
    )
    add_source(sub, ", for the prompts of --draft, from the second half of the text")
    add_output(
        sub, "new file for the results, such as bench.json; - is standard output", required=False
    )
    rare(
        sub.group("output"),
        "--page",
        type=Path,
        metavar="FILE",
        help="also write the page of the results, as `simdiff report` does, such as bench.html",
    )


def _add_protocol(sub: CommandParser) -> None:
    group = sub.group("measurement")
    rare(
        group,
        "--preset",
        choices=PRESETS,
        help="paper: batch 16, prompt 4, 2048 new tokens, shortened where that takes more than "
        "--max-seconds (600)",
    )
    group.add_argument(
        "--batch-sizes", type=_counts, metavar="N,N", help="sequences at a time (1 if not given)"
    )
    group.add_argument(
        "--prompt-lengths", type=_counts, metavar="N,N", help="tokens read (128 if not given)"
    )
    group.add_argument(
        "--new-tokens", type=int, metavar="N", help="tokens generated (64 if not given)"
    )
    rare(group, "--repeats", type=int, metavar="N", help="number of timed rounds (7 if not given)")
    rare(
        group,
        "--warm-up",
        type=int,
        metavar="N",
        help="number of rounds before them (2 if not given)",
    )
    rare(
        group,
        "--max-seconds",
        type=float,
        metavar="S",
        help="generate fewer tokens where the whole would take longer",
    )
    rare(
        group,
        "--compile",
        action="store_true",
        help="decode both models through torch.compile with a static cache",
    )
    rare(
        group,
        "--no-graphs",
        action="store_true",
        help="on a GPU, launch kernels one by one instead of CUDA graphs",
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse several things to compare with, or none, and a draft without a text."""
    sources = {"PRUNED": arguments.pruned, "--plan": arguments.plan, "--remove": arguments.remove}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise SimdiffError(
            f"one of {', '.join(sources)} must say what is compared, "
            f"got {' and '.join(given) or 'none'}"
        )
    if arguments.draft:
        text_of(arguments)
    if arguments.page is not None:
        if str(arguments.page) == STANDARD_OUTPUT:
            raise SimdiffError(
                "--page must be a path, and not -: `simdiff report` writes the page of a file to "
                "standard output"
            )
        if (
            arguments.output is not None
            and arguments.page.absolute() == arguments.output.absolute()
        ):
            raise SimdiffError(f"--page must not be the file of --output, {arguments.output}")
        check_new_file(arguments.page.absolute(), arguments.overwrite, Kind.PAGE)


def run(arguments: argparse.Namespace) -> None:
    """Run `simdiff bench`."""
    from simdiff.report.page import bench_page
    from simdiff.report.terminal.speed import draft_table, memory_table, speed_notes, speed_table
    from simdiff.speed.bench import bench

    protocol = _protocol(arguments)
    dense, pruned, names, removed, tokenizer = _models(arguments, protocol)
    content = bench(
        dense,
        pruned,
        protocol,
        names=names,
        removed=removed,
        preset=arguments.preset,
        drafting=_drafting(arguments, protocol, tokenizer) if arguments.draft else None,
    )
    write_output(arguments, content)
    if arguments.page is not None:
        page = bench_page(content).encode()
        write_new(arguments.page.absolute(), page, arguments.overwrite, Kind.PAGE)
    show(
        arguments,
        content,
        speed_table(content),
        *speed_notes(content),
        "",
        memory_table(content),
        *draft_table(content),
        *([] if arguments.output is None else [f"Results: {arguments.output}"]),
        *([] if arguments.page is None else [f"Report:  {arguments.page}"]),
    )


def _protocol(arguments: argparse.Namespace) -> Protocol:
    """The preset or the default, with what was given besides."""
    from dataclasses import replace

    from simdiff.speed.protocol import PRESETS, Protocol

    base = Protocol() if arguments.preset is None else PRESETS[arguments.preset]
    names = ("batch_sizes", "prompt_lengths", "new_tokens", "repeats", "warm_up", "max_seconds")
    given = {name: getattr(arguments, name) for name in names}
    return replace(
        base,
        **{name: value for name, value in given.items() if value is not None},
        compiled=arguments.compile,
        graphs=not arguments.no_graphs,
    )


def _drafting(
    arguments: argparse.Namespace, protocol: Protocol, tokenizer: PreTrainedTokenizerBase
) -> Drafting:
    """The prompts of a draft: windows of the half of the text that does not calibrate."""
    from simdiff.data.text_options import TextOptions
    from simdiff.speed.drafting import Drafting

    length = protocol.prompt_lengths[0]
    text = TextOptions(text_of(arguments), protocol.repeats, length, arguments.seed)
    windows = text.windows(tokenizer, "held-out")
    return Drafting(windows.tokens, arguments.draft_tokens, windows.identity.to_dict())


def _models(
    arguments: argparse.Namespace, protocol: Protocol
) -> tuple[
    PreTrainedModel,
    PreTrainedModel,
    tuple[str, str],
    Collection[int] | None,
    PreTrainedTokenizerBase,
]:
    """Both models, their names, the removed layers where they are known, and the tokenizer."""
    from simdiff.jobs.plans import check_depth, fitted, read_plan
    from simdiff.models.identity import check_same_model, stored_cut
    from simdiff.models.loading import load_config, load_model, source_directory
    from simdiff.surgery.copies import sharing_copy

    plan = None
    if arguments.pruned is None:
        plan = read_plan(arguments.remove if arguments.plan is None else arguments.plan)
        check_depth(plan, arguments.model)
    protocol.check(load_config(source_directory(arguments.model)))
    dense, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    if arguments.pruned is not None:
        pruned, _ = load_model(arguments.pruned, dtype=arguments.dtype, device=arguments.device)
        removed = stored_cut(arguments.pruned).get("removed")
        return dense, pruned, (arguments.model, arguments.pruned), removed, tokenizer
    assert plan is not None
    plan = fitted(plan, dense, arguments.model)
    check_same_model(dense, plan.model, "plan")
    name = f"{arguments.model} without {number_of(len(plan.removed), 'layer')}"
    pruned = sharing_copy(dense, plan.removed)
    return dense, pruned, (arguments.model, name), plan.removed, tokenizer


def _counts(text: str) -> tuple[int, ...]:
    """Numbers such as 1,8."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 1,8, got {text!r}") from None
