"""`simdiff bench`: time a dense and a pruned model by turns in one process, with their ideals."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.io.json_files import header
from simdiff.io.machine import available_memory, describe_machine
from simdiff.io.progress import step, track
from simdiff.models.identity import told_by
from simdiff.models.running import evaluating
from simdiff.models.structure import text_config
from simdiff.speed.decoding import Decoder, TimedGeneration, check_tokens, make_decoder
from simdiff.speed.drafting import Drafting, measure_drafting
from simdiff.speed.ideal import (
    ModelSize,
    Rates,
    cache_bytes,
    model_size,
    plain_ideal,
    roofline_ideal,
    total_cost,
)
from simdiff.speed.machine_rates import OtherLoad, measure_rates
from simdiff.speed.paired_ratio import Spread, paired_ratio, spread
from simdiff.speed.protocol import Protocol, Setting, check_memory, tokens_within

FORMULAS = {
    "decode ideal, bytes": "sum over steps of (weights without lookup tables + keys and values of "
    "the context + those of the new token + embedding rows + logits), dense / pruned",
    "prefill ideal, flops": "2 per matrix entry of the layers and token, 2 per entry of the head "
    "and sequence, 4 x heads x head_dim per visible pair of tokens, dense / pruned",
    "roofline ideal": "sum over layers, attention and rest of max(bytes / measured read rate, "
    "flops / measured matmul rate), dense / pruned",
    "ratio": "median over rounds of dense seconds / pruned seconds of the same round",
    "share of ideal": "ratio / ideal",
}

# Least number of new tokens that measures decoding; a time limit that allows fewer is refused.
_LEAST_TOKENS = 8
_CHECKED_TOKENS = 16
# Share of the remaining time that is planned; the rest is reserve for errors of the probe.
_PLANNED_SHARE = 0.85


def check_comparable(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Refuse two models of which the second cannot be the first without some layers.

    Raises:
        SimdiffError: architecture, vocabulary, hidden size or dtype differ, or `pruned` has more
            layers.
    """
    sizes = [model_size(model) for model in (dense, pruned)]
    for what, of in (
        ("the same architecture", lambda i: type((dense, pruned)[i]).__name__),
        ("one vocabulary size", lambda i: sizes[i].vocab_size),
        ("one hidden size", lambda i: sizes[i].hidden_size),
        ("one dtype", lambda i: str((dense, pruned)[i].dtype).removeprefix("torch.")),
    ):
        if of(0) != of(1):
            raise SimdiffError(
                f"the two models must have {what}, got {of(0)} (dense) and {of(1)} (pruned)"
            )
    if sizes[1].num_layers > sizes[0].num_layers:
        raise SimdiffError(
            f"the pruned model must have at most the {sizes[0].num_layers} layers of the dense "
            f"one, got {sizes[1].num_layers}: give the dense model first"
        )


def bench(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    protocol: Protocol | None = None,
    *,
    names: tuple[str, str] = ("dense", "pruned"),
    removed: Collection[int] | None = None,
    preset: str | None = None,
    drafting: Drafting | None = None,
) -> dict[str, Any]:
    """Measure all settings; return the content of bench.json.

    Args:
        dense, pruned: models on one device and of one dtype; `sharing_copy` makes the second from
            a plan.
        protocol: the settings to measure; None takes the defaults.
        names: names of the models, for the record.
        removed: layers that `pruned` lacks, if they are known.
        preset: name of the protocol, for the record.
        drafting: measures `pruned` as the draft of `dense` besides, in rounds of the protocol's
            warm-up and tokens, one for each prompt.

    Raises:
        SimdiffError: see `check_comparable`, `Protocol.check`, `check_memory`, `check_tokens`; or
            the time limit is too short for a few tokens.
    """
    protocol = protocol or Protocol()
    check_comparable(dense, pruned)
    for model in (dense, pruned):
        protocol.check(model.config)
    run = _BenchRun({"dense": dense, "pruned": pruned}, protocol)
    for setting in protocol.settings():
        check_memory(run.sizes, setting, available_memory(run.device))
    load = OtherLoad()
    with evaluating(dense, pruned):
        settings = [run.measure(index) for index in range(len(protocol.settings()))]
        drafted = {}
        if drafting is not None:
            count = min(setting["new_tokens"] for setting in settings)
            found = measure_drafting(dense, pruned, drafting, count, protocol.warm_up)
            drafted = {"draft": found}
    return {
        **header("simdiff.bench"),
        "machine": describe_machine(),
        "device": str(run.device),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "other_processes_cores": load.cores(),
        "decoding": run.decoders["dense"].description,
        "attention": getattr(dense.config, "_attn_implementation", None),
        "preset": preset,
        "protocol": asdict(protocol),
        "removed": None if removed is None else sorted(removed),
        "shared_weights": _shared(dense, pruned),
        "formulas": FORMULAS,
        "models": {
            key: {"name": name, **_described(model), **told_by(model)}
            for key, name, model in zip(("dense", "pruned"), names, (dense, pruned), strict=True)
        },
        "settings": settings,
        **drafted,
    }


def _described(model: PreTrainedModel) -> dict[str, Any]:
    size = model_size(model)
    return {
        "num_layers": size.num_layers,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": size.weight_bytes,
        "weight_bytes_per_step": size.bytes_per_entry * size.step_parameters,
        "cache_bytes_per_token": cache_bytes(size, 1, 1),
    }


def _shared(dense: PreTrainedModel, pruned: PreTrainedModel) -> bool:
    """Whether the two models share parameters."""
    held = {p.data_ptr() for p in dense.parameters()}
    return all(p.data_ptr() in held for p in pruned.parameters())


@dataclass
class Rounds:
    """The measurements of all rounds of one setting."""

    generations: dict[str, list[TimedGeneration]]
    orders: list[list[str]]


def interleave(
    names: Collection[str],
    generate: Callable[[str], TimedGeneration],
    *,
    repeats: int,
    warm_up: int,
    go_on: Callable[[int], bool] = lambda done: True,
) -> Rounds:
    """Run the models by turns, in alternating order.

    Args:
        names: names of the models.
        generate: runs one generation of the named model.
        repeats: number of counted rounds.
        warm_up: number of rounds before them, which are not counted.
        go_on: called after each counted round with their number; False ends the rounds.
    """
    rounds = Rounds({name: [] for name in names}, [])
    for turn in track(range(warm_up + repeats), "speed"):
        order = list(names) if turn % 2 == 0 else list(names)[::-1]
        results = {name: generate(name) for name in order}
        if turn < warm_up:
            continue
        rounds.orders.append(order)
        for name, result in results.items():
            rounds.generations[name].append(result)
        if not go_on(len(rounds.orders)):
            break
    return rounds


def draw_prompt(model: PreTrainedModel, setting: Setting, seed: int = 0) -> Tensor:
    """Draw token ids `(batch_size, prompt_length)` from the whole vocabulary."""
    shape = setting.batch_size, setting.prompt_length
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model_size(model).vocab_size, shape, generator=generator)


class _BenchRun:
    """A benchmark: the models with their decoders, and the remaining time."""

    def __init__(self, models: Mapping[str, PreTrainedModel], protocol: Protocol) -> None:
        self.models = dict(models)
        self.protocol = protocol
        self.sizes = {name: model_size(model) for name, model in models.items()}
        self.decoders: dict[str, Decoder] = {
            name: make_decoder(model, compiled=protocol.compiled, graphs=protocol.graphs)
            for name, model in models.items()
        }
        self.device: torch.device = models["dense"].get_input_embeddings().weight.device
        self._start = time.monotonic()

    def measure(self, index: int) -> dict[str, Any]:
        """Check, shorten, measure and describe one setting."""
        wanted = self.protocol.settings()[index]
        prompt = draw_prompt(self.models["dense"], wanted, self.protocol.seed)
        end = self._end(index)
        with step(f"check the tokens, {wanted}"):
            equal = self._check(prompt, wanted.new_tokens)
        setting = wanted if end is None else self._shortened(wanted, prompt, end)
        slowest = 0.0
        last = time.monotonic()

        def go_on(done: int) -> bool:
            nonlocal slowest, last
            now = time.monotonic()
            slowest, last = max(slowest, now - last), now
            return end is None or done < 3 or now + slowest <= end

        rounds = interleave(
            list(self.models),
            lambda name: self.decoders[name].generate(prompt, setting.new_tokens),
            repeats=self.protocol.repeats,
            warm_up=self.protocol.warm_up,
            go_on=go_on,
        )
        rates = self._rates(setting)
        return {
            "batch_size": setting.batch_size,
            "prompt_length": setting.prompt_length,
            "new_tokens": setting.new_tokens,
            "wanted_new_tokens": wanted.new_tokens,
            "shortened": setting.new_tokens < wanted.new_tokens,
            "repeats": len(rounds.orders),
            "orders": rounds.orders,
            "tokens_equal_generate": equal,
            "rates": {phase: asdict(rate) for phase, rate in rates.items()},
            **{
                name: self._results(name, setting, rounds.generations[name]) for name in self.models
            },
            "phases": ratios(rounds, self._ideals(setting, rates)),
        }

    def _end(self, index: int) -> float | None:
        """The time at which a setting must end; the remaining time is divided evenly."""
        limit = self.protocol.max_seconds
        if limit is None:
            return None
        now = time.monotonic()
        left = self._start + limit - now
        return now + left / (len(self.protocol.settings()) - index)

    def _check(self, prompt: Tensor, new_tokens: int) -> dict[str, bool]:
        """Whether each model's decoder generates the tokens of `generate`."""
        count = min(new_tokens, _CHECKED_TOKENS)
        return {
            name: check_tokens(
                model,
                prompt,
                self.decoders[name].generate(prompt, count).tokens,
                exact=self.decoders[name].exact,
            )
            for name, model in self.models.items()
        }

    def _shortened(self, wanted: Setting, prompt: Tensor, end: float) -> Setting:
        """Reduce the tokens to what fits into the time, by a probe of short and long contexts."""
        with step("probe how long it takes"):
            context = wanted.prompt_length + wanted.new_tokens - 1
            probes = [decoder.probe(prompt, context) for decoder in self.decoders.values()]
        count = tokens_within(
            wanted,
            _PLANNED_SHARE * (end - time.monotonic()),
            self.protocol.warm_up + self.protocol.repeats,
            first_steps=sum(probe.first_step for probe in probes),
            last_steps=sum(probe.last_step for probe in probes),
            prefills=sum(probe.prefill for probe in probes),
        )
        if count < min(_LEAST_TOKENS, wanted.new_tokens):
            raise SimdiffError(
                f"max seconds must leave time for {_LEAST_TOKENS} new tokens at {wanted}, got "
                f"{self.protocol.max_seconds:g}, enough for {count}: give more, or fewer repeats"
            )
        return replace(wanted, new_tokens=count)

    def _rates(self, setting: Setting) -> dict[str, Rates]:
        """Measure the rates of the machine at the shapes of a setting."""
        config = text_config(self.models["dense"])
        hidden = self.sizes["dense"].hidden_size
        width = getattr(config, "intermediate_size", None) or 4 * hidden
        dtype = self.models["dense"].dtype
        rows = {
            "prefill": setting.batch_size * setting.prompt_length,
            "decode": setting.batch_size,
        }
        with step("measure the machine's rates"):
            return {
                phase: measure_rates(self.device, dtype, count, hidden, width)
                for phase, count in rows.items()
            }

    def _ideals(self, setting: Setting, rates: Mapping[str, Rates]) -> dict[str, dict[str, float]]:
        """The ideal speed-ups of the pruned model, by kind of ideal and phase."""
        dense, pruned = self.sizes["dense"], self.sizes["pruned"]
        shape = {
            "batch_size": setting.batch_size,
            "prompt_length": setting.prompt_length,
            "steps": setting.new_tokens - 1,
        }
        return {
            "ideal": plain_ideal(dense, pruned, **shape),
            "roofline_ideal": roofline_ideal(dense, pruned, rates=rates, **shape),
        }

    def _results(
        self, name: str, setting: Setting, generations: list[TimedGeneration]
    ) -> dict[str, Any]:
        size: ModelSize = self.sizes[name]
        batch, steps = setting.batch_size, setting.new_tokens - 1
        seconds = {key: [phases[key] for phases in map(_seconds, generations)] for key in _PHASES}
        costs = total_cost(size, batch, setting.prompt_length, steps)
        by_step = zip(*(g.step_seconds for g in generations), strict=True)
        return {
            "seconds": seconds,
            "tokens_per_second": {
                key: asdict(value) for key, value in tokens_per_second(generations, setting).items()
            },
            "median_step_seconds": [statistics.median(values) for values in by_step],
            "cost": costs,
            "cache_bytes": generations[-1].cache_bytes,
            "cache_bytes_by_formula": cache_bytes(size, batch, setting.prompt_length + steps),
        }


_PHASES = ("prefill", "decode", "whole")


def _seconds(generation: TimedGeneration) -> dict[str, float]:
    prefill, decode = generation.prefill_seconds, generation.decode_seconds
    return {"prefill": prefill, "decode": decode, "whole": prefill + decode}


def tokens_per_second(
    generations: Collection[TimedGeneration], setting: Setting
) -> dict[str, Spread]:
    """Tokens per second of each phase: the tokens that it produces over its seconds."""
    tokens = {
        "prefill": setting.prompt_length,
        "decode": setting.new_tokens - 1,
        "whole": setting.new_tokens,
    }
    return {
        phase: spread([setting.batch_size * count / _seconds(g)[phase] for g in generations])
        for phase, count in tokens.items()
    }


def ratios(rounds: Rounds, ideals: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """For each phase the measured ratio, the ideal ratios and the shares of them reached."""
    result: dict[str, Any] = {}
    for phase in _PHASES:
        dense, pruned = (
            [_seconds(g)[phase] for g in rounds.generations[name]] for name in ("dense", "pruned")
        )
        ratio = paired_ratio(dense, pruned)
        result[phase] = {"ratio": asdict(ratio)}
        for kind, values in ideals.items():
            if phase in values:
                result[phase] |= {
                    kind: values[phase],
                    f"share_of_{kind}": ratio.median / values[phase],
                }
    return result
