"""Rounds of two models, their speeds and ratios, and which models can be compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.speed.bench import Rounds, bench, interleave, ratios, tokens_per_second
from simdiff.speed.decoding import TimedGeneration
from simdiff.speed.protocol import PRESETS, Setting
from simdiff.surgery.copies import sharing_copy
from support.speeds import QUICK
from support.tiny_models import make_tiny


def test_models_take_turns_in_alternating_order() -> None:
    calls: list[str] = []

    def generate(name: str) -> TimedGeneration:
        calls.append(name)
        return TimedGeneration(torch.zeros(1, 2), 1.0, (float(len(calls)),), 0)

    rounds = interleave(["a", "b"], generate, repeats=3, warm_up=1)
    assert "".join(calls) == "abbaabba"
    assert rounds.orders == [["b", "a"], ["a", "b"], ["b", "a"]]
    assert [g.decode_seconds for g in rounds.generations["a"]] == [4, 5, 8]
    calls.clear()
    interleave(["a", "b"], generate, repeats=9, warm_up=0, go_on=lambda done: done < 2)
    assert "".join(calls) == "abba"


def test_speeds_and_shares_of_rounds() -> None:
    """3 sequences of 5 prompt tokens and 9 new ones, of which 8 come from steps."""

    def generation(prefill: float, decode: float) -> TimedGeneration:
        return TimedGeneration(torch.zeros(3, 9), prefill, (decode / 8,) * 8, 0)

    dense = [generation(3, 6), generation(4, 16), generation(5, 16)]
    pruned = [generation(2, 4), generation(1, 4), generation(5, 2)]
    speeds = tokens_per_second(dense, Setting(3, 5, 9))
    assert {phase: value.median for phase, value in speeds.items()} == pytest.approx(
        {"prefill": 3 * 5 / 4, "decode": 3 * 8 / 16, "whole": 3 * 9 / 20}
    )
    assert speeds["decode"].upper_quartile == pytest.approx((24 / 16 + 24 / 6) / 2)
    rounds = Rounds({"dense": dense, "pruned": pruned}, [])
    found = ratios(rounds, {"ideal": {"prefill": 2.0, "decode": 5.0}, "other": {"decode": 8.0}})
    # Rounds 1.5, 4, 1 and 1.5, 4, 8 times; of the whole 9 / 6, 20 / 5, 21 / 7.
    medians = {phase: values["ratio"]["median"] for phase, values in found.items()}
    assert medians == {"prefill": 1.5, "decode": 4, "whole": 3}
    assert (found["prefill"]["ideal"], found["prefill"]["share_of_ideal"]) == (2, 0.75)
    assert (found["decode"]["share_of_ideal"], found["decode"]["share_of_other"]) == (0.8, 0.5)
    assert "share_of_ideal" not in found["whole"]


def test_shortened_and_says_so(llama: PreTrainedModel) -> None:
    llama.config.max_position_embeddings = 10**9
    protocol = replace(PRESETS["paper"], new_tokens=20000, max_seconds=2.0)
    protocol = replace(protocol, batch_sizes=(1,))
    content = bench(llama, sharing_copy(llama, (2, 3)), protocol, preset="paper")
    (setting,) = content["settings"]
    assert 8 <= setting["new_tokens"] < setting["wanted_new_tokens"] == 20000
    assert setting["shortened"]
    from simdiff.report.terminal.speed import speed_notes

    assert any(f"{setting['new_tokens']} instead of 20000" in n for n in speed_notes(content))
    with pytest.raises(SimdiffError, match="max seconds must leave time for 8 new tokens"):
        bench(llama, sharing_copy(llama, (2,)), replace(protocol, max_seconds=1e-3))


def test_models_that_cannot_be_compared(llama: PreTrainedModel) -> None:
    twin = sharing_copy(llama, (1,))
    with pytest.raises(SimdiffError, match="same architecture, got LlamaFor.* and GPT2LMHead"):
        bench(llama, make_tiny("gpt2"), QUICK)
    with pytest.raises(SimdiffError, match=r"at most the 5 layers .* got 6: give the dense"):
        bench(twin, llama, QUICK)
    with pytest.raises(SimdiffError, match=r"one dtype, got float32 .* bfloat16"):
        bench(llama, make_tiny("llama").bfloat16(), QUICK)
    other = make_tiny("llama")
    other.resize_token_embeddings(101)
    with pytest.raises(SimdiffError, match=r"one vocabulary size, got 97 .* 101"):
        bench(llama, other, QUICK)
