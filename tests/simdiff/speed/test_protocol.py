"""Protocols: what fits into a time and into memory, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.speed.bench import bench
from simdiff.speed.ideal import model_size
from simdiff.speed.protocol import Protocol, Setting, check_memory, memory_needed, tokens_within
from simdiff.surgery.copies import sharing_copy
from support.speeds import QUICK


def test_tokens_that_fit() -> None:
    wanted = Setting(1, 4, 101)

    def fit(seconds: float) -> int:
        return tokens_within(wanted, seconds, 2, first_steps=1.0, last_steps=3.0, prefills=5.0)

    assert fit(2 * (5 + 100 + 100)) == 101  # 100 steps of 2 s on average
    assert fit(2 * (5 + 50 + 25)) == 51
    assert fit(2 * (5 + 50 + 25) - 0.1) == 50
    assert fit(1) == 1


def test_memory_is_refused_before_it_is_used(llama: PreTrainedModel) -> None:
    size = model_size(llama)
    setting = Setting(16, 4, 2048)
    needed = memory_needed(size, setting)
    # Float32 keys and values, 32 of a token, of 16 sequences of 2052 tokens in 6 layers, those of
    # one of them again; 12 states of 32 for each token of the prompt, and a row of 97 logits.
    assert needed == 4 * 16 * (32 * 2052 * (6 + 1) + 12 * 4 * 32 + 97)
    check_memory({"dense": size}, setting, needed)
    check_memory({"dense": size}, setting, None)
    with pytest.raises(SimdiffError, match="batch 16, prompt 4, 2048 new tokens: must fit"):
        check_memory({"dense": size}, setting, needed - 1)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (replace(QUICK, repeats=0), "repeats must be at least 1, got 0"),
        (replace(QUICK, warm_up=-1), "warm-up must be at least 0, got -1"),
        (replace(QUICK, new_tokens=1), "new tokens must be at least 2, got 1"),
        (replace(QUICK, batch_sizes=(1, 0)), "batch sizes must be at least 1, got 1,0"),
        (replace(QUICK, batch_sizes=()), "batch sizes must be at least 1, got none"),
        (replace(QUICK, prompt_lengths=(5, 0)), "prompt lengths must be at least 1, got 5,0"),
        (replace(QUICK, max_seconds=math.inf), "max seconds must be above 0, got inf"),
        (replace(QUICK, prompt_lengths=(5, 2045, 7)), r"got 2045 \+ 4 = 2049"),
        (replace(QUICK, max_seconds=0.0), "max seconds must be above 0, got 0"),
        (replace(QUICK, new_tokens=2044), r"2048 positions .* got 5 \+ 2044 = 2049"),
    ],
)
def test_bad_protocols(llama: PreTrainedModel, protocol: Protocol, message: str) -> None:
    with pytest.raises(SimdiffError, match=message):
        bench(llama, sharing_copy(llama, (2,)), protocol)


def test_protocols_at_the_limit(llama: PreTrainedModel) -> None:
    replace(QUICK, new_tokens=2043, repeats=1, warm_up=0, max_seconds=1e-9).check(llama.config)
    replace(QUICK, prompt_lengths=(2046,), new_tokens=2).check(llama.config)
