"""Scores of tasks, their averages, and the share of the dense model's that a model retains."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simdiff.errors import SimdiffError

# A task counts as at chance if the dense model's score is at most this many standard errors above
# chance: there is nothing that a cut could lose.
CHANCE_ERRORS = 2.0
# The kinds of tasks: the model chooses among answers that are given, or finds its own.
CLASSIFICATION, GENERATION = "classification", "generation"


@dataclass(frozen=True)
class TaskScore:
    """The score of a model on one task, or on all members of a group together."""

    name: str
    metric: str
    """Name of the metric of `value`, such as acc, or acc_norm (log-likelihoods over lengths)."""
    value: float
    standard_error: float | None
    """Standard error of `value` over items, as lm_eval reports it; None for a single item."""
    chance: float
    """Expected score of guessing: the mean of 1 / number of choices; 0 without choices."""
    constant: float | None
    """Share of the most frequent answer, if all items have the same choices; else None."""
    values: tuple[float, ...]
    """Value of the metric for every item, in the order of the data."""
    items: str
    """SHA-256 over the items, their prompts included: equal for equal items in equal order."""
    metrics: Mapping[str, Mapping[str, float | None]]
    """Every metric that lm_eval reports, each with `value` and `standard_error`."""

    @property
    def kind(self) -> str:
        """Classification if items have choices; else generation, of which guessing gives 0."""
        return CLASSIFICATION if self.chance > 0 else GENERATION

    @property
    def at_chance(self) -> bool:
        """Whether the score is at most two standard errors above chance, or has no error."""
        if self.standard_error is None:
            return True
        return self.value - self.chance <= CHANCE_ERRORS * self.standard_error

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; items of a yes-or-no metric become a string of 1 and 0."""
        binary = all(value in (0.0, 1.0) for value in self.values)
        return {
            "kind": self.kind,
            "metric": self.metric,
            "value": self.value,
            "standard_error": self.standard_error,
            "chance": self.chance,
            "constant_answer": self.constant,
            "at_chance": self.at_chance,
            "num_items": len(self.values),
            "items_sha256": self.items,
            "items": "".join(str(int(v)) for v in self.values) if binary else list(self.values),
            "metrics": {name: dict(value) for name, value in self.metrics.items()},
        }


def task_score(
    row: str, members: Sequence[str], results: Mapping[str, Any], preferred: str
) -> TaskScore:
    """Make the score of a task, or of a group from all items of its members.

    Args:
        row: name of the result.
        members: names of lm_eval's tasks.
        results: the result of `lm_eval.simple_evaluate`, with its samples.
        preferred: the metric to use if the task has it.

    Raises:
        SimdiffError: the task has no item, or no metric that is a mean over items.
    """
    samples = [_first_filter(results["samples"][member]) for member in members]
    pooled = [sample for some in samples for sample in some]
    if not pooled:
        raise SimdiffError(f"task {row}: must have items, got none")
    metric = _metric(row, pooled, preferred)
    metrics = _metrics(members, results, [len(some) for some in samples])
    digest = hashlib.sha256()
    for sample in pooled:
        digest.update(f"{sample['doc_hash']} {sample['prompt_hash']}\n".encode())
    return TaskScore(
        row,
        metric,
        metrics[metric]["value"] or 0.0,
        metrics[metric]["standard_error"],
        sum(map(_chance, pooled)) / len(pooled),
        _constant(pooled),
        tuple(float(sample[metric]) for sample in pooled),
        digest.hexdigest(),
        metrics,
    )


def _first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The samples of the first filter; with several filters each item is listed once for each."""
    kept = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    return sorted(kept, key=lambda sample: int(sample["doc_id"]))


def _metric(row: str, samples: Sequence[Mapping[str, Any]], preferred: str) -> str:
    """The preferred metric, else acc, else the first that gives every item 0 to 1."""
    known = samples[0]["metrics"]
    shares = [name for name in known if all(_is_share(sample[name]) for sample in samples)]
    for name in (preferred, "acc", *shares):
        if name in shares:
            return name
    raise SimdiffError(
        f"task {row}: must have a metric with a number from 0 to 1 for each item, such as acc, got "
        f"{', '.join(known) or 'none'}"
    )


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _metrics(
    members: Sequence[str], results: Mapping[str, Any], sizes: Sequence[int]
) -> dict[str, dict[str, float | None]]:
    """Every metric of a task, or of several tasks weighted by their items, with pooled errors."""
    found: dict[str, list[tuple[float, float | None]]] = {}
    for member in members:
        values = results["results"][member]
        filtered = results["samples"][member][0]["filter"]
        for key, value in values.items():
            name, comma, chosen = key.partition(",")
            if not comma or chosen != filtered or name.endswith("_stderr"):
                continue
            error = values.get(f"{name}_stderr,{chosen}")
            known = isinstance(error, (int, float)) and math.isfinite(error)
            found.setdefault(name, []).append((float(value), float(error) if known else None))
    pooled: dict[str, dict[str, float | None]] = {}
    for name, pairs in found.items():
        if len(pairs) == len(members):
            mean = sum(n * value for n, (value, _) in zip(sizes, pairs, strict=True)) / sum(sizes)
            pooled[name] = {"value": mean, "standard_error": _pooled_error(pairs, sizes)}
    return pooled


def _pooled_error(
    pairs: Sequence[tuple[float, float | None]], sizes: Sequence[int]
) -> float | None:
    """lm_eval's standard error of a group, from the pooled variance of items within its members."""
    if len(pairs) == 1:
        return pairs[0][1]
    if any(error is None for _, error in pairs):
        return None
    terms = zip(sizes, pairs, strict=True)
    variance = sum((n - 1) * n * (error or 0.0) ** 2 for n, (_, error) in terms)
    return math.sqrt(variance / (sum(sizes) - len(sizes)) / sum(sizes))


def _chance(sample: Mapping[str, Any]) -> float:
    """1 / number of choices of an item; 0 if it has none."""
    choices = len(sample["arguments"])
    if "acc_mutual_info" in sample["metrics"]:
        choices //= 2  # for this metric every choice is asked again without its question
    return 1 / choices if choices > 1 else 0.0


def _constant(samples: Sequence[Mapping[str, Any]]) -> float | None:
    choices = {tuple(str(pair[1]) for pair in sample["arguments"]) for sample in samples}
    if len(choices) != 1 or len(next(iter(choices))) < 2:
        return None
    targets = Counter(str(sample["target"]) for sample in samples)
    return targets.most_common(1)[0][1] / len(samples)


@dataclass(frozen=True)
class TaskDifference:
    """A model's score minus the dense model's, on the same items."""

    value: float
    standard_error: float | None
    """Standard error of the items' differences; items on which both models agree cancel."""


def paired_difference(score: TaskScore, dense: TaskScore) -> TaskDifference:
    """The difference of a model's score from the dense model's on one task.

    Raises:
        SimdiffError: the items differ.
    """
    check_same_items(score, dense)
    gaps = [a - b for a, b in zip(score.values, dense.values, strict=True)]
    return TaskDifference(score.value - dense.value, _error_of_mean(gaps))


def check_same_items(score: TaskScore, dense: TaskScore) -> None:
    """Refuse to compare scores of different items or metrics.

    Raises:
        SimdiffError: the items or the metrics differ.
    """
    if (score.items, score.metric) != (dense.items, dense.metric):
        raise SimdiffError(
            f"task {score.name}: both models must be asked the same items in the same order and "
            f"judged by the same metric, got {len(score.values)} by {score.metric} and "
            f"{len(dense.values)} by {dense.metric}"
        )


def _error_of_mean(values: Sequence[float]) -> float | None:
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


@dataclass(frozen=True)
class TaskAverage:
    """The mean score over some tasks with equal weights, and its share of the dense model's."""

    tasks: tuple[str, ...]
    average: float | None
    """Mean score; like the other fields, None if there is no task."""
    standard_error: float | None
    retained: float | None
    """`average` over the dense model's average."""
    retained_error: float | None
    """Standard error of `retained`, from the items that both models answered."""


def average(
    scores: Mapping[str, TaskScore], dense: Mapping[str, TaskScore], names: Sequence[str]
) -> TaskAverage:
    """Mean score over tasks and retained quality R = mean / mean of the dense model.

    The standard error of the mean is √(Σ se²) / T over T tasks, since their items are independent.
    That of R follows by the delta method: the error of (mean − R · mean of the dense model) on the
    same items, divided by the dense mean. It does not include the choice of the tasks.

    Args:
        scores, dense: scores of a model and of the dense model, by task.
        names: the tasks that count.
    """
    if not names:
        return TaskAverage((), None, None, None, None)
    count = len(names)
    mean = sum(scores[name].value for name in names) / count
    whole = sum(dense[name].value for name in names) / count
    if whole == 0:
        errors = [scores[name].standard_error for name in names]
        return TaskAverage(tuple(names), mean, _combined(errors), None, None)
    retained = mean / whole
    gaps = []
    for name in names:
        check_same_items(scores[name], dense[name])
        pairs = zip(scores[name].values, dense[name].values, strict=True)
        gaps.append(_error_of_mean([a - retained * b for a, b in pairs]))
    error = _combined(gaps)
    return TaskAverage(
        tuple(names),
        mean,
        _combined([scores[name].standard_error for name in names]),
        retained,
        None if error is None else error / whole,
    )


def _combined(errors: Sequence[float | None]) -> float | None:
    """The standard error of the mean of independent values."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    return math.sqrt(sum(error**2 for error in known)) / len(known)


def above_chance(dense: Mapping[str, TaskScore]) -> list[str]:
    """The tasks on which the dense model is above chance."""
    return [name for name, score in dense.items() if not score.at_chance]


@dataclass(frozen=True)
class KindAverages:
    """Averages over the tasks of one kind."""

    all_tasks: TaskAverage
    above_chance: TaskAverage
    """Over the tasks on which the dense model is above chance, of generation above 0."""


def averages(
    scores: Mapping[str, TaskScore], dense: Mapping[str, TaskScore]
) -> dict[str, KindAverages]:
    """Averages of the tasks of each kind that there is, see `average`.

    Kinds are not mixed: a cut loses what a model writes long before what it chooses among choices.
    """
    names = {
        kind: [name for name, score in dense.items() if score.kind == kind]
        for kind in (CLASSIFICATION, GENERATION)
    }
    above = above_chance(dense)
    return {
        kind: KindAverages(
            average(scores, dense, of),
            average(scores, dense, [name for name in of if name in above]),
        )
        for kind, of in names.items()
        if of
    }
