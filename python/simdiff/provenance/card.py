"""The model card: README.md of a pruned directory, with the metadata that model hubs read.

Metadata format: the Hugging Face Hub's model cards, https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from simdiff.data.demo import DEMO
from simdiff.data.records import options_of_record
from simdiff.io.kinds import PLAN_FILE
from simdiff.io.outputs import write_bytes
from simdiff.models.layer_indices import spans
from simdiff.planning.names import SEARCHED, WEIGHED
from simdiff.planning.plan import PruningPlan
from simdiff.provenance.markdown import code, code_block, plain
from simdiff.provenance.origin import CARD, licence_files, source_folder, source_metadata
from simdiff.provenance.recovery_section import recovery_command, recovery_section, what_was_done
from simdiff.recovery.record import RecoveryRecord
from simdiff.scoring.scores import LayerScores
from simdiff_kernels import __version__


def write_card(
    directory: Path,
    plan: PruningPlan,
    source: str | Path,
    scores: LayerScores | None = None,
    results: Mapping[str, Any] | None = None,
    recovery: RecoveryRecord | None = None,
) -> None:
    """Write README.md and the licence files into a pruned directory.

    Args:
        directory: directory of the pruned checkpoint.
        plan: the plan that was applied.
        source: the model before pruning: a directory, a hub name, or "demo".
        scores: scores from which the plan was made, if known.
        results: content of results.json, if the model was evaluated.
        recovery: record of the recovery, if there was one.
    """
    folder = source_folder(source)
    if folder is not None:
        for name in licence_files(folder):
            if not (directory / name).exists():
                shutil.copyfile(folder / name, directory / name)
    text = card(
        plan,
        source_directory=folder,
        scores=scores,
        results=results,
        recovery=recovery,
        changes=config_changes(folder, directory),
    )
    write_bytes(directory / CARD, text.encode(errors="replace"))


def card(
    plan: PruningPlan,
    *,
    source_directory: Path | None,
    scores: LayerScores | None = None,
    results: Mapping[str, Any] | None = None,
    recovery: RecoveryRecord | None = None,
    changes: Sequence[str] = (),
) -> str:
    """The model card as Markdown with a YAML header.

    Args:
        plan: the plan that was applied.
        source_directory: directory of the model before pruning, whose card and licence are carried
            over; None if there is none, as for a hub name.
        scores: scores of every layer; without them the table shows only the plan's importance.
        results: content of results.json, with the perplexity before and after.
        recovery: record of the recovery, if there was one.
        changes: changes of the config, in words (`config_changes`).
    """
    metadata = source_metadata(plan, source_directory)
    header = yaml.safe_dump(
        metadata, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10**9
    )
    parts = [
        f"---\n{header}---\n",
        _introduction(plan, metadata, recovery),
        _loading(plan),
        _removed(plan),
        _quality(results) if recovery is None else recovery_section(recovery),
        _table(plan, scores),
        _calibration(plan),
        _config(changes),
        _reproduction(plan, recovery),
        _licence(metadata, source_directory),
    ]
    return "\n".join(part for part in parts if part)


def config_changes(before: Path | None, after: Path) -> list[str]:
    """Differences between the configs of two directories, in words, one entry per line."""
    if before is None:
        return []
    try:
        old, new = (
            json.loads((directory / "config.json").read_text(encoding="utf-8"))
            for directory in (before, after)
        )
    except (OSError, ValueError):
        return []
    return list(_changes(old, new, ""))


def _changes(old: Any, new: Any, name: str) -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if key not in ("transformers_version", "dtype", "torch_dtype", "_name_or_path"):
                yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        if isinstance(old, list) and isinstance(new, list):
            yield f"{code(name)}: {len(old)} entries to {len(new)}"
        else:
            yield f"{code(name)}: {code(json.dumps(old))} to {code(json.dumps(new))}"


def _name(plan: PruningPlan) -> str:
    return str(plan.model.get("name") or "")


def _introduction(
    plan: PruningPlan, metadata: Mapping[str, Any], recovery: RecoveryRecord | None
) -> str:
    base = str(metadata.get("base_model") or _name(plan))
    short = plain(base).rstrip("/").rpartition("/")[2]
    if Path(base).is_absolute():  # a path on somebody's machine means nothing to readers
        base = short
    kept, total = len(plan.kept), plan.num_layers
    return (
        f"# {code(short)} with {kept} of {total} layers\n\n"
        f"{code(base)} without {len(plan.removed)} of its {total} decoder layers "
        f"({100 * len(plan.removed) / total:.0f}%). {what_was_done(recovery)}\n"
    )


def _loading(plan: PruningPlan) -> str:
    lines = [
        f"from transformers import {plan.loader}, AutoTokenizer",
        "",
        'path = "."  # this directory',
        "tokenizer = AutoTokenizer.from_pretrained(path)",
        f"model = {plan.loader}.from_pretrained(path)",
    ]
    return (
        "## How to load\n\nIt is an ordinary checkpoint; no code but that of transformers is "
        f"needed.\n\n{code_block(lines, 'python')}"
    )


def _removed(plan: PruningPlan) -> str:
    order = ", ".join(map(str, plan.removed))
    alpha = "" if plan.alpha is None else f", alpha = {plan.alpha:g}"
    lines = [
        "## What was removed\n",
        "Layers are counted from 0.\n",
        f"- Removed: {order}{'' if plan.by_hand else ' (the least important first)'}",
        f"- In order: {spans(plan.removed)}",
        f"- Stayed: {spans(plan.kept)}",
        "- Chosen by hand, not by scores"
        if plan.by_hand
        else f"- Criterion: {code(plan.criterion)}{alpha}: {code(plan.formula)}",
    ]
    if plan.protected:
        lines.append(f"- Protected by hand: {', '.join(map(str, plan.protected))}")
    lines += [f"- Note: {code(note)}" for note in plan.notes]
    return "\n".join(lines) + "\n"


def _quality(results: Mapping[str, Any] | None) -> str:
    if not results or "dense" not in results or "pruned" not in results:
        return (
            "## Quality\n\nNot measured when this card was written. Removing layers costs quality: "
            "measure before use.\n"
        )
    dense, pruned = results["dense"], results["pruned"]
    lines = ["## Quality\n", "| | before | after | ratio |", "|---|---|---|---|"]
    for name, key, style in (
        ("held-out perplexity", "perplexity", ".2f"),
        ("parameters", "num_parameters", ",d"),
    ):
        before, after = dense.get(key), pruned.get(key)
        if before and after is not None:
            lines.append(f"| {name} | {before:{style}} | {after:{style}} | {after / before:.3f} |")
    evaluation = results.get("evaluation") or {}
    if evaluation:
        lines.append(
            f"\nText: {code(evaluation.get('source'))}, part "
            f"{code(evaluation.get('part'))}, {evaluation.get('num_windows')} windows of "
            f"{evaluation.get('window_length')} tokens, without overlap."
        )
    return "\n".join(lines) + "\n"


def _table(plan: PruningPlan, scores: LayerScores | None) -> str:
    columns: dict[str, Sequence[float]] = {}
    if scores is not None and scores.num_layers == plan.num_layers:
        columns = {
            "1 − cos": scores.metrics["cosine_distance"].mean,
            "MSSD": scores.metrics["squared_difference"].mean,
            "max. squared difference": scores.metrics["squared_difference"].maximum,
            "MASD": scores.metrics["absolute_difference"].mean,
        }
    if plan.importance:
        columns["importance"] = plan.importance
    if not columns:
        return ""
    lines = [
        "## Scores of every layer\n",
        f"| layer | {' | '.join(columns)} | |",
        f"|---|{'---|' * len(columns)}---|",
    ]
    for layer in range(plan.num_layers):
        cells = " | ".join(f"{values[layer]:.4g}" for values in columns.values())
        lines.append(f"| {layer} | {cells} | {'removed' if layer in plan.removed else ''} |")
    return "\n".join(lines) + "\n"


def _calibration(plan: PruningPlan) -> str:
    known = {key: value for key, value in plan.calibration.items() if value is not None}
    if not known and plan.by_hand:
        return ""
    if not known:
        return "## Calibration\n\nThe calibration text was not recorded.\n"
    lines = [f"- {code(key)}: {code(value)}" for key, value in known.items()]
    return "## Calibration\n\n" + "\n".join(lines) + "\n"


def _config(changes: Sequence[str]) -> str:
    if not changes:
        return ""
    return "## Changes of the config\n\n" + "\n".join(f"- {change}" for change in changes) + "\n"


def reproduction(plan: PruningPlan, recovery: RecoveryRecord | None = None) -> list[str]:
    """The shell commands that repeat the cut, and its recovery if there was one."""
    calibration = plan.calibration
    name = shlex.quote(plain(_name(plan)) or "MODEL")
    text = " ".join(shlex.quote(plain(word)) for word in options_of_record(calibration))
    options = "".join(
        f" --{option} {int(calibration[key])}"
        for option, key in (
            ("num-windows", "num_windows"),
            ("window-length", "window_length"),
            ("seed", "seed"),
            ("skip-leading", "skip_leading"),
        )
        if isinstance(calibration.get(key), int)
    )
    alpha = f" --alpha {plan.alpha!r}" if plan.criterion in WEIGHED else ""
    protect = f" --protect {','.join(map(str, plan.protected))}" if plan.protected else ""
    chosen = "".join(
        f" {shlex.quote(plain(f'--{option}'))}"
        + ("" if value is True else f" {shlex.quote(plain(value))}")
        for option, value in plan.options.items()
    )
    if "evaluation-windows" in plan.options or plan.criterion in SEARCHED:
        chosen = f" --model {name}{chosen}"
    extra = "demo" if _name(plan) == DEMO else "toolkit"
    made_with = f"simdiff-kernels {__version__}"
    install = f'pip install ".[{extra}]"  # in the source of {made_with}'
    if plan.by_hand and recovery is None:
        removed = ",".join(map(str, plan.removed))
        return [install, f"simdiff prune {name} --remove {removed} --output pruned"]
    if plan.by_hand and recovery is not None:
        return [install, recovery_command(recovery, name)]
    return [
        install,
        f"simdiff score {name} {text}{options} --output scores.json",
        f"simdiff plan scores.json --criterion {shlex.quote(plain(plan.criterion))}{alpha}"
        f"{chosen} --num-layers {len(plan.removed)}{protect} --output {PLAN_FILE}",
        f"simdiff prune {name} --plan {PLAN_FILE} --output pruned"
        if recovery is None
        else recovery_command(recovery, name),
    ]


def _reproduction(plan: PruningPlan, recovery: RecoveryRecord | None) -> str:
    others = [f"{package} {version(package)}" for package in ("torch", "transformers")]
    versions = ", ".join([f"simdiff-kernels {__version__}", *others])
    commands = code_block(reproduction(plan, recovery), "sh")
    return (
        f"## How to reproduce\n\n`{PLAN_FILE}` beside this card is the plan: the last line alone "
        f"repeats the cut.\n\n{commands}\nMade with {versions}.\n"
    )


def _licence(metadata: Mapping[str, Any], source_directory: Path | None) -> str:
    names = [] if source_directory is None else licence_files(source_directory)
    if "license" not in metadata:
        text = "No licence was found with the base model; its terms apply to this one too."
    else:
        name = metadata.get("license_name") or metadata["license"]
        text = f"As the base model: {code(name)}."
        if metadata.get("license_link"):
            text += f" Text: {code(metadata['license_link'])}."
    if names:
        text += f" Copied from it: {', '.join(map(code, names))}."
    return f"## Licence\n\n{text}\n"
