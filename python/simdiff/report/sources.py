"""Read and check the files of a report: run, evaluation, benchmark, recovery and comparison."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simdiff.errors import SimdiffError
from simdiff.io.json_files import as_object, read_json
from simdiff.io.kinds import PLAN_FILE, Kind, kind_of
from simdiff.io.progress import tell
from simdiff.models.files import same_weights
from simdiff.planning.plan import PruningPlan
from simdiff.report.cells import AVERAGES, averages_by_kind
from simdiff.scoring.scores import LayerScores

if TYPE_CHECKING:
    from simdiff.comparison.results import Comparison

Content = Mapping[str, Any]

STAGES = ("dense", "pruned", "recovered")
# Files that are read from the directory of a run without being named by the user.
FOUND = {"evaluation": "evaluation.json", "bench": "bench.json", "recovery": "recovery.json"}


@dataclass(frozen=True)
class ReportSources:
    """The checked contents of all files; None for each file that does not exist."""

    plan: PruningPlan | None = None
    scores: LayerScores | None = None
    results: Content | None = None
    evaluation: Content | None = None
    bench: Content | None = None
    recovery: Content | None = None
    comparison: Comparison | None = None
    model_path: str | None = None
    """Path of the pruned checkpoint, seen from the directory of the page."""


def read_sources(
    source: Path,
    *,
    evaluation: Path | None = None,
    bench: Path | None = None,
    recovery: Path | None = None,
    comparison: Path | None = None,
    page: Path | None = None,
) -> ReportSources:
    """Read the files of a report.

    Args:
        source: a directory of `simdiff run`, `prune` or `recover` with plan.json; scores.json,
            results.json and the files in `FOUND` are read from it if they exist. Or a directory of
            `simdiff compare`, or a file of `simdiff eval` or `bench`, alone or with the others.
        evaluation, bench: files that `simdiff eval` and `simdiff bench` wrote.
        recovery: recovery.json, or the directory that `simdiff recover` wrote.
        comparison: directory that `simdiff compare` wrote.
        page: file of the page; None is one in the directory.

    Raises:
        SimdiffError: a file is missing, damaged, of another kind, or of another model or plan.
    """
    found = kind_of(source) if source.exists() else None
    if found in (Kind.COMPARISON, Kind.BENCH, Kind.EVALUATION):
        taken = {Kind.COMPARISON: comparison, Kind.BENCH: bench, Kind.EVALUATION: evaluation}[found]
        if taken is not None:
            raise SimdiffError(f"report: {source} and {taken} are {found.value} each: give one")
        if found is Kind.COMPARISON:
            comparison = source
        elif found is Kind.BENCH:
            bench = source
        else:
            evaluation = source
        directory, plan = None, None
    elif not (source / PLAN_FILE).is_file():
        raise SimdiffError(
            f"report: {source} must be a directory with {PLAN_FILE}, a comparison, or a file of an "
            "evaluation or a benchmark, and is none"
        )
    else:
        directory, plan = source, PruningPlan.load(source / PLAN_FILE)
    if plan is None and recovery is not None:
        raise SimdiffError(
            f"report: a recovery is of a plan, which {source} does not have: give the directory "
            "that `simdiff recover` wrote first"
        )
    given = {"evaluation": evaluation, "bench": bench, "recovery": recovery}
    paths: dict[str, Path] = {}
    for kind, name in FOUND.items():
        chosen = given[kind]
        if chosen is None and directory is not None and (directory / name).is_file():
            chosen = directory / name
        if chosen is not None:
            paths[kind] = chosen / name if chosen.is_dir() else chosen
    scores = results = None
    if directory is not None and plan is not None and (directory / "scores.json").is_file():
        scores = LayerScores.load(directory / "scores.json")
        check_model(directory / "scores.json", scores.model, plan)
    if directory is not None and (directory / "results.json").is_file():
        results = _read(directory / "results.json", "simdiff.results", plan, check_results)
    readers = {
        "evaluation": ("simdiff.evaluation", check_evaluation),
        "bench": ("simdiff.bench", check_bench),
        "recovery": ("simdiff.recovery", check_recovery),
    }
    read = {
        kind: _read(path, schema, plan, check)
        for kind, path in paths.items()
        for schema, check in [readers[kind]]
    }
    if "recovery" in paths and plan is not None:
        _check_stored_plan(paths["recovery"], plan)
    where = None if directory is None else model_path(directory)
    if directory is not None and where is not None and page is not None:
        where = os.path.relpath(directory / where, page.absolute().parent)
    compared = None
    if comparison is not None:
        from simdiff.comparison.results import Comparison  # loads torch

        compared = Comparison.load(comparison)
        check_model(comparison, compared.scores.model, plan)
    if plan is None:
        _check_joined(paths, read, compared)
    return ReportSources(plan, scores, results, comparison=compared, model_path=where, **read)


def _check_joined(
    paths: Mapping[str, Path], read: Mapping[str, Content], compared: Comparison | None
) -> None:
    """Refuse files of several models or cuts where no plan says which one is meant."""
    models: list[tuple[str, Content]] = []
    if "bench" in read:
        models.append((str(paths["bench"]), read["bench"]["models"]["dense"]))
    if "evaluation" in read:
        entries = read["evaluation"]["models"]
        dense = read["evaluation"].get("dense", next(iter(entries)))
        models.append((str(paths["evaluation"]), {"name": dense, **entries[dense]}))
    if compared is not None:
        models.append(("the comparison", compared.scores.model))
    for (first, one), (second, other) in pairwise(models):
        for key in ("fingerprint", "num_parameters"):
            if None not in (one.get(key), other.get(key)) and one[key] != other[key]:
                raise SimdiffError(
                    f"{second}: must be of the model of {first}, with {key} {one[key]}, got "
                    f"{other[key]}"
                )
        check_weights(second, other, first, one)
    if not {"bench", "evaluation"} <= read.keys() or read["bench"]["removed"] is None:
        return
    cuts = [model.get("removed") for name, model in entries.items() if name != dense]
    removed = sorted(read["bench"]["removed"])
    if cuts and None not in cuts and removed not in cuts:
        raise SimdiffError(
            f"{paths['evaluation']}: must be of the cut of {paths['bench']}, layers {removed}, got "
            f"those without layers {' and '.join(map(str, cuts))}"
        )


def model_path(directory: Path) -> str | None:
    """The path of the pruned checkpoint relative to a directory; None if there is none."""
    if (directory / "model" / "config.json").is_file():
        return "model"
    return "." if (directory / "config.json").is_file() else None


def _read(path: Path, schema: str, plan: PruningPlan | None, check: Any) -> Content:
    content = read_json(path, schema)
    try:
        check(path, content, plan)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, SimdiffError):
            raise
        raise SimdiffError(
            f"{path}: must be a complete {schema} file, but is damaged: "
            f"{type(error).__name__}: {error}"
        ) from None
    return content


def check_model(path: Path, model: Content, plan: PruningPlan | None) -> None:
    """Refuse a file of another model than the plan's, by the fingerprint or else by the size."""
    if plan is None:
        return
    for key in ("fingerprint", "num_layers", "num_parameters"):
        wanted, found = plan.model.get(key), model.get(key)
        if wanted is not None and found is not None and wanted != found:
            raise SimdiffError(
                f"{path}: must be of the plan's model, {plan.model.get('name')}, with {key} "
                f"{wanted}, got {found}"
            )
    check_weights(path, model, "the plan", plan.model)


def check_weights(path: Path | str, found: Content, other: Path | str, wanted: Content) -> None:
    """Refuse a file of a model of other weights; says so where only shapes can be compared.

    Args:
        path, found: the file and what it says of its dense model.
        other, wanted: what it is joined to, and what that says.
    """
    same = same_weights(wanted, found)
    if same is False:
        raise SimdiffError(
            f"{path}: must be of the model of {other}, {wanted.get('name')}, got "
            f"{found.get('name')}, which has the same shapes and other weights"
        )
    if same is None and found.keys() & {"fingerprint", "weights"}:
        tell(
            f"Note: {path} and {other} are joined by the names and shapes of their models' "
            "parameters: one of them does not tell its weights, as earlier versions did not"
        )


def pruned_parameters(plan: PruningPlan) -> int | None:
    """Number of parameters of the pruned model; None if the plan does not tell."""
    sizes = plan.model.get("layer_parameters")
    whole = plan.model.get("num_parameters")
    if not sizes or not whole:
        return None
    return int(whole) - sum(int(sizes[layer]) for layer in plan.removed)


def check_results(path: Path, content: Content, plan: PruningPlan) -> None:
    """Check results.json, which has perplexity, size and speed of both models."""
    check_model(path, {"num_parameters": content["dense"]["num_parameters"]}, plan)
    _check_pruned(path, content["pruned"]["num_parameters"], plan)
    for stage in ("dense", "pruned"):
        part = content[stage]
        _finite(part["perplexity"], part["nll"])
        if "speed" in part:
            _finite(part["speed"]["prefill"], part["speed"]["decode"])
    content["evaluation"]["num_predicted_tokens"]
    if not content.get("streamed"):
        content["pruned"]["generation"]["equals_uncached"]


def check_evaluation(path: Path, content: Content, plan: PruningPlan | None) -> None:
    """Check a file of `simdiff eval`, which has two or more models on the same text or tasks."""
    models = as_object(content["models"])
    if not models:
        raise ValueError("models must hold one or more")
    dense = content.get("dense", next(iter(models)))
    for model in models.values():
        if "perplexity" in model:
            _finite(model["perplexity"], model["nll"])
        for task in model.get("tasks", {}).values():
            _finite(task["value"], task["chance"])
        if model.get("tasks"):
            for kind, of in averages_by_kind({"averages": model["averages"]}).items():
                for average in AVERAGES[kind]:
                    of[average]["retained"], of[average]["tasks"]
    known = {"name": dense} | {
        key: models[dense][key]
        for key in ("fingerprint", "weights", "num_parameters")
        if key in models[dense]
    }
    check_model(path, known, plan)
    if plan is None:
        return
    cuts = [model.get("removed") for name, model in models.items() if name != dense]
    if cuts and None not in cuts and sorted(plan.removed) not in cuts:
        raise SimdiffError(
            f"{path}: must be of the plan's cut, layers {sorted(plan.removed)}, got those without "
            f"layers {' and '.join(map(str, cuts))}"
        )
    others = [model.get("num_parameters") for name, model in models.items() if name != dense]
    wanted = pruned_parameters(plan)
    if others and None not in (wanted, *others) and wanted not in others:
        raise SimdiffError(
            f"{path}: must hold the plan's model without layers {sorted(plan.removed)}, which has "
            f"{wanted} parameters, got models with {', '.join(map(str, others))}"
        )


def check_bench(path: Path, content: Content, plan: PruningPlan | None) -> None:
    """Check a file of `simdiff bench`, which has both models for each setting."""
    check_model(path, content["models"]["dense"], plan)
    removed = content["removed"]
    if plan is not None and removed is not None and sorted(removed) != sorted(plan.removed):
        raise SimdiffError(
            f"{path}: must be of the plan's cut, layers {sorted(plan.removed)}, got {removed}"
        )
    _check_pruned(path, content["models"]["pruned"]["num_parameters"], plan)
    if not content["settings"]:
        raise ValueError("settings must not be empty")
    for setting in content["settings"]:
        for phase in ("prefill", "decode"):
            for stage in ("dense", "pruned"):
                speed = setting[stage]["tokens_per_second"][phase]
                _finite(speed["median"], speed["lower_quartile"], speed["upper_quartile"])
            ratio = setting["phases"][phase]
            _finite(
                ratio["ideal"],
                ratio["share_of_ideal"],
                *(ratio["ratio"][key] for key in ("median", "low", "high")),
            )


def check_recovery(path: Path, content: Content, plan: PruningPlan | None) -> None:
    """Check recovery.json, which has the quality of three models and details of the method."""
    check_model(path, content.get("model", {}), plan)
    for stage in STAGES:
        _finite(content["quality"][stage]["perplexity"], content["quality"][stage]["nll"])
    for key in ("method", "formula", "settings", "seconds", "machine", "notes", "details"):
        content[key]
    for point in content["details"].get("training", {}).get("curve", ()):
        _finite(point["step"], point["tokens"], point["seconds"])
        for key in ("train_loss", "set_apart_loss"):
            if point[key] is not None:
                _finite(point[key])
    for layer in content["details"].get("layers", ()):
        if plan is not None and not 0 <= layer["layer"] < plan.num_layers:
            raise ValueError(f"layer must be 0 to {plan.num_layers - 1}, got {layer['layer']}")
        if layer["relative_error"] is not None:
            _finite(layer["relative_error"])
        for part in layer.get("parts", ()):
            _finite(part["relative_error"])


def _check_pruned(path: Path, found: int, plan: PruningPlan | None) -> None:
    wanted = None if plan is None else pruned_parameters(plan)
    if plan is not None and wanted is not None and found != wanted:
        raise SimdiffError(
            f"{path}: must be of the plan's model without layers {sorted(plan.removed)}, which has "
            f"{wanted} parameters, got one with {found}"
        )


def _check_stored_plan(path: Path, plan: PruningPlan) -> None:
    """Check that the plan in a recovered checkpoint's directory is the plan of the report."""
    beside = path.with_name(PLAN_FILE)
    if not beside.is_file():
        return
    other = PruningPlan.load(beside)
    check_model(beside, other.model, plan)
    if sorted(other.removed) != sorted(plan.removed):
        raise SimdiffError(
            f"{path}: must be a recovery of the plan's cut, layers {sorted(plan.removed)}, got "
            f"{sorted(other.removed)} by {beside}"
        )


def _finite(*values: float) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"numbers must be finite, got {value}")
