"""Figures of several models and what is said of them, from losses and items written out."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation import quality, window_perplexity
from simdiff.evaluation.losses import exponential
from simdiff.evaluation.quality import ModelQuality, Quality, Subject, TextChoice, evaluate_models
from simdiff.evaluation.task_scores import TaskScore
from simdiff.evaluation.tasks import TaskOptions
from simdiff.evaluation.text_perplexity import TextPerplexity
from simdiff.evaluation.window_perplexity import perplexity
from simdiff.report.cells import quality_rows

TEXT = {
    "num_windows": 32,
    "window_length": 512,
    "stride": 256,
    "bos": False,
    "whole": False,
    "part": "held-out",
    "source": "a.txt",
}


def measured(*losses: float, tokens: int = 10) -> TextPerplexity:
    """Of blocks of so many tokens with these summed losses."""
    nll = sum(losses) / tokens / len(losses)
    return TextPerplexity(
        math.exp(nll),
        nll,
        None,
        None,
        None,
        tokens * len(losses),
        len(losses),
        tuple((loss, tokens) for loss in losses),
    )


def task(name: str, right: int, constant: float | None = None, **changes: Any) -> TaskScore:
    """100 items of two choices, so that the standard error of 75 is 4.35 and of 59 4.94%."""
    error = math.sqrt(right * (100 - right) / 99) / 100
    values = (1.0,) * right + (0.0,) * (100 - right)
    known = {"metric": "acc", "items": "x", "metrics": {}, "chance": 0.5, **changes}
    return TaskScore(
        name=name,
        value=right / 100,
        standard_error=error,
        constant=constant,
        values=values,
        **known,
    )


def quality_of(dense: list[TaskScore], pruned: list[TaskScore], **run: Any) -> Quality:
    known = {"few_shot_split": "train", "split": "test", "num_fewshot": 0, "max_new_tokens": None}
    splits = {t.name: known for t in dense}
    told = {"limit": None, "versions": {"lm_eval": "0.4.9"}, "num_fewshot": 0, "tasks": splits}
    models = [
        ModelQuality(name, 5, "float32", None, None, {t.name: t for t in tasks})
        for name, tasks in (("dense", dense), ("pruned", pruned))
    ]
    return Quality(models, {**told, **run})


def test_notes_of_tasks() -> None:
    """59 of 100 are not above chance; 75 not clearly above 70, which is 1.15 errors off."""
    dense = [
        task("wino", 59, 0.55),
        task("boolq", 75, 0.70),
        task("arc", 75, metric="acc_norm"),
        task("rte", 75, 0.60),
        task("copa", 75),
    ]
    assert quality_of(dense, dense).notes() == [
        "tasks: lm_eval 0.4.9, 0-shot, all items, the same for every model; acc for wino, boolq, "
        "rte, copa; acc_norm for arc; ± is one standard error",
        "left out of the average without tasks at chance: wino (59.0, chance 50.0): the dense "
        "model is not more than 2 standard errors above chance, which is the mean of 1 / number "
        "of choices over the items",
        "boolq: one and the same answer to every item would give 70.0; the dense model's 75.0 "
        "does not clearly exceed it",
        "boolq: its passages are the demo text, so that a model calibrated or repaired on the text "
        "'demo' has seen half of them",
        CHOICES_ALONE,
    ]
    few = {
        "arc": {
            "few_shot_split": "test",
            "split": "test",
            "num_fewshot": 5,
            "max_new_tokens": None,
        }
    }
    assert quality_of(dense[2:3], dense[2:3], limit=7, num_fewshot=5, tasks=few).notes() == [
        "tasks: lm_eval 0.4.9, 5-shot, 7 items of each, drawn at random, the same for every model; "
        "acc_norm for arc; ± is one standard error",
        "the dense model is above chance on every task: none is left out",
        "arc: few-shot examples are other items of the split that is evaluated",
        CHOICES_ALONE,
    ]


CHOICES_ALONE = (
    "every task gives its choices, of which a cut costs less than of answers that a model writes: "
    "add a generation task, such as triviaqa"
)


def test_notes_of_written_answers() -> None:
    """3 of 100 right are within two standard errors of none, 40 are not."""
    known = {"few_shot_split": "train", "split": "test"}
    ran = {
        "piqa": known | {"num_fewshot": 0, "max_new_tokens": None},
        "math": known | {"num_fewshot": 5, "max_new_tokens": 12},
        "gsm8k": known | {"num_fewshot": 5, "max_new_tokens": 256},
        "trivia": known | {"num_fewshot": 0, "max_new_tokens": 12},
    }
    dense = [
        task("piqa", 75),
        *(
            task(name, right, chance=0.0, metric="exact_match")
            for name, right in (("math", 40), ("gsm8k", 3), ("trivia", 0))
        ),
    ]
    told = quality_of(dense, dense, tasks=ran, chat_template=True)
    assert told.notes() == [
        "tasks: lm_eval 0.4.9, 0-shot (5-shot: math, gsm8k), asked by the model's chat template, "
        "all items, the same for every model; acc for piqa; exact_match for math, gsm8k, trivia; "
        "answers of math, trivia of at most 12 tokens; answers of gsm8k of at most 256 tokens; ± "
        "is one standard error",
        "nothing to retain in gsm8k (3.0), trivia (0.0): what the dense model writes is right in "
        "not more than 2 standard errors above 0, and the task is left out of the average without "
        "such tasks",
    ]
    _, rows = quality_rows(told.to_dict())
    assert [row.label for row in rows if row.group in ("tasks", "averages")] == [
        "piqa, acc, % (chance 50.0)",
        "math, exact_match, % (written)",
        "gsm8k, exact_match, % (written, dense near 0: nothing to retain)",
        "trivia, exact_match, % (written, dense near 0: nothing to retain)",
        "classification, average of all tasks (1), %",
        "retained of dense, %",
        "classification, average without tasks at chance (1), %",
        "retained of dense, %",
        "generation, average of all tasks (3), %",
        "retained of dense, %",
        "generation, average without tasks near 0 (1), %",
        "retained of dense, %",
    ]


@pytest.mark.parametrize(
    ("changes", "blocks", "wanted"),
    [
        (
            {},
            2,
            "perplexity: 32 windows of 512 tokens, stride 256, no BOS, the start of the "
            "held-out part of a.txt; 95% interval by Student's t over 2 runs of windows",
        ),
        (
            {"bos": True, "whole": True},
            1,
            "perplexity: 32 windows of 512 tokens, stride 256, a BOS "
            "token before each, all of the held-out part of a.txt; no interval from a single run "
            "of windows",
        ),
        (
            {"part": "all"},
            1,
            "perplexity: 32 windows of 512 tokens, stride 256, no BOS, the start of a.txt; no "
            "interval from a single run of windows",
        ),
    ],
)
def test_notes_of_text(changes: dict[str, bool], blocks: int, wanted: str) -> None:
    text, losses = {**TEXT, **changes}, measured(*[20.0] * blocks)
    models = [
        ModelQuality(name, 5, "float32", own, losses, {})
        for name, own in (("dense", text), ("same", dict(text)), ("other", {}))
    ]
    assert Quality(models, None).notes() == [
        wanted,
        "other reads the text as other tokens than dense: perplexities per token cannot be "
        "compared",
    ]


def test_a_ratio_of_perplexities() -> None:
    """Blocks of 10 tokens, each with a loss 5 higher: e^0.5 times as perplexed, for certain."""
    dense, pruned = measured(20.0, 31.0), measured(25.0, 36.0)
    models = [
        ModelQuality("dense", 5, "float32", TEXT, dense, {}),
        ModelQuality("pruned", 4, "float32", dict(TEXT), pruned, {}),
        ModelQuality("other", 4, "float32", {}, pruned, {}),
        ModelQuality("none", 4, "float32", TEXT, None, {}),
    ]
    found_of = Quality(models, None)
    found = [found_of.against_dense(model).perplexity for model in models]
    ratio = math.exp(0.5)
    assert found[1] is not None
    assert (found[1].ratio, found[1].low, found[1].high) == pytest.approx((ratio,) * 3)
    assert found[2:] == [None, None]
    short = [
        ModelQuality(name, 4, "float32", TEXT, measured(loss), {})
        for name, loss in (("dense", 25.5), ("short", 25.0))
    ]
    alone = Quality(short, None).against_dense(short[1]).perplexity
    assert alone is not None
    assert (alone.ratio, alone.low, alone.high) == (pytest.approx(math.exp(-0.05)), None, None)
    content = found_of.to_dict()["models"]
    assert content["pruned"]["against_dense"]["ratio"] == found[1].ratio
    assert content["other"]["against_dense"] is None
    assert content["none"] == {"num_parameters": 4, "dtype": "float32"}


def test_averages_leave_out_what_is_at_chance() -> None:
    dense, pruned = [task("wino", 59), task("arc", 75)], [task("wino", 55), task("arc", 60)]
    found = quality_of(dense, pruned).to_dict()["models"]["pruned"]
    averages = found["averages"]["classification"]
    assert averages["all_tasks"]["average"] == pytest.approx(0.575)
    assert averages["all_tasks"]["retained"] == pytest.approx(1.15 / 1.34)
    assert averages["above_chance"]["tasks"] == ("arc",)
    assert averages["above_chance"]["retained"] == pytest.approx(0.8)
    # 15 of 100 items differ, all by one: the variance of the gaps is (15 - 15^2 / 100) / 99.
    gap = found["tasks"]["arc"]["difference"]
    assert gap["value"] == pytest.approx(-0.15)
    assert gap["standard_error"] == pytest.approx(math.sqrt((15 - 2.25) / 99 / 100))


def test_a_slip_in_the_last_name_is_told_before_the_first_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "load_model", lambda *of, **options: 1 / 0)
    (tmp_path / "small").mkdir()
    with pytest.raises(SimdiffError, match=r"smal: no such directory; did you mean .*/small\?"):
        evaluate_models([tmp_path / "small", tmp_path / "smal"], text=TextChoice("demo"))


def test_models_are_asked_one_after_the_other(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []
    loaded = SimpleNamespace(identity=lambda: {"tasks": {}})

    def run(*given: object, description: str) -> dict[str, TaskScore]:
        asked.append((*given, description, llama.training))
        return {"arc": task("arc", 75)}

    monkeypatch.setattr(quality, "load_tasks", lambda options: loaded)
    monkeypatch.setattr(quality, "run_tasks", run)
    llama.train()
    subjects = [Subject.given(llama, f"words of {name}", name) for name in ("one", "two")]
    found = evaluate_models(subjects, tasks=TaskOptions(("arc",)))
    assert asked == [
        (llama, f"words of {name}", loaded, f"tasks, {name}", False) for name in ("one", "two")
    ]
    assert llama.training
    # 6 layers of 7744, two tables of 97 x 32 and a norm.
    size = 6 * 7744 + 2 * 97 * 32 + 32
    assert [(m.name, m.num_parameters, m.dtype, m.text, m.perplexity) for m in found.models] == [
        (name, size, "float32", None, None) for name in ("one", "two")
    ]
    assert found.tasks == {"tasks": {}}
    with pytest.raises(SimdiffError, match="there must be a text, tasks or both"):
        evaluate_models(subjects)
    with pytest.raises(SimdiffError, match="tokenizer of 'three' must be given"):
        Subject.given(llama, None, "three")


def test_perplexity_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses 1, 2, 4: mean 7/3, squared deviations 16/9, 1/9, 25/9, their variance 7/3."""
    windows = torch.zeros(3, 5, dtype=torch.int64)
    losses = [1.0, 2.0, 4.0]
    monkeypatch.setattr(window_perplexity, "window_losses", lambda *_, **__: losses)
    found = perplexity(None, windows)
    assert (found.nll, found.standard_error) == pytest.approx((7 / 3, math.sqrt(7 / 9)))
    # Student's t with two degrees of freedom is 4.30265: 7/3 ± 3.79458 in log.
    assert (found.perplexity, found.low, found.high) == pytest.approx(
        (math.exp(7 / 3), math.exp(7 / 3 - 3.794583), math.exp(7 / 3 + 3.794583)), rel=1e-5
    )
    assert found.num_tokens == 3 * 4
    losses[1:] = []
    assert perplexity(None, windows[:1]).standard_error is None
    losses[:] = [1.0, math.nan, 2.0, math.inf]
    with pytest.raises(SimdiffError, match="in 2 of 4 windows, first in window 1$"):
        perplexity(None, windows)


def test_perplexities_that_float64_does_not_hold() -> None:
    assert exponential(2.5) == pytest.approx(12.182493960703473)
    # The largest float64 is 2^1024 (1 - 2^-53): e^709.78 lies below it, e^709.79 above.
    assert exponential(709.78) == pytest.approx(1.7928e308, rel=1e-3)
    assert exponential(709.79) == exponential(math.inf) == math.inf
    assert math.isnan(exponential(math.nan))
