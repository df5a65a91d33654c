"""The speed that `simdiff run` tells is what `simdiff bench` measures."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel

from simdiff.speed import run_speed as speed_of_run
from simdiff.speed.bench import draw_prompt
from simdiff.speed.decoding import Decoder, StaticDecoder, TimedGeneration
from simdiff.speed.protocol import Protocol, Setting
from simdiff.speed.run_speed import measure_speed
from simdiff.surgery.copies import sharing_copy
from support.speeds import QUICK, ideal_by_hand


def test_speed_of_a_run_is_what_bench_measures(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([9, 9, 1, 3, 6, 2, 3, 4, 8, 2, 1, 9])  # pruned is first in every second round
    prompts: list[torch.Tensor] = []

    def generate(self: Decoder, prompt: torch.Tensor, new_tokens: int) -> TimedGeneration:
        prompts.append(prompt)
        value = float(next(seconds))
        return TimedGeneration(torch.zeros(1, new_tokens), 2 * value, (value / 4,) * 4, 0)

    monkeypatch.setattr(Decoder, "generate", generate)
    twin = sharing_copy(llama, (2, 3))
    speeds = measure_speed(llama, twin, prompt_length=9, new_tokens=5, repeats=5)
    assert list(seconds) == []  # a round to warm up and five that count
    dense, pruned = speeds["dense"], speeds["pruned"]
    assert dense.ideal is dense.share_of_ideal is dense.times_faster is None
    # dense 3, 6, 4, 8, 9 seconds and pruned 1, 2, 3, 2, 1: the median of ratios, not of speeds.
    assert pruned.times_faster == {"prefill": 3, "decode": 3}
    assert (dense.prefill, pruned.prefill) == (9 / 12, 9 / 4)
    assert (dense.decode, pruned.decode) == (4 / 6, 4 / 2)
    ideal = ideal_by_hand(4, 9, 4)
    assert pruned.ideal == pytest.approx(ideal, rel=1e-12)
    assert pruned.share_of_ideal == pytest.approx({phase: 3 / ideal[phase] for phase in ideal})
    protocol = Protocol((1,), (9,), new_tokens=5)
    assert torch.equal(prompts[-1], draw_prompt(llama, protocol.settings()[0], protocol.seed))
    assert (dense.decoding, dense.device) == ("eager, dynamic cache", "cpu")
    assert pruned.other_processes_cores is not None


def test_speed_of_a_run_keeps_to_the_positions_there_are(llama: PreTrainedModel) -> None:
    llama.config.max_position_embeddings = 20
    speed = measure_speed(llama, llama, repeats=1, warm_up=0)["pruned"]
    assert (speed.prompt_tokens, speed.new_tokens) == (10, 10)
    assert min(speed.prefill, speed.decode) > 0


def test_a_model_may_have_no_limit_of_positions() -> None:
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    wanted = Setting(1, 10**6, 10**6)
    assert speed_of_run._fitting(model, wanted) == wanted
    replace(QUICK, new_tokens=10**9).check(model.config)


class Failing(StaticDecoder):
    """What a GPU would be given, and cannot capture."""

    def generate(self, prompt: torch.Tensor, new_tokens: int) -> TimedGeneration:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


class Wrong(StaticDecoder):
    """A graph that writes other tokens."""

    def generate(self, prompt: torch.Tensor, new_tokens: int) -> TimedGeneration:
        found = super().generate(prompt, new_tokens)
        return replace(found, tokens=(found.tokens + 1) % 97)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (StaticDecoder, r"eager, static cache"),
        (
            Failing,
            r"eager, dynamic cache \(eager, static cache failed: operation not permitted "
            r"when stream is capturing\)",
        ),
        (Wrong, r"eager, dynamic cache \(eager, static cache failed: not timed: .*\)"),
    ],
)
def test_speed_of_a_run_falls_back(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, kind: type[Decoder], told: str
) -> None:
    """The decoder that the device suggests is used where it works, and never ends the run."""

    def make(model: PreTrainedModel, graphs: bool = True) -> Decoder:
        return kind(model) if graphs else Decoder(model)

    monkeypatch.setattr(speed_of_run, "make_decoder", make)
    speeds = measure_speed(llama, sharing_copy(llama, (2, 3)), prompt_length=9, new_tokens=4)
    for speed in speeds.values():
        assert re.fullmatch(told, speed.decoding)
        assert min(speed.prefill, speed.decode) > 0
