"""Measure the speeds for `simdiff run`: a short benchmark of one setting, without machine rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.models.running import evaluating
from simdiff.models.structure import text_config
from simdiff.speed.bench import Rounds, draw_prompt, interleave, ratios, tokens_per_second
from simdiff.speed.decoding import Decoder, check_tokens, make_decoder
from simdiff.speed.ideal import model_size, plain_ideal
from simdiff.speed.machine_rates import OtherLoad
from simdiff.speed.protocol import Setting

PHASES = ("prefill", "decode")
SPEED_ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """Speeds of one model: medians over repetitions, in tokens per second."""

    prefill: float
    decode: float
    prompt_tokens: int
    new_tokens: int
    """Number of new tokens; the first is from the prefill, each other from a step."""
    repeats: int
    num_threads: int
    device: str
    decoding: str
    """How the steps ran, and why a CUDA graph was not used if it was tried."""
    times_faster: dict[str, float] | None = None
    """For each phase the median over rounds of the seconds dense / pruned; None for the dense
    model itself."""
    ideal: dict[str, float] | None = None
    """Ideal speed-up of each phase, see `simdiff.speed.ideal`: prefill by flops, decode by
    bytes."""
    share_of_ideal: dict[str, float] | None = None
    """Share of the ideal speed-up that each phase reaches: times_faster / ideal."""
    other_processes_cores: float | None = None
    """How many cores other processes kept busy while both models were measured."""


def measure_speed(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    *,
    prompt_length: int = 128,
    new_tokens: int = 32,
    repeats: int = SPEED_ROUNDS,
    warm_up: int = 1,
) -> dict[str, Speed]:
    """Measure `dense` and `pruned` by turns in one process, as `simdiff.speed.bench` does.

    On one GPU the steps are replayed as a CUDA graph with a static cache. If the steps of a model
    cannot be captured, or its graph generates other tokens than `generate`, both models are
    measured without graphs.

    Args:
        dense, pruned: models on one device and of one dtype; see
            `simdiff.surgery.copies.sharing_copy`.
        prompt_length, new_tokens: numbers of tokens; reduced if the model has fewer positions.
        repeats: number of counted rounds, each with a generation of both models.
        warm_up: number of rounds before them, which are not counted.
    """
    models = {"dense": dense, "pruned": pruned}
    setting = _fitting(dense, Setting(1, prompt_length, new_tokens))
    prompt = draw_prompt(dense, setting)
    load = OtherLoad()
    with evaluating(dense, pruned):
        decoders, decoding = _decoders(models, prompt, setting.new_tokens)
        rounds = interleave(
            list(models),
            lambda name: decoders[name].generate(prompt, setting.new_tokens),
            repeats=repeats,
            warm_up=warm_up,
        )
    cores = load.cores()
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
        "other_processes_cores": cores,
    }
    told = {"device": str(dense.get_input_embeddings().weight.device), "decoding": decoding}
    return {
        "dense": _speed("dense", setting, rounds, **told),
        "pruned": _speed("pruned", setting, rounds, **told, **compared),
    }


def _fitting(model: PreTrainedModel, wanted: Setting) -> Setting:
    """Reduce the tokens of a setting to the model's number of positions."""
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions is None:
        return wanted
    new_tokens = max(2, min(wanted.new_tokens, positions // 2))
    return Setting(1, max(1, min(wanted.prompt_length, positions - new_tokens)), new_tokens)


def _decoders(
    models: Mapping[str, PreTrainedModel], prompt: Tensor, new_tokens: int
) -> tuple[dict[str, Decoder], str]:
    """Make decoders of the same kind for both models; return them and a description."""
    decoders = {name: make_decoder(model) for name, model in models.items()}
    description = decoders["dense"].description
    try:
        for name, decoder in decoders.items():
            if not decoder.exact:
                tokens = decoder.generate(prompt, new_tokens).tokens
                check_tokens(models[name], prompt, tokens, exact=False)
    except Exception as error:  # of any kind: measuring speed must not fail a run that is complete
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
