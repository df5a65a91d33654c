"""The sections of docs/figures.md on the scorers: speed, blocks, passes, accuracy, a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import gpu_page
import ratios
import report
from committed_results import MACHINE, Results, extent, joined, lines, paragraph
from gpu_page import table

ONE_PASS = "torch.compile, one pass"


def scoring_table(found: Results) -> list[str]:
    cases = report.scoring_cases(found.json(f"suite-{MACHINE}"), "test_large_update")
    return table(report.LARGE_UPDATE, map(report.large_update, cases))


def scoring(found: Results) -> str:
    suite = found.json(f"suite-{MACHINE}")
    large, small = (
        report.scoring_cases(suite, f"test_{size}_update") for size in ("large", "small")
    )
    (rounds,) = {case.get("repeats", 7) for case in large}
    least = min(large, key=lambda case: case["fraction_of_limit"])

    def slower(cases: Sequence[dict[str, Any]], kind: str) -> list[float]:
        faster = [case["times_faster"] for case in cases]
        return [of[name] for of in faster if (name := report.fastest(of, kind))]

    one = [1e6 * case["seconds"] for case in small if case["tokens"] == 1]
    many = [
        1e6 * case["seconds"]
        for case in small
        if (case["tokens"], case["hidden_size"]) == (16, 4096)
    ]
    passes = []
    for case in (c["extra_info"] for c in suite["benchmarks"] if "calibration" in c["name"]):
        ends = case.get("interval", {}).get("ratio_to_bare", {})
        ours, shortgpt, pruneme = (
            ratios.shown(case["ratio_to_bare"][name], ends.get(name), 3)
            for name in ("ours", "hidden states and cosine", "float32 lists")
        )
        passes.append(
            f"A calibration forward of {case['tokens'].replace('x', '×')} tokens in "
            f"{case['dtype']} takes {ours} times the bare one where layers are scored, {pruneme} "
            f"times as PruneMe does it and {shortgpt} times as ShortGPT does it, logits included."
        )
    return joined(
        "## An update of running scores on the CPU",
        paragraph(
            f"{large[0]['bytes'] / 2**20:.0f} MB of hidden states that no cache holds, "
            f"{suite['machine_info']['threads']} threads, medians of {rounds} interleaved rounds "
            f"{found.origin(*(f'suite-{MACHINE}.{kind}' for kind in ('json', 'csv', 'png')))}. The "
            "pure read is the fastest loop that we found; other guests let it vary between "
            f"{extent([c['limit_gb_per_second'] for c in large]).replace('to', 'and')} GB/s from "
            "case to case.",
            f"{words}." if (words := report.intervals_in_words(suite)) else "",
        ),
        lines(scoring_table(found)),
        paragraph(
            f"Rows of {least['hidden_size']} {least['dtype']} entries lose most, "
            f"{least['fraction_of_limit']:.2f} of the read. torch.compile takes "
            f"{extent(slower(large, 'torch.compile'), 2)} times as long"
            + (
                ""
                if all(ONE_PASS in case["times_faster"] for case in large)
                else ", in a form that reads twice"
            )
            + ". An update of 1 token "
            f"takes {extent(one)} µs, one of 16 tokens of 4096 entries {extent(many)} µs; eager "
            f"PyTorch, in the same rounds, takes {extent(slower(small, 'eager'), 1)} times as "
            "long.",
            *passes,
        ),
    )


def blocks(found: Results) -> str:
    by = {case["dtype"]: case for case in found.json(f"blocks-{MACHINE}")["benchmarks"]}
    full, half = by["float32"], by["bfloat16"]

    def times(case: dict[str, Any], name: str) -> float:
        return case["seconds"][name] / case["seconds"]["ours"]

    error = max(case["error_of_matmul"]["squared_difference"] for case in by.values())
    shares = [
        case["seconds"]["ours"] / case["seconds"][f"{dtype} forward"] for dtype, case in by.items()
    ]
    return joined(
        "## All blocks",
        paragraph(
            f"All {full['pairs']} blocks of SmolLM2 over {full['tokens'].replace('x', '×')} "
            f"tokens, angular distance of every token included, take "
            f"{1e3 * full['seconds']['ours']:.0f} ms (bfloat16: "
            f"{1e3 * half['seconds']['ours']:.0f}), {shares[0]:.1%} of the bare float32 forward "
            f"and {shares[1]:.1%} of the bfloat16 one. All inner products of each token's states "
            f"by one batched matmul, under torch.compile, take "
            f"{times(full, 'compiled matmul'):.1f} times as long (bfloat16: "
            f"{times(half, 'compiled matmul'):.1f} times) and are off by up to {error:.0e} in the "
            f"squared difference; eager PyTorch, pair by pair, takes {times(full, 'eager'):.0f} "
            f"times as long (bfloat16: {times(half, 'eager'):.0f} times). Ours runs with "
            f"{max(case['memory'] for case in by.values()) / 1e6:.0f} MB beyond the states "
            f"{found.origin(f'blocks-{MACHINE}.json')}."
        ),
    )


def passes(found: Results) -> str:
    whole = {case["dtype"]: case["share_of_bare"] for case in found.json(f"pass-{MACHINE}")}
    (overhead,) = found.json(f"overhead-{MACHINE}")
    pairs, memory = overhead["ratio_of_pairs"], overhead["memory_above_bare_mb_of_pairs"]
    share = overhead["seconds_in_update"] / overhead["bare_seconds"]
    return joined(
        "## What scoring adds to a calibration pass",
        paragraph(
            "The whole pass of `simdiff score`, all blocks and every sequence apart, spends "
            f"{whole['float32']['with blocks']:.1%} of a float32 forward of 8 × 512 tokens and "
            f"{whole['bfloat16']['with blocks']:.1%} of a bfloat16 one beside it, "
            f"{whole['float32']['layers']:.1%} and {whole['bfloat16']['layers']:.1%} without "
            f"blocks {found.origin(f'pass-{MACHINE}.json')}."
        ),
        paragraph(
            f"With layers alone, {overhead['dtype']}, {share:.2%} of the bare forward is spent in "
            f"the scorer, the whole takes {statistics.median(pairs):.3f} times the bare time "
            f"(median of {len(pairs)}; single pairs lie between {min(pairs):.2f} and "
            f"{max(pairs):.2f}, the machine's noise), and the peak of memory differs from that of "
            f"the bare forward by {extent(memory)} MB "
            f"{found.origin(f'overhead-{MACHINE}.json')}."
        ),
    )


def accuracy_errors(found: Results) -> dict[tuple[str, str, str], float]:
    """By dtype, distance and way."""
    return {
        (row["dtype"], row["distance"], row["way"]): float(row["worst error"])
        for row in found.rows("accuracy")
    }


def accuracy_table(found: Results) -> list[str]:
    errors = accuracy_errors(found)
    peers, ours = "1 - cosine_similarity", "ours, avx512"
    columns = {
        "float32, 1 − cosine_similarity": ("float32", peers),
        "bfloat16, same": ("bfloat16", peers),
        "bfloat16, to float32 first": ("bfloat16", f"{peers}, float32"),
        "float32, to float64 first": ("float32", f"{peers}, float64"),
        "bfloat16, to float64 first": ("bfloat16", f"{peers}, float64"),
        "float32, ours": ("float32", ours),
        "bfloat16, ours": ("bfloat16", ours),
    }
    return table(
        ("distance", *columns),
        (
            (
                f"1e-{n}",
                *(f"{errors[dtype, f'1e-{n}', way]:.0e}" for dtype, way in columns.values()),
            )
            for n in range(8)
        ),
    )


def accuracy_words(found: Results) -> str:
    def worst(wanted: str) -> str:
        errors = accuracy_errors(found).items()
        return f"{max(error for (_, _, way), error in errors if way == wanted):.0e}"

    return (
        "On activations with one massive channel (300 times the rest), worst relative error of the "
        f"distance over 256 tokens of hidden size 4096 {found.origin('accuracy.csv')}. Ours stands "
        f"there with AVX-512; with AVX2 it is off by {worst('ours, avx2')} at most, with portable "
        f"code by {worst('ours, baseline')}. Of states widened to float64 1 − cosine_similarity is "
        f"off by {worst('1 - cosine_similarity, float64')} at most, and takes copies of both in "
        "float64; widened to float32, as peers do, it loses the small distances:"
    )


def accuracy(found: Results) -> str:
    return joined(
        "## Errors of the cosine distance",
        paragraph(accuracy_words(found)),
        lines(accuracy_table(found)),
    )


def gpu(found: Results) -> str:
    name = gpu_page.MEASURED.stem
    of = found.json(name)
    case, small = (
        next(r for r in gpu_page.of_part(of, "update") if r["case"] == f"bf16 {n} x 4096")
        for n in (32768, 2048)
    )
    sums, updates = (case["ours"][what] for what in ("row_sums", "update"))
    peers = gpu_page.of_part(of, "peers")[0]
    seconds = {who: timed["seconds"] for who, timed in peers["subjects"].items()}
    times = {who: value / seconds["update, cuda"] for who, value in seconds.items()}
    (scored,), (model,) = gpu_page.of_part(of, "pass"), gpu_page.of_part(of, "inference")
    sequences, length = scored["tokens"]
    speeds, decode = model["tokens_per_second"], model["phases"]["decode"]
    blocks = [f"{1e3 * block['seconds']:.1f}" for block in gpu_page.of_part(of, "blocks")]

    def rate(subject: dict[str, Any]) -> str:
        return f"{case['bytes'] / subject['seconds'] / 1e9:.0f} GB/s"

    return joined(
        "## On a GPU",
        paragraph(
            f"On an {of['name']} ({found.origin(f'{name}.json')[1:-1]}; all figures: "
            f"[gpu.md](gpu.md)) the sums of {case['tokens']} tokens of {case['hidden_size']} "
            f"bfloat16 entries are formed at {rate(sums['cuda'])} (`cuda`) and "
            f"{rate(sums['triton'])} (`triton`), {sums['cuda']['share']:.2f} and "
            f"{sums['triton']['share']:.2f} of the fastest read of the same bytes, whole updates "
            f"at {updates['cuda']['share']:.2f} and {updates['triton']['share']:.2f}. Small ones "
            f"reach less: {small['ours']['row_sums']['cuda']['share']:.2f} and "
            f"{small['ours']['row_sums']['triton']['share']:.2f} at {small['tokens']} tokens, "
            f"whole updates {small['ours']['update']['cuda']['share']:.2f} and "
            f"{small['ours']['update']['triton']['share']:.2f}. At {peers['tokens']} tokens the "
            f"best form that torch.compile takes needs {times['torch.compile, one pass']:.2f} "
            f"times as long as an update, what one would write first {times['torch.compile']:.1f} "
            f"times, eager PyTorch {times['eager']:.0f} times. A calibration pass of "
            f"{sequences} × {length} tokens a batch through LLaMA-3.1-8B's shape takes "
            f"{scored['share']['blocks off']:.2%} longer where its layers are scored, "
            f"{scored['share']['blocks on']:.2%} with all blocks, which take "
            f"{' to '.join(sorted(blocks))} ms by themselves. Without {model['removed']} of its "
            f"{model['shape']['num_hidden_layers']} layers that shape decodes "
            f"{speeds['pruned']['decode']:.0f} tokens/s instead of {speeds['dense']['decode']:.0f} "
            f"(batch {model['batch_size']}, CUDA graphs), {decode['ratio']['median']:.3f} times as "
            f"many, and prefills {model['phases']['prefill']['ratio']['median']:.3f} times as "
            f"fast; by bytes the ideal of decoding is {decode['ideal']:.3f}."
        ),
    )
