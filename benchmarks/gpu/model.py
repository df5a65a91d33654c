"""A model of LLaMA-3.1-8B's shape with random weights: what scoring adds to a forward, and what
removing layers brings in generation."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.steps import LeftOutError, Result, Settings, Step

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
SMALL = LLAMA | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
LAYER_BYTES = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
# Embedding and head; hidden states of a batch, and what a layer computes from them.
OTHER_BYTES = 2 * 2 * 128256 * 4096 + (12 << 30)
INFERENCE_SECONDS = 60
RESULTS = {"pass", "inference"}


def steps(settings: Settings) -> list[Step]:
    """One, which builds the model once."""
    seconds = 0 if settings.quick else 60
    return [Step("model", "LLaMA-3.1-8B's shape", seconds, partial(_measure, settings))]


def _measure(settings: Settings, left: Callable[[], float]) -> Iterator[Result]:
    for package in ("transformers", "rich"):
        if importlib.util.find_spec(package) is None:
            raise LeftOutError(f"the package {package} is not installed")
    shape = SMALL if settings.quick else LLAMA | {"num_hidden_layers": layers_that_fit()}
    model = build(shape, settings.device)
    try:
        yield {"part": "pass", "shape": shape, **measure_pass(model, settings)}
        if left() < INFERENCE_SECONDS and not settings.quick:
            raise LeftOutError(f"pruned inference takes about {INFERENCE_SECONDS} s")
        yield {"part": "inference", "shape": shape, **measure_inference(model, settings, left())}
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()


def layers_that_fit() -> int:
    """All 32 of them, or as many as the free memory holds beside a batch."""
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - OTHER_BYTES
    if free < 2 * LAYER_BYTES:
        raise LeftOutError(
            f"two layers and a batch must fit into memory, {free / 1e9:.1f} GB are left"
        )
    return min(LLAMA["num_hidden_layers"], int(free / LAYER_BYTES))


def build(shape: dict[str, Any], device: str) -> Any:
    """In bfloat16, its weights drawn on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def wrong_scores(model: Any, ids: Tensor) -> str | None:
    """Where the means of layers and blocks are not those of the reference, or None."""
    from simdiff.scoring.calibration_pass import score

    ours, wanted = (score(model, [ids], backend=b, progress=False) for b in (None, "reference"))
    assert ours.blocks is not None
    assert wanted.blocks is not None
    tables = {name: (ours.metrics[name].mean, wanted.metrics[name].mean) for name in ours.metrics}
    for name in ("cosine_distance", "squared_difference", "angular_distance"):
        tables[f"blocks, {name}"] = ours.blocks.metrics[name], wanted.blocks.metrics[name]
    for name, (found, exact) in tables.items():
        got, right = (torch.tensor(values, dtype=torch.float64) for values in (found, exact))
        error = ((got - right).abs() / right.abs().clamp_min(1e-12)).max().item()
        if not error <= 2e-5:  # short sums, magnified at most 16 times by the cosine distance
            return f"{name}: relative error {error:.1e}"
    return None


# Of one pass: `simdiff score` checks its text and its model once, before the first.
BATCHES = 4


def measure_pass(model: Any, settings: Settings) -> Result:
    """The calibration pass of `simdiff score` beside as many bare forwards, taking turns."""
    from simdiff.scoring.calibration_pass import CalibrationPass

    quick, device = settings.quick, settings.device
    sequences, length, rounds = (2, 16, 2) if quick else (8, 2048, 5)
    generator = torch.Generator().manual_seed(0)
    shape = BATCHES, sequences, length
    ids = list(torch.randint(model.config.vocab_size, shape, generator=generator))
    result: Result = {"tokens": (sequences, length), "batches": BATCHES, "rounds": rounds}
    wrong = wrong_scores(model, ids[0][:2, :256])
    if wrong is not None:
        return result | {"wrong": wrong}
    passes = {
        f"blocks {'on' if blocks else 'off'}": CalibrationPass(
            model, num_sequences=BATCHES * sequences * (rounds + 2), blocks=blocks
        )
        for blocks in (False, True)
    }

    @torch.no_grad()
    def bare() -> None:
        for batch in ids:
            model.base_model(input_ids=batch.to(device), use_cache=False)

    runs: dict[str, Callable[[], object]] = {"bare": bare}
    runs |= {name: partial(whole.feed, ids) for name, whole in passes.items()}
    for run in runs.values():
        _seconds(run, device)
    result["peak_bytes"] = {name: _peak_bytes(run, device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_seconds(run, device))
    result["seconds"] = {
        name: statistics.median(values) / BATCHES for name, values in times.items()
    }
    result["share"] = {
        name: statistics.median(b / a - 1 for a, b in zip(times["bare"], times[name], strict=True))
        for name in passes
    }
    result["finish_seconds"] = {
        name: _seconds(whole.scores, device) for name, whole in passes.items()
    }
    return result


def _seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """The most that was allocated at once, weights included; not known on a CPU."""
    if device != "cuda":
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure_inference(model: Any, settings: Settings, left: float) -> Result:
    """12 of 32 layers out, as in the paper: batch 16, prompt 4; 256 new tokens instead of 2048."""
    from simdiff.speed.bench import bench
    from simdiff.speed.protocol import Protocol
    from simdiff.surgery.copies import sharing_copy

    protocol = Protocol((16,), (4,), 256, repeats=3, warm_up=1, max_seconds=max(left - 10, 1))
    if settings.quick:
        protocol = Protocol((2,), (4,), 8, repeats=1, warm_up=0)
    num_layers = model.config.num_hidden_layers
    count = round(12 * num_layers / 32)
    first = (num_layers - count) // 2  # which layers does not matter for speed
    removed = range(first, first + count)
    with torch.no_grad():
        content = bench(model, sharing_copy(model, removed), protocol, removed=removed)
    setting = content["settings"][0]
    kept = {key: setting[key] for key in ("batch_size", "prompt_length", "new_tokens", "phases")}
    speeds = {name: setting[name]["tokens_per_second"] for name in ("dense", "pruned")}
    medians = {
        name: {phase: speed["median"] for phase, speed in of_model.items()}
        for name, of_model in speeds.items()
    }
    decoding = content["decoding"]
    return {"removed": len(removed), "decoding": decoding, **kept, "tokens_per_second": medians}
