"""The sections of docs/figures.md, one function each: from the committed results to Markdown.

Those of quality are in quality_figures.py, of tasks in task_figures.py, those of the scorers alone
in scorer_sections.py.

Whatever is a number comes from a file in results/; command, machine and commit come from its entry
in the manifest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import quality_figures
import ratios
import scorer_sections
import task_figures
from committed_results import MACHINE, Results, extent, joined, lines, paragraph
from gpu_page import table

from simdiff.models.layer_indices import spans


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


TRAINED = ("partial", "distillation")
"""Methods of repair that train; each has a result."""


def repair_numbers(found: Results, method: str) -> tuple[dict[str, float], dict[str, Any]]:
    content = found.json(f"recovery-{method}-{MACHINE}")
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
    repairs = []
    for method in TRAINED:
        of, content = repair_numbers(found, method)
        name = f"recovery-{method}-{MACHINE}.json"
        repairs.append((of, Repair(method, name, of["recovered"], content["seconds"])))
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


def trained_repair(found: Results, method: str) -> tuple[str, ...]:
    """A row of the table of trained repairs."""
    of, content = repair_numbers(found, method)
    training, seconds = content["details"]["training"], content["seconds"]
    share = math.log(of["pruned"] / of["recovered"]) / math.log(of["pruned"] / of["dense"])
    held_out = content["evaluation"]
    return (
        f"`{method}`",
        f"{content['calibration']['num_windows']}",
        f"{training['curve'][-1]['tokens'] / 1000:.0f}",
        f"{held_out['num_windows']}",
        *(f"{of[name]:.2f}" for name in ("dense", "pruned", "recovered")),
        f"{share:.0%}",
        f"{seconds:.0f}",
        f"{seconds - training['seconds']:.0f}",
    )


def repair(found: Results) -> str:
    rows = found.json(f"recovery-{MACHINE}")
    origins = "; ".join(
        f"`{method}` {found.origin(f'recovery-{method}-{MACHINE}.json')}" for method in TRAINED
    )
    return joined(
        "## What repair brings back",
        paragraph(
            "The demo's layers removed, float32, held-out perplexity on windows of 512 tokens. "
            "Training starts from the closed form, whose time is in that of the whole; two cores: "
            f"{origins}."
        ),
        lines(
            table(
                (
                    "trained",
                    "calibration windows",
                    "thousand tokens read in training",
                    "held-out windows",
                    "dense",
                    "plain cut",
                    "repaired",
                    "way back, in log",
                    "seconds",
                    "of these, closed form",
                ),
                (trained_repair(found, method) for method in TRAINED),
            )
        ),
        paragraph(
            f"The closed form alone, {rows['windows'][0]} calibration and "
            f"{rows['held_out_windows']} held-out windows "
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


def quantised(found: Results) -> str:
    name = f"quantised-{MACHINE}"
    content = found.json(name)
    rows, told = [], []
    for one in content["kinds"]:
        metrics = one["metrics"]
        for metric, values in metrics.items():
            rows.append(
                (
                    one["kind"].upper() if metric == next(iter(metrics)) else "",
                    metric.replace("_", " "),
                    f"{values['rank_correlation']:.4f}",
                    f"{100 * values['largest_relative_difference']:.1f}%",
                )
            )
        plans = one["plans"]
        other = [len({*p["full"]} - {*p["quantised"]}) for p in plans]
        told.append(
            f"{one['kind'].upper()}: {other.count(0)} of {len(plans)} plans by scores alone are "
            f"the same, {other.count(1)} differ in one layer, "
            f"{len(other) - other.count(0) - other.count(1)} in more."
        )
        rows_of_interest = [(plan, "") for plan in plans]
        if "searched" in one:  # not in results of the first form of the script
            searched = one["searched"]
            apart = len({*searched["full"]} - {*searched["quantised"]})
            same = "the same" if not apart else f"another in {apart} of them"
            told.append(f"The plan of {searched['num_layers']} that perplexity improved is {same}.")
            rows_of_interest.append((searched, ", searched"))
        told += [
            f"`{row['criterion']}` at {row['num_layers']} layers{how}: held-out perplexity "
            f"{row['perplexity']['quantised']:.2f} by the plan of 4 bits, "
            f"{row['perplexity']['full']:.2f} by the other, of the unquantised model."
            for row, how in rows_of_interest
            if "perplexity" in row
        ]
    criteria = dict.fromkeys(p["criterion"] for p in content["kinds"][0]["plans"])
    return joined(
        "## Scores and plans of 4-bit weights",
        paragraph(
            f"{content['windows']} windows of {content['window_length']} tokens, linear maps "
            f"packed by bitsandbytes {content['versions']['bitsandbytes']} and computed in "
            f"{content['dtype']}, against the {content['dtype']} weights "
            f"{found.origin(f'{name}.json')}: Spearman's rank correlation over layers, and the "
            "largest relative difference of one. The demo model is the float32 form of a Q4_1 "
            "file: its weights lie on a grid of 4 bits of another kind already. GPTQ, AWQ, "
            "compressed-tensors and torchao were not measured."
        ),
        lines(table(("weights", "metric", "rank correlation", "largest difference"), rows)),
        paragraph(
            f"Plans of {', '.join(f'`{c}`' for c in criteria)}, each at "
            f"{len(content['kinds'][0]['plans']) // len(criteria)} numbers of layers.",
            *told,
            f"The pass took {content['seconds']:.0f} s with the weights as they are, "
            + " and ".join(f"{k['seconds']:.0f} s ({k['kind'].upper()})" for k in content["kinds"])
            + ": on a CPU 4 bits save memory, not time.",
        ),
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


SECTIONS: tuple[Callable[[Results], str], ...] = (
    older,
    demo,
    quality_figures.quality,
    quality_figures.ablations,
    quality_figures.calibration,
    search_step,
    task_figures.tasks,
    repair,
    speed,
    sublayers,
    quantised,
    scorer_sections.scoring,
    scorer_sections.blocks,
    scorer_sections.passes,
    scorer_sections.accuracy,
    surgery,
    scorer_sections.gpu,
)
