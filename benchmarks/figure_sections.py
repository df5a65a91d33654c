"""The sections of docs/figures.md, one function each: from the committed results to Markdown.

Whatever is a number comes from a file in results/; command, machine and commit come from its entry
in the manifest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import quality_figures
import ratios
import report
from committed_results import Results, extent, joined, lines, paragraph
from gpu_page import table

from simdiff.models.layer_indices import spans

MACHINE = "epyc-2-cores"
ONE_PASS = "torch.compile, one pass"
TASKS = ("arc_easy", "piqa", "sciq", "hellaswag", "winogrande", "openbookqa")


def older(found: Results) -> str:
    words = dict.fromkeys(
        entry["shown_as"] for entry in found.manifest.values() if "shown_as" in entry
    )
    told = "; ".join(words)
    return paragraph(
        "Commit, machine, command and code of every result are in "
        "[manifest.json](../benchmarks/results/manifest.json), which a test compares with today's "
        "code.",
        f"Older than that code, and not measured anew: {told}." if words else "",
        "The demo, tasks, repair and sub-layers ran on halves of shuffled passages, where some of "
        "one article lay on both sides; since then passages of one subject stay on one."
        if "the demo (0bc76d4)" in words
        else "",
    )


def demo_table(found: Results) -> list[str]:
    content = found.json(f"demo-{MACHINE}")
    pair = content["dense"], content["pruned"]
    quantities = (
        ("held-out perplexity", [model["perplexity"] for model in pair], ".2f", ""),
        ("decode, tokens/s", [model["speed"]["decode"] for model in pair], ".1f", ""),
        ("prefill, tokens/s", [model["speed"]["prefill"] for model in pair], ".0f", ""),
        ("parameters", [model["num_parameters"] / 1e6 for model in pair], ".1f", " M"),
    )
    return table(
        ("", "dense", "pruned", "ratio"),
        (
            (name, *(f"{v:{form}}{unit}" for v in values), f"{values[1] / values[0]:.2f}")
            for name, values, form, unit in quantities
        ),
    )


def demo(found: Results) -> str:
    content = found.json(f"demo-{MACHINE}")
    text = content["evaluation"]
    gguf = next(
        (
            f"{subject.content['model']['converted_from']['file']}, "
            for subject in found.quality
            if subject.model.startswith("SmolLM2")
        ),
        "",
    )
    return joined(
        "## The demo",
        paragraph(
            f"SmolLM2-135M-Instruct ({gguf}a 4-bit GGUF file, converted to float32; without its "
            "chat template), Wikipedia passages of BoolQ (CC BY-SA 3.0), "
            f"{text['num_windows']} calibration and as many held-out windows of "
            f"{text['window_length']} tokens, {len(content['removed'])} of {content['num_layers']} "
            f"layers removed ({spans(content['removed'])}), no recovery "
            f"{found.origin(f'demo-{MACHINE}.json')}:"
        ),
        lines(demo_table(found)),
    )


def tasks(found: Results) -> str:
    content = found.json(f"tasks-{MACHINE}")
    names = dict(zip(("dense", "pruned", "repaired"), content["models"], strict=True))
    scores = {name: content["models"][key]["tasks"] for name, key in names.items()}
    items = {
        name: {task: [int(bit) for bit in of[task]["items"]] for task in TASKS}
        for name, of in scores.items()
    }
    for task in TASKS:
        if len({of[task]["items_sha256"] for of in scores.values()}) > 1:
            raise SystemExit(f"figures: all models must have been asked the same items of {task}")
    above = [task for task in TASKS if not scores["dense"][task]["at_chance"]]

    def mean(name: str, of: Sequence[str]) -> float:
        return statistics.fmean(statistics.fmean(items[name][task]) for task in of)

    def retained(name: str, of: Sequence[str]) -> str:
        """The ratio of means, its standard error from the pairs of items."""
        ratio, variance = mean(name, of) / mean("dense", of), 0.0
        for task in of:
            pairs = zip(items[name][task], items["dense"][task], strict=True)
            gaps = [after - ratio * before for after, before in pairs]
            variance += statistics.variance(gaps) / len(gaps)
        error = math.sqrt(variance) / len(of) / mean("dense", of)
        return f"{100 * ratio:.0f} ± {100 * error:.0f}%"

    rows = [
        (
            name,
            *(f"{100 * mean(name, [task]):.0f}" for task in TASKS),
            *(f"{100 * mean(name, of):.1f}" for of in (TASKS, above)),
        )
        for name in names
    ]
    rows += [
        (f"{name}, retained", *[""] * len(TASKS), retained(name, TASKS), retained(name, above))
        for name in ("pruned", "repaired")
    ]
    (count,) = {len(bits) for of in items.values() for bits in of.values()}
    error = max(
        math.sqrt(statistics.variance(bits) / count)
        for of in items.values()
        for bits in of.values()
    )
    chance = " and ".join(task for task in TASKS if task not in above)
    return joined(
        "## Zero-shot tasks",
        paragraph(
            "The demo's pruned model before and after the repair below, accuracy in percent of "
            f"{count} items of each task, drawn at random and the same for all models; a standard "
            f"error is {100 * error:.0f} points or less {found.origin(f'tasks-{MACHINE}.json')}. A "
            "test compares five of each task with lm_eval's own evaluation."
        ),
        lines(table(("", *TASKS, "average", "without tasks at chance"), rows)),
        paragraph(f"The dense model is at chance on {chance}, where pruning cannot show.")
        if chance
        else "",
    )


def repair_numbers(found: Results) -> tuple[dict[str, float], dict[str, Any]]:
    content = found.json(f"recovery-distillation-{MACHINE}")
    return {name: of["perplexity"] for name, of in content["quality"].items()}, content


@dataclass(frozen=True)
class Repair:
    """A repaired model, evaluated on the windows of the demo."""

    name: str
    file: str
    perplexity: float
    seconds: float


def repair_of_the_demo(found: Results) -> Repair | None:
    """The best repair of the demo's plan that was evaluated on the demo's windows.

    That is told by the perplexities of the dense and the plainly cut model, which must be those of
    the demo: others were taken on other text and say nothing beside them.
    """
    demo = found.json(f"demo-{MACHINE}")
    of, content = repair_numbers(found)
    name = f"recovery-distillation-{MACHINE}.json"
    repairs = [(of, Repair("distillation", name, of["recovered"], content["seconds"]))]
    for row in found.json(f"recovery-{MACHINE}")["rows"]:
        values, name = row["perplexity"], f"recovery-{MACHINE}.json"
        repair = Repair("closed form", name, values["recovered"], row["seconds"])
        repairs.append((values, repair))
    comparable = [
        repair
        for values, repair in repairs
        if all(
            math.isclose(values[model], demo[model]["perplexity"], rel_tol=1e-6)
            for model in ("dense", "pruned")
        )
    ]
    return min(comparable, key=lambda repair: repair.perplexity, default=None)


def repair(found: Results) -> str:
    of, content = repair_numbers(found)
    share = math.log(of["pruned"] / of["recovered"]) / math.log(of["pruned"] / of["dense"])
    training, seconds, held_out = (
        content["details"]["training"],
        content["seconds"],
        content["evaluation"],
    )
    rows = found.json(f"recovery-{MACHINE}")
    return joined(
        "## What repair brings back",
        paragraph(
            f"The demo's layers removed, float32, {content['calibration']['num_windows']} "
            f"calibration and {held_out['num_windows']} held-out windows of "
            f"{held_out['window_length']} tokens "
            f"{found.origin(f'recovery-distillation-{MACHINE}.json')}: held-out perplexity "
            f"{of['pruned']:.2f} after the plain cut, {of['recovered']:.2f} repaired, "
            f"{of['dense']:.2f} dense: {share:.0%} of the way back in log perplexity, in "
            f"{seconds:.0f} s on two cores, of which {seconds - training['seconds']:.0f} s for the "
            f"closed form; training read {training['curve'][-1]['tokens'] / 1000:.0f} thousand "
            f"tokens. The closed form alone, {rows['held_out_windows']} held-out windows "
            f"{found.origin(f'recovery-{MACHINE}.json')}:"
        ),
        lines(
            table(
                ("layers removed", "dense", "plain cut", "repaired", "", "seconds, 2 cores"),
                (
                    (
                        row["removed"].replace("-", " to ").replace(",", ", "),
                        *(
                            f"{row['perplexity'][name]:.2f}"
                            for name in ("dense", "pruned", "recovered")
                        ),
                        f"−{1 - row['perplexity']['recovered'] / row['perplexity']['pruned']:.0%}",
                        f"{row['seconds']:.0f}",
                    )
                    for row in rows["rows"]
                ),
            )
        ),
    )


def speed(found: Results) -> str:
    rows, shortened = [], ""
    names = {"float32": "float32", "bfloat16": "bfloat16", "paper": "bfloat16, paper's"}
    for name, label in names.items():
        for setting in found.json(f"inference-{name}-{MACHINE}")["settings"]:
            cells = [label, str(setting["batch_size"])]
            for phase in ("prefill", "decode"):
                seconds = [setting[model]["seconds"][phase] for model in ("dense", "pruned")]
                ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
                of = setting["phases"][phase]
                cells += [ratios.shown(ratio, of["ratio"]), f"{ratio / of['ideal']:.2f}"]
            rows.append((*cells, len(seconds[0]), f"{of['ratio']['coverage']:.0%}"))
            if name == "paper":
                shortened = (
                    f"the paper's protocol is cut to {setting['new_tokens']} of its "
                    f"{setting['wanted_new_tokens']} new tokens on this machine"
                )
    return joined(
        "## How much faster the pruned model is",
        paragraph(
            "12 of 30 layers removed, both models in one process taking turns, medians of the "
            "ratios of rounds and where they lie with the probability in the last column. The "
            "ideal is the ratio of bytes read for decoding, of flops for prefill; " + shortened,
            f"{found.origin(*(f'inference-{name}-{MACHINE}.json' for name in names))}:",
        ),
        lines(
            table(
                (
                    "",
                    "batch",
                    "× prefill",
                    "of the ideal",
                    "× decode",
                    "of the ideal",
                    "rounds",
                    "probability",
                ),
                rows,
            )
        ),
    )


def sublayers(found: Results) -> str:
    content = found.json(f"sublayers-{MACHINE}")
    by = {
        (row["unit"], row["removed"]): row["perplexity"]
        for row in content["quality"]
        if row.get("criterion") != "block-influence"
    }
    return joined(
        "## Without attention or MLP sub-layers",
        paragraph(
            f"{content['dtype']}, {content['held_out_windows']} held-out windows of "
            f"{content['window_length']} tokens {found.origin(f'sublayers-{MACHINE}.json')}: "
            f"perplexity {by['', 0]:.1f} dense; 7 of 30 attention layers gone "
            f"{by['attention', 7]:.1f}, 14 gone {by['attention', 14]:.1f}; 7 MLPs gone "
            f"{by['mlp', 7]:.0f}."
        ),
    )


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


def search_step(found: Results) -> str:
    content = found.json(f"search-{MACHINE}")
    count, length = content["windows"]
    return joined(
        "## A step of greedy search by perplexity",
        paragraph(
            f"{content['candidates']} candidates, {count} windows of {length} tokens, "
            f"{content['dtype']}: {content['reusing_seconds']:.0f} s where the states before the "
            f"first cut are kept, {content['plain_seconds']:.0f} s where they are not, "
            f"{content['ratio']:.2f} times as long {found.origin(f'search-{MACHINE}.json')}."
        ),
    )


def surgery_words(found: Results) -> str:
    of = found.json(f"checkpoint-surgery-{MACHINE}")
    memory, speeds = of["memory"], of["speed"]["ratios"]
    return (
        f"{memory['checkpoint_gb']:.1f} GB with the shapes of a 70B model: "
        f"{memory['added_peak_mb']:.0f} MB above what importing torch and transformers takes "
        f"({memory['command_peak_mb']:.0f} MB in all), and {statistics.median(speeds):.2f} times "
        f"the speed of `cp` on real bytes, {extent(speeds, 2)} in {len(speeds)} rounds "
        f"{found.origin(f'checkpoint-surgery-{MACHINE}.json')}."
    )


def surgery(found: Results) -> str:
    return joined("## Cutting a checkpoint on disk", paragraph(surgery_words(found)))


def gpu(found: Results) -> str:
    name = "gpu-h200-2026-11-26"
    of = found.json(name)
    rates = of["gigabytes_per_second"][0]
    shapes = (rates["hidden_size"], rates["dtype"])
    share = {
        case["num_tokens"]: case["share_of_read"]
        for case in of["updates"]
        if (case["hidden_size"], case["dtype"]) == shapes
    }
    large, small = share[rates["num_tokens"]], share[2048]
    costs, model = of["calibration_pass"]["share_of_forward"], of["inference"]
    sequences, length = of["calibration_pass"]["tokens"]
    graphs = model["graphs"]
    return joined(
        "## On a GPU",
        paragraph(
            f"On an {of['card']['name']} ({of['date']}, {found.origin(f'{name}.json')[1:-1]}; all "
            f"figures: [gpu.md](gpu.md)) one update by {rates['num_tokens']} tokens of "
            f"{rates['hidden_size']} {rates['dtype']} entries takes place at {rates['cuda']} GB/s "
            f"(`cuda`) and {rates['triton']} GB/s (`triton`), {large['cuda']:.2f} and "
            f"{large['triton']:.2f} of the fastest read of the same bytes; torch.compile reaches "
            f"{rates['torch.compile']} GB/s, with max-autotune "
            f"{rates['torch.compile, max-autotune']}, eager PyTorch {rates['eager']}. Small "
            f"updates reach less: {small['cuda']:.2f} and {small['triton']:.2f} at 2048 tokens. A "
            f"calibration forward of {sequences} × {length} tokens through the shape of "
            f"{of['calibration_pass']['model']} takes {100 * costs[1]['cuda']:.3g}% longer where "
            f"its layers are scored, {100 * costs[2]['cuda']:.3g}% (`triton`: "
            f"{100 * costs[2]['triton']:.3g}%) with all blocks. Without {model['removed']} of its "
            f"{model['num_layers']} layers that shape decodes {graphs['pruned']} tokens/s instead "
            f"of {graphs['dense']} (batch {model['batch_size']}, CUDA graphs), {graphs['ratio']} "
            f"times as many, and prefills {model['prefill_ratio']} times as fast; by bytes the "
            f"ideal is {graphs['ideal_by_bytes']}."
        ),
    )


SECTIONS: tuple[Callable[[Results], str], ...] = (
    older,
    demo,
    quality_figures.quality,
    quality_figures.ablations,
    search_step,
    tasks,
    repair,
    speed,
    sublayers,
    scoring,
    blocks,
    passes,
    accuracy,
    surgery,
    gpu,
)
