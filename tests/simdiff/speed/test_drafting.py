"""A pruned model as the draft of its parent, against speculative decoding written out."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils.logging import warning_once

from simdiff.errors import SimdiffError
from simdiff.speed import drafting
from simdiff.speed.drafting import Drafting, measure_drafting
from simdiff.surgery.copies import sharing_copy
from support.speeds import PROMPT
from support.tiny_models import make_tiny

NEW = 12


def best(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """After every token the one that the model would choose, without a cache."""
    with torch.inference_mode():
        return model(tokens[None]).logits[0].argmax(-1)


def by_hand(
    parent: PreTrainedModel, draft: PreTrainedModel, prompt: torch.Tensor, length: int
) -> tuple[torch.Tensor, int, int]:
    """The new tokens, the steps of the parent, and how many tokens were proposed."""
    tokens, steps, proposed = prompt, 0, 0
    while (left := NEW - (len(tokens) - len(prompt))) > 0:
        candidates = tokens
        for _ in range(min(length, left - 1)):
            candidates = torch.cat([candidates, best(draft, candidates)[-1:]])
        chosen = best(parent, candidates)[len(tokens) - 1 :]
        offered = candidates[len(tokens) :]
        agreed = int((offered == chosen[:-1]).cumprod(0).sum())
        tokens = torch.cat([tokens, chosen[: agreed + 1]])
        steps, proposed = steps + 1, proposed + len(offered)
    return tokens[len(prompt) :], steps, proposed


@pytest.mark.parametrize("removed", [(), (2,), (0, 1, 2, 3)])
def test_counts_are_those_of_the_algorithm(
    llama: PreTrainedModel, removed: tuple[int, ...]
) -> None:
    """With no layer removed everything is accepted; the tokens are the parent's in every case."""
    draft = sharing_copy(llama, removed) if removed else make_tiny("llama")
    saved = draft.generation_config
    found = measure_drafting(llama, draft, Drafting(PROMPT, 3), NEW, warm_up=1)
    assert draft.generation_config is saved
    wanted = [by_hand(llama, draft, prompt, 3) for prompt in PROMPT]
    steps, proposed = (sum(one[index] for one in wanted) for index in (1, 2))
    assert (found["steps"], found["proposed"]) == (steps, proposed)
    assert found["accepted"] == 3 * NEW - steps
    assert found["acceptance_rate"] == found["accepted"] / proposed
    if not removed:
        assert (found["steps"], found["acceptance_rate"]) == (9, 1.0)
    else:
        assert found["acceptance_rate"] < 1
    assert found["equal_prompts"] == found["prompts"] == 3
    assert found["orders"] == [["alone", "drafted"], ["drafted", "alone"], ["alone", "drafted"]]
    alone, drafted = (found["seconds"][way] for way in drafting.WAYS)
    ratios = sorted(a / b for a, b in zip(alone, drafted, strict=True))
    assert found["ratio"]["median"] == ratios[1]
    assert found["tokens_per_second"]["alone"]["median"] == NEW / sorted(alone)[1]


def test_nothing_is_logged_of_the_calls_inside_transformers(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers")
    warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        measure_drafting(llama, sharing_copy(llama, (2,)), Drafting(PROMPT[:1], 3), NEW, warm_up=0)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_other_tokens_are_no_result(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = drafting._generate

    def other(model: object, draft: object, prompt: torch.Tensor, count: int) -> drafting.Drafted:
        made = usual(model, draft, prompt, count)
        wrong = torch.arange(count) == (4 if draft is not None else count)
        return replace(made, tokens=torch.where(wrong, (made.tokens + 1) % 97, made.tokens))

    monkeypatch.setattr(drafting, "_generate", other)
    with pytest.raises(SimdiffError, match="must write the tokens that it writes alone, got"):
        measure_drafting(llama, sharing_copy(llama, (2,)), Drafting(PROMPT), NEW, 0)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(SimdiffError, match="draft tokens must be at least 1, got 0"):
        Drafting(PROMPT, 0)
    with pytest.raises(SimdiffError, match="must be token ids"):
        Drafting(PROMPT[0])


def test_a_model_that_cannot_be_drafted_is_told(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = llama.generate

    def generate(**keywords: object) -> object:
        if "assistant_model" in keywords:
            raise TypeError("no cache\nto crop")
        return usual(**keywords)

    monkeypatch.setattr(llama, "generate", generate)
    with pytest.raises(SimdiffError, match="decode LlamaForCausalLM with a draft: .*no cache to"):
        measure_drafting(llama, sharing_copy(llama, (2,)), Drafting(PROMPT), NEW, 0)
