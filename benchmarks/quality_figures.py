"""What the quality protocol found, in Markdown: the tables of quality_tables.py, and words."""

from __future__ import annotations

import calibration_tables
import effort_tables
import quality_tables
from committed_results import Results, joined, lines, paragraph
from gpu_page import table


def effort(found: Results) -> str:
    if not found.effort:
        return ""
    return joined(
        "### By effort",
        paragraph(
            "Held-out perplexity of other efforts and ways, divided by that of `--effort normal`, "
            "the default, on the same windows",
            f"{found.origin(*(path.name for subject in found.effort for path in subject.files))}.",
            "Above 1, `normal` chose better. Costs are counted in layers run on a window, the "
            "calibration pass included, as a share of greedy search on four windows.",
        ),
        lines(effort_tables.summary(found.effort)),
        paragraph(f"Geometric means over these cases: {effort_tables.averages(found.effort)}."),
    )


def calibration(found: Results) -> str:
    if not found.calibration:
        return ""
    contents = list(found.calibration.values())
    settings = contents[0]["settings"]
    models = ", ".join(content["model"]["name"] for content in contents)
    length = calibration_tables.LENGTH
    count = calibration_tables.TOKENS // length
    picture = "../benchmarks/results/calibration-study.png"
    return joined(
        "## Calibration text",
        paragraph(
            "Held-out perplexity of plans from other calibration text, divided by that from "
            f"{count} windows of {length} tokens of Wikipedia; pool “{settings['pool']}”",
            f"{found.origin(*found.calibration)}. Geometric mean and extremes over {models} and "
            "10% and 25% of the layers; `none` is by scores alone. “draw” is the same on other "
            "documents: what it differs by is chance.",
        ),
        lines(table(*calibration_tables.table(contents))),
        f"![Perplexities by calibration text]({picture})",
    )


def summary(found: Results) -> str:
    if not found.quality:
        return ""
    return joined(
        paragraph(
            "Held-out perplexity of other ways to choose layers, divided by that of "
            f"`{quality_tables.OURS}` on the same windows, with 95% intervals (Student's t over "
            "windows, within the seeds, so of these divisions of the text, not of others): above "
            "1, `simdiff` chose better. Its reads are those of `--effort quick`."
        ),
        lines(quality_tables.summary(found.quality)),
    )


def quality(found: Results) -> str:
    if not found.quality:
        return ""
    tables = [
        joined(
            f"### {subject.model}, {subject.text}",
            paragraph(found.origin(*(path.name for path in subject.files))),
            *(
                f"{count} layers removed:\n\n{lines(quality_tables.way_table(subject, count))}"
                for count in subject.counts
            ),
        )
        for subject in found.quality
    ]
    return joined(
        "## How good the plans are",
        effort(found),
        "### By effort quick, and all other ways",
        summary(found),
        paragraph(quality_tables.protocol(found.quality)),
        lines(quality_tables.less_often(found.quality)),
        lines(quality_tables.models(found.quality)),
        paragraph(
            "In the tables perplexity is the geometric mean over seeds, then that with each; "
            "“-” says that a way was not run. The ratio compares window by window, over the seeds "
            "that have both; where its interval holds 1 it is not distinguishable. "
            "Seconds were taken while the machine had other load; a read during which the process "
            "was stopped is left out of them, and its row says so in the file."
        ),
        *tables,
    )


def ablations(found: Results) -> str:
    parts = []
    reporting = quality_tables.ablations(found.quality, quality_tables.ABLATIONS.__contains__)
    if found.quality:
        parts += [paragraph("On the texts and models above:"), lines(reporting)]
    if found.development:
        apart = ("simdiff + reads,", "simdiff,")
        names = [path.name for subject in found.development for path in subject.files]
        parts += [
            paragraph(
                "On the development pool, by which parts were kept or dropped",
                f"{found.origin(*names)}.",
                quality_tables.protocol(found.development),
            ),
            lines(quality_tables.ablations(found.development, lambda w: w.startswith(apart))),
        ]
    head = "What `simdiff + reads` (or `simdiff`, without reads) is without one of its parts, each "
    head += "model, text and number of layers a case; a ratio above 1 is worse than with the part."
    return joined("## Ablations", paragraph(head), *parts) if parts else ""


def limits(found: Results) -> list[str]:
    """For the README: where other ways chose better, and what choosing costs."""
    if not found.quality:
        return []
    models = ", ".join(dict.fromkeys(subject.model for subject in found.quality))
    measured = found.effort or found.quality
    base = effort_tables.BASE if found.effort else quality_tables.OURS
    better = "; ".join(quality_tables.better_ways(measured, base)) or "none"
    parts = [
        f"Plans were compared on small models alone ({models}). Ways that chose better there "
        f"than the default (95%): {better}."
    ]
    for way in quality_tables.RIVALS:
        if way.startswith("greedy") and (costs := quality_tables.costs(found.quality, way)):
            (ours, theirs), (seconds, longer) = costs["windows_read"], costs["seconds"]
            parts.append(
                f"Where {quality_tables.told(way)}, was run, it reads {theirs} "
                f"calibration windows in {longer} s; `--effort quick` reads {ours} beyond its pass "
                f"and takes {seconds} s, pass included."
            )
    return parts
