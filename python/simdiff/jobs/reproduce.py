"""`simdiff reproduce`: a table of the paper for any models, by what other commands do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from simdiff.comparison.compare import ComparisonOptions
from simdiff.comparison.results import ComparedCell, Comparison
from simdiff.data.text_options import TextOptions
from simdiff.errors import SimdiffError
from simdiff.evaluation.quality import Subject, evaluate_models
from simdiff.evaluation.tasks import TaskOptions, load_tasks
from simdiff.io.json_files import check_key, header, load_json, write_json
from simdiff.io.kinds import REPRODUCTION_MARKER, Kind
from simdiff.io.machine import describe_machine
from simdiff.io.outputs import check_new_path, held_directory, new_directory, write_config
from simdiff.jobs.compare import run_comparison
from simdiff.jobs.evaluate import cut_subject
from simdiff.jobs.published import TABLES, PaperTable
from simdiff.models.config import layer_count
from simdiff.models.layer_indices import spans
from simdiff.models.loading import find_model, load_config, load_model, source_directory
from simdiff.models.structure import text_config
from simdiff.planning.plan import PruningPlan
from simdiff.report.page import report_page
from simdiff.report.reproduction import markdown
from simdiff.speed.bench import bench
from simdiff.speed.protocol import PRESETS
from simdiff.surgery.copies import sharing_copy


@dataclass(frozen=True)
class ReproductionOptions:
    """How a table is measured."""

    table: str
    text: TextOptions
    tasks: TaskOptions
    held_out: str | None = None
    """Another text for the perplexity, whole; None takes the half of the text that is held out."""
    evaluation_windows: int = 8
    """Number of calibration windows on which every alpha is evaluated."""
    max_seconds: float = 600.0
    """Longest that the speed of a model is measured; 0 measures none."""
    batch_size: int = 8
    dtype: str = "auto"
    device: str | None = None


def reproduce(
    models: Sequence[str],
    directory: str | Path,
    options: ReproductionOptions,
    *,
    overwrite: bool = False,
    restart: bool = False,
    config: str | None = None,
) -> dict[str, Any]:
    """Measure a table for some models; goes on where an earlier call stopped.

    Writes into `directory`: reproduction.json, reproduction.md, and for each model in models/ the
    directory of a comparison, evaluation.json, bench.json and a page of all of them, report.html.
    What is finished is kept beside it, in a directory of the same name that ends with .journal.

    Args:
        models: directories or hub names.
        directory: for the results.
        options: how the table is measured.
        overwrite, restart, config: see `simdiff.jobs.compare.run_comparison`.

    Returns:
        The content of reproduction.json.

    Raises:
        SimdiffError: see `run_comparison`, `evaluate_models`, `bench`; or the journal is of other
            options.
    """
    directory = Path(directory).absolute()
    check_new_path(directory, overwrite, Kind.REPRODUCTION)
    options.text.check(options.held_out)
    for name in models:
        find_model(name)
    parts = [_slug(name) for name in models]
    alike = sorted({name for name in models if parts.count(_slug(name)) > 1})
    if alike:
        raise SimdiffError(
            f"models must have names that differ in letters and digits, got {', '.join(alike)}, "
            "whose results would lie in one directory"
        )
    tasks = load_tasks(options.tasks).identity()
    told = _told(options)
    del told["max_seconds"]  # a benchmark that had too little gets more in the next call
    key = {"models": list(models), "options": told, "tasks": tasks["tasks"]}
    journal = directory.with_name(directory.name + ".journal")
    if restart and journal.is_dir():
        shutil.rmtree(journal)
    with held_directory(journal, "reproduction"):
        kept = journal / "key.json"
        if kept.exists():
            check_key(kept, load_json(kept), key)
        else:
            write_json(kept, key)
        found = {name: _measured(name, journal / _slug(name), options) for name in models}
        content = _content(found, options, TABLES[options.table])
        with new_directory(directory, overwrite, Kind.REPRODUCTION, finished=True) as scratch:
            for name in models:
                part = _slug(name)
                shutil.copytree(journal / part, scratch / "models" / part)
                page = _page(scratch / "models" / part)
                (scratch / "models" / part / "report.html").write_text(page, encoding="utf-8")
            (scratch / "reproduction.md").write_text(markdown(content), encoding="utf-8")
            write_json(scratch / REPRODUCTION_MARKER, content)
            write_config(scratch, config)
    shutil.rmtree(journal)
    return content


def _told(options: ReproductionOptions) -> dict[str, Any]:
    told = asdict(options) | {"text": asdict(options.text), "tasks": asdict(options.tasks)}
    told["text"]["source"] = str(options.text.source)
    told["tasks"]["path"] = None if options.tasks.path is None else str(options.tasks.path)
    return told


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _measured(name: str, part: Path, options: ReproductionOptions) -> dict[str, Any]:
    """The rows of one model; steps that are finished are read."""
    table = TABLES[options.table]
    depth = layer_count(load_config(source_directory(name)))
    count = max(1, int(table.ratio * depth))
    part.mkdir(exist_ok=True)
    where = part / "comparison"
    if where.exists():
        compared = Comparison.load(where)
    else:
        windows = options.evaluation_windows
        compared = run_comparison(
            name,
            where,
            text=options.text,
            options=ComparisonOptions(table.criteria, (count,), search_windows=windows),
            held_out_source=options.held_out,
            batch_size=options.batch_size,
            dtype=options.dtype,
            device=options.device,
        )
    cells = {entry.cell.criterion: entry for entry in compared.cells}
    plans = {_label(name, entry): entry.cell.plan for entry in cells.values() if entry.cell.plan}
    quality, speed = part / "evaluation.json", part / "bench.json"
    if not quality.exists() or (options.max_seconds and not speed.exists()):
        model, tokenizer = load_model(name, dtype=options.dtype, device=options.device)
        if not quality.exists():
            cuts = [cut_subject(label, model, tokenizer, plan) for label, plan in plans.items()]
            subjects = [Subject.given(model, tokenizer, name), *cuts]
            write_json(quality, evaluate_models(subjects, tasks=options.tasks).to_dict())
        if options.max_seconds and plans and not speed.exists():
            first = next(iter(plans.values()))
            write_json(speed, _speed(name, model, first, options.max_seconds))
        del model
    evaluated = load_json(quality)
    return {
        "num_layers": depth,
        "num_removed": count,
        "dense": {"perplexity": compared.dense.perplexity, **_averages(evaluated, name)},
        "speed": _ratio(load_json(speed)) if speed.exists() else None,
        "rows": {
            criterion: {
                "removed": list(entry.removed),
                "problem": entry.problem,
                "quality": None if entry.quality is None else asdict(entry.quality),
                **_averages(evaluated, _label(name, entry)),
            }
            for criterion, entry in cells.items()
        },
    }


def _label(name: str, entry: ComparedCell) -> str:
    """Of a model without some layers, the same for criteria that choose the same ones."""
    return f"{name} without {spans(entry.removed)}"


def _speed(
    name: str, model: PreTrainedModel, plan: PruningPlan, max_seconds: float
) -> dict[str, Any]:
    """By the paper's protocol, with fewer tokens where positions or the time allow no more."""
    protocol = replace(PRESETS["paper"], max_seconds=max_seconds)
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions is not None:
        room = positions - max(protocol.prompt_lengths)
        protocol = replace(protocol, new_tokens=min(protocol.new_tokens, room))
    pruned = sharing_copy(model, plan.removed)
    names = (name, f"{name} without {spans(plan.removed)}")
    return bench(model, pruned, protocol, names=names, removed=plan.removed, preset="paper")


def _averages(evaluated: Mapping[str, Any], label: str) -> dict[str, Any]:
    return {"averages": evaluated["models"].get(label, {}).get("averages", {})}


def _ratio(speed: Mapping[str, Any]) -> dict[str, Any]:
    """How many times faster decoding is, and the setting in which it was measured."""
    setting = speed["settings"][0]
    shown = ("batch_size", "prompt_length", "new_tokens")
    decode = setting["phases"]["decode"]
    return {key: setting[key] for key in shown} | {
        "decode": decode["ratio"]["median"],
        "ideal": decode["ideal"],
    }


def _content(
    found: Mapping[str, Any], options: ReproductionOptions, table: PaperTable
) -> dict[str, Any]:
    missing = ", ".join(table.not_in_lm_eval)
    return {
        **header("simdiff.reproduction"),
        "machine": describe_machine(),
        "table": options.table,
        "options": _told(options),
        "published": asdict(table),
        "models": dict(found),
        "notes": [
            *table.notes,
            f"lm_eval does not have {missing}, so that averages are of other tasks than the "
            "published ones: compare what is retained",
        ],
    }


def _page(part: Path) -> str:
    speed = part / "bench.json"
    return report_page(
        part / "comparison",
        evaluation=part / "evaluation.json",
        bench=speed if speed.exists() else None,
    )
