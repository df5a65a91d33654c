"""Run tasks through lm_eval, zero-shot or few-shot, with the same items for all models."""

from __future__ import annotations

import copy
import random
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.errors import SimdiffError
from simdiff.evaluation.answers import answer_length
from simdiff.evaluation.lm_eval_harness import harness_class, quiet, replaced
from simdiff.evaluation.streamed_tasks import TaskAnswers, check_tasks, streamed_harness
from simdiff.evaluation.task_files import (
    lm_eval_tasks,
    recorded,
    stock_names,
    unknown_task,
    write_task_files,
)
from simdiff.evaluation.task_scores import TaskScore, task_score
from simdiff.io import ranks
from simdiff.io.progress import step
from simdiff.models.running import in_evaluation
from simdiff.models.sweep import WHOLE, Plan

# Seeds as lm_eval's command sets them: for random, numpy and torch, and few-shot examples.
SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}
# Number of bootstrap draws for standard errors without a formula (F1); means do not need it.
_BOOTSTRAP_ITERATIONS = 1000


# Seed of the draw of items.
ITEM_SEED = 0


@dataclass(frozen=True)
class TaskOptions:
    """The tasks to run, their items, and how a model is asked."""

    names: tuple[str, ...]
    data: str | None = None
    """Source of the data: "demo" or a directory, see `write_task_files`; None takes the data that
    the task files name."""
    path: Path | None = None
    """Directory of the user's own task files."""
    limit: int | None = None
    """Number of items of each task, drawn at random, see `LoadedTasks.drawn`; None takes all."""
    num_fewshot: int | None = None
    """Number of solved examples before each item; None takes that of each task's file, mostly 0."""
    batch_size: int = 8
    """Number of requests in a forward. In bfloat16 it changes the last digits through padding."""
    metric: str = "acc_norm"
    """Metric that is averaged, if a task has it; else the task's first metric."""
    chat_template: bool = False
    """Whether items are asked as a user's message by the model's chat template, examples as
    earlier turns of the conversation."""
    max_new_tokens: int | None = None
    """The most tokens of an answer that is written; None takes what each task's file allows."""

    def check(self) -> None:
        """Refuse impossible options before a model is loaded.

        Raises:
            SimdiffError: there is no task, one is named twice, or a number is out of range.
        """
        if not self.names:
            raise SimdiffError("tasks must be at least one name, got none")
        if len(set(self.names)) != len(self.names):
            raise SimdiffError(f"tasks must be named once, got {', '.join(self.names)}")
        least_of = {"limit": 1, "num_fewshot": 0, "batch_size": 1, "max_new_tokens": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise SimdiffError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class LoadedTasks:
    """lm_eval's tasks with their items, for any number of models."""

    options: TaskOptions
    tasks: dict[str, Any]
    """lm_eval's task objects, by name."""
    rows: dict[str, tuple[str, ...]]
    """Rows of a result table: a task alone, or all members of a group."""
    sources: dict[str, list[dict[str, str]]]
    """Data files of the tasks that read local files, each with its SHA-256."""

    def identity(self) -> dict[str, Any]:
        """The tasks and their settings, for the result file."""
        return {
            "names": list(self.options.names),
            "data": self.options.data,
            "limit": self.options.limit,
            "item_seed": None if self.options.limit is None else ITEM_SEED,
            "num_fewshot": self.options.num_fewshot,
            "batch_size": self.options.batch_size,
            "seeds": SEEDS,
            "chat_template": self.options.chat_template,
            "max_new_tokens": self.options.max_new_tokens,
            "versions": {name: version(name) for name in ("lm_eval", "datasets", "accelerate")},
            "tasks": {name: self._task(name) for name in self.tasks},
        }

    def drawn(self) -> dict[str, list[int]] | None:
        """The indices of the items to run, in order, by task; None takes all items.

        They are drawn with the name of the task and `ITEM_SEED` as seed, the same in every run. The
        first items of a data set would not do: they may all come from one of its sources.
        """
        limit = self.options.limit
        if limit is None:
            return None
        counts = {name: len(task.eval_docs) for name, task in self.tasks.items()}
        return {
            name: sorted(random.Random(f"{ITEM_SEED} {name}").sample(range(n), min(limit, n)))
            for name, n in counts.items()
        }

    def fewest_items(self) -> int:
        """The number of items of the task that has the fewest."""
        most = self.options.limit
        counts = [len(task.eval_docs) for task in self.tasks.values()]
        return min(counts if most is None else [min(most, count) for count in counts])

    def _task(self, name: str) -> dict[str, Any]:
        task, shots = self.tasks[name], self.options.num_fewshot
        config = task.config
        split = config.test_split or config.validation_split
        examples = config.fewshot_split or config.training_split or config.validation_split
        shots = (config.num_fewshot or 0) if shots is None else shots
        return {
            "version": str(task.VERSION),
            "split": split,
            "num_items": len(task.eval_docs),
            "num_fewshot": shots,
            "few_shot_split": (examples or split) if shots else None,
            "max_new_tokens": answer_length(task, self.options.max_new_tokens),
            "data_set": [config.dataset_path, config.dataset_name],
            "files": self.sources.get(name, []),
        }


def load_tasks(options: TaskOptions) -> LoadedTasks:
    """Read the task files and their data.

    Raises:
        SimdiffError: lm_eval is not installed, a task is unknown, or data is missing or cannot be
            reached; see also `TaskOptions.check`.
    """
    options.check()
    lm_eval_tasks()
    with quiet(offline=options.data is not None), tempfile.TemporaryDirectory() as scratch:
        own = _own_names(options.path)
        served = [name for name in options.names if name not in own]
        files: dict[str, list[Path]] = {}
        if served and options.data is not None:
            files = write_task_files(served, options.data, Path(scratch))
        with step("load the tasks"):
            manager = _manager(options, Path(scratch), own)
            tasks: dict[str, Any] = {}
            rows: dict[str, tuple[str, ...]] = {}
            for name in options.names:
                found, members = _load(manager, name)
                tasks |= found
                rows |= members
    sources = {
        name: [recorded(options.data, path) for path in paths] for name, paths in files.items()
    }
    return LoadedTasks(options, tasks, rows, sources)


def _own_names(path: Path | None) -> set[str]:
    """The names of tasks, groups and tags in a user's directory of task files."""
    if path is None:
        return set()
    if not path.is_dir():
        raise SimdiffError(f"task path {path} must be a directory of task files, and is not there")
    from lm_eval.tasks import TaskManager

    return set(TaskManager(include_path=str(path), include_defaults=False).all_tasks)


def _manager(options: TaskOptions, written: Path, own: set[str]) -> Any:
    """Make lm_eval's index of the tasks that are needed."""
    from lm_eval.tasks import TaskManager

    paths = [str(written)] + ([] if options.path is None else [str(options.path)])
    stock = set() if options.data is not None else set(options.names) - own
    if stock:
        singles = stock_names()
        # lm_eval's full index takes half a minute to build, so only groups and tags use it.
        if stock <= set(singles):
            for name in stock:
                (written / f"{name}.yaml").write_text(f"include: {singles[name]}\ntask: {name}\n")
            stock = set()
    manager = TaskManager(include_path=paths, include_defaults=bool(stock))
    for name in options.names:
        if name not in manager.task_index:
            raise unknown_task(
                name,
                manager.all_tasks,
                "a file in lm_eval or in the path of TaskOptions (--task-path)",
            )
    return manager


def _load(manager: Any, name: str) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Load the tasks of a name; return them and their rows, one for a group, else one each."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # lm_eval, datasets, the hub's client or a user's file may raise any
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SimdiffError(
            f"task {name!r}: its data must be at hand (--task-data, or data in TaskOptions) or "
            "within reach on the hub: "
            f"{type(error).__name__}: {reason}"
        ) from error
    tasks = dict(loaded["tasks"])
    members = tuple(tasks)
    if name in loaded.get("groups", {}):
        return tasks, {name: members}
    return tasks, {member: (member,) for member in members}


@in_evaluation
def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTasks,
    *,
    description: str = "tasks",
    answers: TaskAnswers | None = None,
    plan: Plan = WHOLE,
) -> dict[str, TaskScore]:
    """Run every item of every task on a model; processes share the items as lm_eval deals them.

    Args:
        model, tokenizer, loaded: the model, its tokenizer and the tasks.
        description: of the step, for people.
        answers: of a streamed model that was asked the same with and without some layers.
        plan: the layers that are missing in `answers`.

    Returns:
        A score for each of `loaded.rows`.

    Raises:
        SimdiffError: lm_eval refuses the model or an item, or see `check_tasks`.
    """
    check_tasks(model, loaded)
    ranks.agree("tasks", loaded.identity())

    def run() -> dict[str, TaskScore]:
        harness = streamed_harness(
            harness_class(description, loaded.options.max_new_tokens),
            model,
            answers or TaskAnswers(),
            plan,
        )
        return _scores(harness, model, tokenizer, loaded, description)

    if loaded.fewest_items() < ranks.size():  # lm_eval needs an item for every process
        return ranks.first(run)
    return ranks.gather(run())[0]


def _scores(
    kind: type[Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTasks,
    description: str,
) -> dict[str, TaskScore]:
    """The scores of `run_tasks`; in other processes than the first an empty mapping."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    options = loaded.options
    # It asks git for the commit of the working directory, which says nothing and may complain.
    no_commit = replaced(evaluator, "get_git_commit_hash", lambda: None)
    with quiet(offline=options.data is not None), no_commit:
        harness = kind(
            # lm_eval adds a pad token to a tokenizer without one, and ties weights again.
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=options.batch_size,
        )
        try:
            results = evaluator.simple_evaluate(
                model=harness,
                tasks=list(loaded.tasks.values()),
                # The tasks are there: without this it would read all files of all its tasks.
                task_manager=TaskManager(include_defaults=False),
                num_fewshot=options.num_fewshot,
                apply_chat_template=options.chat_template,
                fewshot_as_multiturn=options.chat_template,
                batch_size=options.batch_size,
                samples=loaded.drawn(),
                bootstrap_iters=_BOOTSTRAP_ITERATIONS,
                log_samples=True,
                **SEEDS,
            )
        except SimdiffError:  # of ours: what it says needs no more
            raise
        except (ValueError, AssertionError, KeyError) as error:
            raise SimdiffError(f"{description}: lm_eval refuses: {error}") from error
    if results is None:
        return {}
    return {
        row: task_score(row, members, results, options.metric)
        for row, members in loaded.rows.items()
    }
