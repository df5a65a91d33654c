"""Training: what it learns, that it can be interrupted anywhere, and that it never ends worse."""

from __future__ import annotations

import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.recovery.training import loop as fine_tuning
from simdiff.recovery.training.data import Examples, cut_windows
from simdiff.recovery.training.loop import fine_tune
from simdiff.recovery.training.step import Student
from simdiff.surgery.copies import sharing_copy
from support.own_text import drawn
from support.training import SMALL, equal, trained, weights


@pytest.mark.parametrize("teaches", [True, False])
def test_it_learns_and_leaves_a_stock_model(
    dense: PreTrainedModel, text: tuple[Examples, Examples], teaches: bool
) -> None:
    before, plain = weights(dense), sharing_copy(dense, (2, 3))
    options = SMALL if teaches else replace(SMALL, distillation=None)
    model, result = trained(dense, text, replace(options, steps=40))
    losses = [point["set_apart_loss"] for point in result.curve]
    with torch.no_grad():
        ids = text[1].tokens
        best = float(dense(input_ids=ids, labels=ids).loss)
    share = 0.4 if teaches else 0.1  # 1472 tokens of text alone say little
    assert min(losses) < losses[0] - share * (losses[0] - best), (losses, best)
    assert result.best_step == result.curve[losses.index(min(losses))]["step"]
    assert equal(weights(dense), before), "the dense model stays as it is"
    assert list(weights(model)) == list(weights(plain))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model) is type(plain)
    assert set(vars(model)) == set(vars(plain)), "nothing of peft stays behind"
    with torch.no_grad():  # the loss of the merged model is that of the best evaluation
        loss = model(input_ids=ids, labels=ids).loss
    assert float(loss) == pytest.approx(min(losses), rel=1e-5)
    changed = [name for name in before if not equal_name(name, plain, model)]
    assert changed
    assert all("proj" in name for name in changed)


def equal_name(name: str, one: PreTrainedModel, other: PreTrainedModel) -> bool:
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return name not in mine or torch.equal(mine[name], theirs[name])


def test_seeds(dense: PreTrainedModel, text: tuple[Examples, Examples]) -> None:
    torch.manual_seed(5)
    drawn_after = torch.rand(3)
    torch.manual_seed(5)
    first = weights(trained(dense, text)[0])
    assert torch.equal(torch.rand(3), drawn_after), "the caller's generator stays as it was"
    torch.manual_seed(6)
    assert equal(first, weights(trained(dense, text)[0]))
    assert not equal(first, weights(trained(dense, text, replace(SMALL, seed=1))[0]))


@pytest.mark.parametrize(("call", "last"), [(2, None), (9, 2), (20, None), (33, 2)])
def test_interrupted_anywhere_it_gives_the_same_weights(
    dense: PreTrainedModel,
    text: tuple[Examples, Examples],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    last: int | None,
) -> None:
    """Stopped within the n-th forward; states are written every few steps only."""
    options = replace(SMALL, steps=10, checkpoint_minutes=0, last_layers=last)
    if last is not None:
        options = replace(options, few_logits=24, learning_rate=3e-3)
    wanted, whole = trained(dense, text, options)
    left = call
    loss = Student._loss
    saves = fine_tuning._TrainingRun._save
    saved = 0

    def stopping(self: Student, *arguments: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    def seldom(self: object) -> None:
        nonlocal saved
        saved += 1
        if saved % 3 == 1:
            saves(self)

    monkeypatch.setattr(Student, "_loss", stopping)
    monkeypatch.setattr(fine_tuning._TrainingRun, "_save", seldom)
    with pytest.raises(KeyboardInterrupt):
        trained(dense, text, options, tmp_path / "state")
    monkeypatch.undo()
    torch.set_num_threads(1)
    model, result = trained(dense, text, options, tmp_path / "state")
    assert equal(weights(model), weights(wanted))
    keys = ("step", "tokens", "learning_rate", "train_loss", "set_apart_loss")
    assert [[p[k] for k in keys] for p in result.curve] == [
        [p[k] for k in keys] for p in whole.curve
    ]


def test_an_interruption_in_the_last_step_is_not_swallowed(
    dense: PreTrainedModel,
    text: tuple[Examples, Examples],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = replace(SMALL, steps=3)
    step = Student.step

    def interrupted(self: Student, number: int, rate: float) -> object:
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, number, rate)

    monkeypatch.setattr(Student, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(dense, text, options, tmp_path / "state")
    monkeypatch.setattr(Student, "step", lambda *_: pytest.fail("nothing is left to train"))
    _, result = trained(dense, text, options, tmp_path / "state")
    assert (result.steps, result.curve[-1]["step"]) == (3, 3)


@pytest.mark.parametrize("where", ["loss", "gradient", "evaluation"])
def test_nan_stops_and_keeps_the_last_good_state(
    dense: PreTrainedModel,
    text: tuple[Examples, Examples],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    options = replace(SMALL, steps=12, evaluations=12)
    short, _ = trained(dense, text, replace(options, schedule="constant", steps=5, evaluations=5))
    options = replace(options, schedule="constant")
    if where == "evaluation":
        evaluate = Student.evaluate

        def broken(self: Student, examples: Examples) -> float:
            value = evaluate(self, examples)
            steps = self.optimizer.state.get(self._parameters[0], {}).get("step", 0)
            return math.nan if steps > 5 else value

        monkeypatch.setattr(Student, "evaluate", broken)
    else:
        gradients = Student.gradients

        def poisoned(self: Student, step: int) -> tuple[float, int]:
            loss, tokens = gradients(self, step)
            if step == 5 and where == "gradient":
                self._parameters[0].grad[0] = math.inf
            return math.nan if step == 5 and where == "loss" else loss, tokens

        monkeypatch.setattr(Student, "gradients", poisoned)
    model, result = trained(dense, text, options)
    assert result.stopped == fine_tuning.NOT_FINITE
    assert result.steps == (6 if where == "evaluation" else 5)
    assert result.best_step == 5
    assert "NaN or Inf" in result.notes[0]
    assert "those of step 5, the best before" in result.notes[0]
    assert equal(weights(model), weights(short))


def test_an_exploding_rate_gives_what_there_was(
    dense: PreTrainedModel, text: tuple[Examples, Examples]
) -> None:
    """No step was better: the weights are those from before, and it says so."""
    plain = weights(sharing_copy(dense, (2, 3)))
    model, result = trained(dense, text, replace(SMALL, learning_rate=1e4, warmup_steps=0))
    assert result.best_step == 0
    assert "no step of training lowered the loss" in result.notes[-1]
    assert equal(weights(model), plain)


def test_it_stops_early(dense: PreTrainedModel, text: tuple[Examples, Examples]) -> None:
    few = text[0].take(slice(0, 4)), text[1]  # learnt by heart: what is set apart gets worse
    options = replace(
        SMALL, distillation=None, steps=200, evaluations=100, patience=3, learning_rate=3e-2
    )
    _, result = trained(dense, few, options)
    losses = [point["set_apart_loss"] for point in result.curve]
    assert result.stopped == fine_tuning.EARLY
    assert result.steps < 200
    assert len(losses) - 1 - losses.index(min(losses)) == 3
    assert result.best_step == result.curve[-4]["step"]


def test_a_budget_of_time_settles_the_steps(
    dense: PreTrainedModel, text: tuple[Examples, Examples], tmp_path: Path
) -> None:
    options = replace(SMALL, steps=10**6, max_minutes=0.1, evaluations=2)
    _, result = trained(dense, text, options, tmp_path / "state")
    assert 2 < result.num_steps < 10**5
    assert result.seconds < 60 * 0.1 + 3
    assert result.curve[-1]["step"] == result.steps
    if result.stopped == fine_tuning.FINISHED:
        assert result.curve[-1]["learning_rate"] < 0.2 * SMALL.learning_rate
    with pytest.raises(SimdiffError, match="max_minutes must allow a step, which takes about"):
        trained(dense, text, replace(options, max_minutes=1e-6))


def test_measuring_the_time_of_a_step_leaves_no_trace(
    dense: PreTrainedModel, text: tuple[Examples, Examples]
) -> None:
    """As many steps as asked for fit: then the budget changes nothing."""
    plain, _ = trained(dense, text)
    model, result = trained(dense, text, replace(SMALL, max_minutes=10.0))
    assert result.num_steps == SMALL.steps
    assert equal(weights(model), weights(plain))


def test_a_head_that_is_not_linear(dense: PreTrainedModel) -> None:
    """Capped logits: the loss is still that of the model."""
    from transformers import Gemma2Config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Gemma2Config(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            head_dim=8,
            final_logit_softcapping=2.0,
        )
    ).eval()
    train, apart = cut_windows(drawn(model, 40, 24), 24, {}).set_apart(8)
    pruned = sharing_copy(model, (2,))
    result = fine_tune(pruned, train, apart, SMALL, teacher=model, progress=False)
    with torch.no_grad():
        loss = pruned(input_ids=apart.tokens, labels=apart.tokens).loss
    best = min(point["set_apart_loss"] for point in result.curve)
    assert float(loss) == pytest.approx(best, rel=1e-5)


def test_a_mixture_of_experts_trains_what_is_linear() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            num_local_experts=4,
        )
    ).eval()
    train, apart = cut_windows(drawn(model, 40, 16), 16, {}).set_apart(8)
    pruned = sharing_copy(model, (1,))
    result = fine_tune(pruned, train, apart, replace(SMALL, steps=4), teacher=model, progress=False)
    assert any("q_proj" in name for name in result.targets)
    with torch.no_grad():
        loss = pruned(input_ids=apart.tokens, labels=apart.tokens).loss
    best = min(point["set_apart_loss"] for point in result.curve)
    assert float(loss) == pytest.approx(best, rel=1e-4)


def test_distillation_needs_the_dense_model(
    dense: PreTrainedModel, text: tuple[Examples, Examples]
) -> None:
    with pytest.raises(SimdiffError, match="needs the dense model as teacher"):
        fine_tune(sharing_copy(dense, (2, 3)), *text, SMALL, progress=False)
