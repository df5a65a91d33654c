"""Options of the Python functions: text that is asked for, objects beside plain arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import simdiff
from simdiff import Budget, PlanOptions, ScoringOptions, SimdiffError, TextOptions
from simdiff.jobs.inputs import text_of
from simdiff.scoring.scores import LayerScores

AMOUNT = {"num_windows": 4, "window_length": 16}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 90, (4, 16), generator=torch.Generator().manual_seed(3))


def same(one: LayerScores, other: LayerScores) -> bool:
    return one.to_dict() | {"created": ""} == other.to_dict() | {"created": ""}


@pytest.mark.parametrize(
    "call",
    [
        lambda model, plan, out: simdiff.score(model),
        lambda model, plan, out: simdiff.score(str(out.parent / "nowhere")),
        lambda model, plan, out: simdiff.recover(model, plan, out),
    ],
)
def test_a_model_of_your_own_asks_for_text(
    llama: PreTrainedModel, tmp_path: Path, call: Callable[[Any, Any, Path], object]
) -> None:
    with pytest.raises(SimdiffError, match="text must be given for a model of your own"):
        call(llama, tmp_path / "no plan is read before", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_evaluate_measures_text_where_it_is_given(llama: PreTrainedModel) -> None:
    with pytest.raises(SimdiffError, match="text, tasks or both"):
        simdiff.evaluate(llama)


def test_the_demo_has_a_text_of_its_own() -> None:
    amount = {"num_windows": 5, "window_length": 7, "seed": 2}
    wanted = TextOptions("demo", 5, 7, 2)
    assert text_of("score", "demo", None, amount) == wanted
    assert text_of("score", Path("demo"), None, amount) == wanted
    assert text_of("score", "mine", "a.txt", amount) == TextOptions("a.txt", 5, 7, 2)
    given = TextOptions("b.txt", 9)
    usual = {"num_windows": 64, "window_length": 512, "seed": 0}
    assert text_of("recover", "mine", given, usual, num_windows=64) is given


def test_objects_do_what_plain_arguments_do(
    tiny_checkpoint: Path, tiny_text: Path, tokens: torch.Tensor
) -> None:
    plain = simdiff.score(
        tiny_checkpoint, tiny_text, skip_leading=2, seed=3, progress=False, **AMOUNT
    )
    text = TextOptions(tiny_text, seed=3, **AMOUNT)
    options = ScoringOptions(skip_leading=2)
    assert same(plain, simdiff.score(tiny_checkpoint, text, options=options, progress=False))
    few = simdiff.score(tiny_checkpoint, tokens, options=ScoringOptions(groups=2), progress=False)
    assert few.sequences is not None
    assert few.sequences.num_groups == 2
    plan = simdiff.plan(plain, 2, criterion="simdiff-masd", alpha=0.25, bootstrap=9)
    chosen = PlanOptions("simdiff-masd", 0.25, Budget(num_layers=2), bootstrap=9)
    other = simdiff.plan(plain, options=chosen)
    assert plan == other
    assert (plan.alpha, plan.confidence.num_resamples) == (0.25, 9)
    one = simdiff.evaluate(tiny_checkpoint, tiny_text, seed=3, **AMOUNT)
    two = simdiff.evaluate(tiny_checkpoint, text)
    assert asdict(one.dense.perplexity) == asdict(two.dense.perplexity)


def test_an_option_is_given_in_one_way(llama: PreTrainedModel, tokens: torch.Tensor) -> None:
    scores = simdiff.score(llama, tokens, progress=False)
    for call, names in (
        (lambda: simdiff.score(llama, tokens, options=ScoringOptions(), skip_leading=1), "skip_l"),
        (lambda: simdiff.score(llama, TextOptions("demo"), num_windows=3, seed=1), "num_w.*, seed"),
        (lambda: simdiff.plan(scores, 2, options=PlanOptions()), "num_layers"),
        (lambda: simdiff.plan(scores, alpha=0.1, options=PlanOptions()), "alpha"),
        (lambda: simdiff.evaluate(llama, TextOptions("demo"), window_length=3), "window_length"),
        (lambda: simdiff.recover(llama, "p", "o", TextOptions("demo"), seed=3), "seed"),
    ):
        with pytest.raises(SimdiffError, match=f": {names}.* must stand in the .* got both"):
            call()
    with pytest.raises(SimdiffError, match="options must be ScoringOptions, got PlanOptions"):
        simdiff.score(llama, tokens, options=PlanOptions())  # type: ignore[arg-type]
    with pytest.raises(SimdiffError, match="until_stable is an option of `simdiff score`"):
        simdiff.score(llama, tokens, options=ScoringOptions(until_stable=True))


def test_unknown_options_are_refused_by_name(
    llama: PreTrainedModel, tokens: torch.Tensor, tiny_text: Path, tmp_path: Path
) -> None:
    for call in (simdiff.score, simdiff.plan, simdiff.evaluate):
        with pytest.raises(TypeError, match="num_window'"):
            call(llama, tokens, num_window=3)  # type: ignore[operator]
    plan = simdiff.plan(simdiff.score(llama, tokens, progress=False), 2)
    plan.save(tmp_path / "plan.json")
    with pytest.raises(SimdiffError, match="has an option 'norm_powr'; did you mean norm_power"):
        simdiff.recover(
            str(tmp_path), tmp_path / "plan.json", tmp_path / "out", tiny_text, norm_powr=1
        )
