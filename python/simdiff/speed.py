"""Speeds of a run: `simdiff bench` in a short form, one setting without the machine's rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.decoding import Decoder, check_tokens, make_decoder
from simdiff.models import text_config
from simdiff.speed_bench import Rounds, draw_prompt, interleave, ratios, tokens_per_second
from simdiff.speed_model import model_size, plain_ideal
from simdiff.speed_protocol import Setting

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Speed:
    """Medians over the repetitions, in tokens per second."""

    prefill: float
    decode: float
    prompt_tokens: int
    new_tokens: int
    """The first from the prefill, each other from a step."""
    repeats: int
    num_threads: int
    device: str
    decoding: str
    """How the steps ran, and why not as a CUDA graph where that was tried."""
    times_faster: dict[str, float] | None = None
    """Median of the rounds' ratios of seconds, dense / pruned, for each phase; None for the dense
    model itself."""
    ideal: dict[str, float] | None = None
    """How many times faster each phase can be, see `simdiff.speed_model`: prefill by flops, decode
    by bytes."""
    share_of_ideal: dict[str, float] | None = None
    """times_faster / ideal."""


def measure_speed(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    *,
    prompt_length: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    warm_up: int = 1,
) -> dict[str, Speed]:
    """Measure `dense` and `pruned` by turns in one process, as `simdiff.speed_bench` does.

    On one GPU the steps are replayed as a CUDA graph with a static cache. Models whose steps cannot
    be captured, or whose graph writes other tokens than `generate`, are both measured without.

    Args:
        dense, pruned: on one device, of one dtype; see `simdiff.speed_bench.sharing_copy`.
        prompt_length, new_tokens: fewer where the model has fewer positions.
        repeats: counted rounds, each with a generation of both models.
        warm_up: rounds before them.
    """
    models = {"dense": dense, "pruned": pruned}
    setting = _fitting(dense, Setting(1, prompt_length, new_tokens))
    prompt = draw_prompt(dense, setting)
    decoders, decoding = _decoders(models, prompt, setting.new_tokens)
    rounds = interleave(
        list(models),
        lambda name: decoders[name].generate(prompt, setting.new_tokens),
        repeats=repeats,
        warm_up=warm_up,
    )
    ideal = plain_ideal(
        model_size(dense),
        model_size(pruned),
        batch_size=1,
        prompt_length=setting.prompt_length,
        steps=setting.new_tokens - 1,
    )
    found = ratios(rounds, {"ideal": ideal})
    compared = {
        "times_faster": {phase: found[phase]["ratio"]["median"] for phase in PHASES},
        "ideal": ideal,
        "share_of_ideal": {phase: found[phase]["share_of_ideal"] for phase in PHASES},
    }
    told = {"device": str(dense.get_input_embeddings().weight.device), "decoding": decoding}
    return {
        "dense": _speed("dense", setting, rounds, **told),
        "pruned": _speed("pruned", setting, rounds, **told, **compared),
    }


def _fitting(model: PreTrainedModel, wanted: Setting) -> Setting:
    """As many tokens as the model has positions for."""
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions is None:
        return wanted
    new_tokens = max(2, min(wanted.new_tokens, positions // 2))
    return Setting(1, max(1, min(wanted.prompt_length, positions - new_tokens)), new_tokens)


def _decoders(
    models: Mapping[str, PreTrainedModel], prompt: Tensor, new_tokens: int
) -> tuple[dict[str, Decoder], str]:
    """Decoders of one kind, for both models, and what is to be told of them."""
    decoders = {name: make_decoder(model) for name, model in models.items()}
    description = decoders["dense"].description
    try:
        for name, decoder in decoders.items():
            if not decoder.exact:
                tokens = decoder.generate(prompt, new_tokens).tokens
                check_tokens(models[name], prompt, tokens, exact=False)
    except Exception as error:  # of any kind: the speed must not end a run that did the rest
        eager = {name: make_decoder(model, graphs=False) for name, model in models.items()}
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return eager, f"{eager['dense'].description} ({description} failed: {reason})"
    return decoders, description


def _speed(name: str, setting: Setting, rounds: Rounds, **known: Any) -> Speed:
    speeds = tokens_per_second(rounds.generations[name], setting)
    return Speed(
        prefill=speeds["prefill"].median,
        decode=speeds["decode"].median,
        prompt_tokens=setting.prompt_length,
        new_tokens=setting.new_tokens,
        repeats=len(rounds.orders),
        num_threads=torch.get_num_threads(),
        **known,
    )
