"""Write task files for lm_eval: its own tasks, with data files on this machine."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from simdiff.data.demo import DEMO, cache_directory
from simdiff.errors import SimdiffError
from simdiff.evaluation.demo_tasks import MMLU, DemoTask, Function, demo_data, demo_tasks

INSTALL = 'pip install "simdiff-kernels[eval]", or lm_eval==0.4.13 datasets accelerate'
# Format for `datasets.load_dataset` by the suffix of a file.
_FORMATS = {".arrow": "arrow", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
# Files that `Dataset.save_to_disk` writes next to the data.
_DESCRIPTIONS = {"dataset_info.json", "dataset_dict.json", "state.json"}
_WITHOUT_SPLIT = ""  # for DIR/task.parquet, the split that the stock task evaluates


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
        if isinstance(task, DemoTask):
            path = task.path()
            splits = _splits(path) if path.is_dir() else {_WITHOUT_SPLIT: [path.resolve()]}
            yaml = None if task.yaml is None else stock / task.yaml
            _write_task(folder, name, yaml, splits, task.changes)
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
    yaml: Path | None,
    splits: dict[str, list[Path]],
    changes: Mapping[str, Any],
) -> None:
    """Write a task file that reads these files and drops other splits.

    It includes the stock one; where there is none, `changes` are the whole task.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    config = changes if yaml is None else load_yaml(yaml, resolve_func=False)
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
    asked = kept["test_split"] or kept["validation_split"]
    others = (kept[key] for key in ("fewshot_split", "training_split", "validation_split"))
    if next(filter(None, others), asked) == asked:
        # Only where both are named lm_eval keeps an item out of its own examples.
        kept |= {"test_split": asked, "fewshot_split": asked}
    files = {split: splits[split] for split in dict.fromkeys(kept.values()) if split}
    suffixes = (Path(path.name.removesuffix(".gz")).suffix for of in files.values() for path in of)
    formats = {_FORMATS[suffix] for suffix in suffixes}
    if len(formats) > 1:
        raise SimdiffError(f"task {name}: its files must be of one format, got {sorted(formats)}")
    content = {
        **({} if yaml is None else {"include": str(yaml)}),
        "task": name,
        "dataset_path": formats.pop(),
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: list(map(str, paths)) for split, paths in files.items()},
            "cache_dir": str((cache_directory() / "datasets").absolute()),
        },
        **changes,
        **kept,
    }
    _dump(folder / f"{name}.yaml", content)


def _dump(path: Path, content: dict[str, Any]) -> None:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes the name of a function as lm_eval reads it."""

    Dumper.add_representer(
        Function, lambda dumper, name: dumper.represent_scalar("!function", str(name))
    )
    text = yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def recorded(data: str | None, path: Path) -> dict[str, str]:
    """A data file for the record: its path in its package or directory, and its SHA-256."""
    folder = demo_data() if data == DEMO else Path(data or "").resolve()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    within = path.resolve().relative_to(folder.resolve())
    return {"file": str(within), "sha256": digest.hexdigest()}
