"""Chance, averages, retained quality and errors of differences, against their formulas."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from simdiff.errors import SimdiffError
from simdiff.evaluation.task_scores import (
    CLASSIFICATION,
    GENERATION,
    above_chance,
    average,
    averages,
    paired_difference,
    task_score,
)


def results(**tasks: list[tuple[int, int]]) -> dict[str, Any]:
    """lm_eval's results of tasks whose items are (right, number of choices)."""
    content: dict[str, Any] = {"results": {}, "samples": {}}
    for name, items in tasks.items():
        values = [float(right) for right, _ in items]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else "N/A"
        content["results"][name] = {
            "alias": name,
            "sample_len": len(items),
            "acc,none": statistics.fmean(values),
            "acc_stderr,none": error,
        }
        content["samples"][name] = [
            {
                "doc_id": n,
                "doc_hash": f"{name}{n}",
                "prompt_hash": "p",
                "filter": "none",
                "metrics": ["acc"],
                "acc": float(right),
                "target": n % 2,
                "arguments": [("question", f" {choice}") for choice in range(choices)],
            }
            for n, (right, choices) in enumerate(items)
        ]
    return content


def score(name: str, items: list[tuple[int, int]]) -> Any:
    return task_score(name, [name], results(**{name: items}), "acc_norm")


def test_chance_is_counted_from_the_items() -> None:
    got = score("arc", [(1, 4), (1, 4), (0, 3), (1, 5)])
    assert got.metric == "acc"  # it has no acc_norm
    assert got.value == 0.75
    assert got.chance == pytest.approx((1 / 4 + 1 / 4 + 1 / 3 + 1 / 5) / 4)
    assert got.constant is None  # the choices differ from item to item
    assert got.to_dict()["items"] == "1101"
    assert score("yes", [(1, 2)] * 3).constant == pytest.approx(2 / 3)
    assert score("never", [(0, 2)] * 3).value == 0


@pytest.mark.parametrize(("items", "last"), [(100, 59), (2500, 1299), (10000, 5099)])
def test_two_standard_errors_above_chance(items: int, last: int) -> None:
    """The last number of right answers at chance, and one more, of items of two choices.

    k of n are k / n - 1 / 2 above chance, with the standard error sqrt(k (n - k) / (n - 1)) / n;
    more than two of them where (2k - n)^2 (n - 1) > 16 k (n - k). 59 of 100 are 1.82, 60 are 2.03
    standard errors above it; in 10000 one item makes 0.02 of one.
    """
    for right, excluded in ((last, True), (last + 1, False), (items // 10, True)):
        above = max(0, 2 * right - items)
        assert (above**2 * (items - 1) > 16 * right * (items - right)) is not excluded
        got = score("wino", [(1, 2)] * right + [(0, 2)] * (items - right))
        assert got.at_chance is excluded
        assert (above_chance({"wino": got}) == []) is excluded


def test_one_item_says_nothing() -> None:
    got = score("piqa", [(1, 2)])
    assert got.standard_error is None
    assert got.at_chance


def test_difference_is_paired() -> None:
    dense = [1, 1, 1, 1, 0, 0, 1, 1]
    pruned = [1, 1, 1, 0, 0, 0, 1, 1]
    first, second = (score("t", [(right, 2) for right in row]) for row in (dense, pruned))
    got = paired_difference(second, first)
    gaps = [a - b for a, b in zip(pruned, dense, strict=True)]
    assert got.value == pytest.approx(-1 / 8)
    assert got.standard_error == pytest.approx(statistics.stdev(gaps) / math.sqrt(8))
    # As if the items were others, the error would be more than twice as large.
    assert math.hypot(first.standard_error, second.standard_error) > 1.5 * got.standard_error


def test_average_and_retained() -> None:
    dense = {"a": score("a", [(1, 2)] * 8 + [(0, 2)] * 2), "b": score("b", [(1, 4), (0, 4)] * 5)}
    pruned = {"a": score("a", [(1, 2)] * 6 + [(0, 2)] * 4), "b": score("b", [(1, 4), (0, 4)] * 5)}
    got = average(pruned, dense, ["a", "b"])
    assert got.average == pytest.approx((0.6 + 0.5) / 2)
    assert got.retained == pytest.approx(1.1 / 1.3)
    errors = [statistics.stdev(pruned[name].values) / math.sqrt(10) for name in "ab"]
    assert got.standard_error == pytest.approx(math.hypot(*errors) / 2)
    ratio = 1.1 / 1.3
    gaps = [
        statistics.stdev(
            [p - ratio * d for p, d in zip(pruned[n].values, dense[n].values, strict=True)]
        )
        / math.sqrt(10)
        for n in "ab"
    ]
    assert got.retained_error == pytest.approx(math.hypot(*gaps) / 2 / 0.65)
    assert average(dense, dense, ["a", "b"]).retained == 1.0
    assert average(dense, dense, ["a", "b"]).retained_error == 0.0
    empty = average(pruned, dense, [])
    assert (empty.average, empty.retained) == (None, None)


def test_kinds_are_averaged_apart() -> None:
    """Of 100 items 3 are within two standard errors of 0 (1.73 of them), 5 are not (2.28)."""

    def model(chosen: int, *written: int) -> dict[str, Any]:
        found = {"piqa": score("piqa", [(1, 2)] * chosen + [(0, 2)] * (100 - chosen))}
        for right, name in zip(written, ("math", "trivia", "never"), strict=True):
            found[name] = score(name, [(1, 1)] * right + [(0, 1)] * (100 - right))
        return found

    dense, pruned = model(80, 40, 3, 0), model(76, 10, 1, 0)
    got = averages(pruned, dense)
    assert list(got) == [CLASSIFICATION, GENERATION]
    assert got[CLASSIFICATION].all_tasks.tasks == got[CLASSIFICATION].above_chance.tasks
    assert got[CLASSIFICATION].all_tasks.retained == pytest.approx(0.95)
    assert got[GENERATION].all_tasks.tasks == ("math", "trivia", "never")
    assert got[GENERATION].all_tasks.retained == pytest.approx(11 / 43)
    assert got[GENERATION].above_chance.tasks == ("math",)
    assert got[GENERATION].above_chance.retained == pytest.approx(0.25)
    assert above_chance(model(80, 40, 5, 0)) == ["piqa", "math", "trivia"]
    nothing = {"never": dense["never"]}
    assert averages(nothing, nothing)[GENERATION].all_tasks.retained is None
    assert list(averages(nothing, nothing)) == [GENERATION]


def test_a_metric_that_is_no_share_is_not_averaged() -> None:
    content = results(t=[(1, 1)] * 2)
    for sample, bleu in zip(content["samples"]["t"], (0.5, 31.0), strict=True):
        sample["metrics"] = ["bleu", "exact_match"]
        sample |= {"bleu": bleu, "exact_match": 1.0}
    content["results"]["t"] |= {"bleu,none": 15.75, "exact_match,none": 1.0}
    got = task_score("t", ["t"], content, "acc_norm")
    assert (got.metric, got.value, got.kind) == ("exact_match", 1.0, GENERATION)


def test_a_group_weighs_its_items() -> None:
    content = results(x=[(1, 4), (0, 4)], y=[(1, 4), (1, 4), (0, 4), (1, 4)])
    got = task_score("both", ["x", "y"], content, "acc")
    assert got.value == pytest.approx(4 / 6)
    metrics = pytest.importorskip("lm_eval.api.metrics")
    errors = [content["results"][name]["acc_stderr,none"] for name in "xy"]
    assert got.standard_error == pytest.approx(metrics.pooled_sample_stderr(errors, [2, 4]))
    assert len(got.values) == 6


def test_other_items_are_not_compared() -> None:
    first, second = score("t", [(1, 2)] * 3), score("t", [(1, 2)] * 4)
    with pytest.raises(SimdiffError, match="same items in the same order"):
        paired_difference(first, second)
    with pytest.raises(SimdiffError, match="same items in the same order"):
        average({"t": first}, {"t": second}, ["t"])


def test_a_task_without_numbers_is_refused() -> None:
    content = results(t=[(1, 2)])
    content["samples"]["t"][0]["acc"] = (1, 0)
    with pytest.raises(
        SimdiffError, match="must have a metric with a number from 0 to 1 .* got acc"
    ):
        task_score("t", ["t"], content, "acc")
