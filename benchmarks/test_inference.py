"""Prefill and decoding of the demo model with layers removed, beside the ideal.

The share of layers removed is that of the paper's Table 4 (4, 6, 8, 10 and 12 of 32). The ideal is
that of `simdiff.speed.ideal`: by bytes in decoding, by flops in prefill.
"""

from __future__ import annotations

from typing import Any

import pytest
import timing
import torch

from simdiff.data.text import token_windows
from simdiff.models.loading import load_model
from simdiff.models.structure import find_decoder_layers
from simdiff.speed.bench import bench
from simdiff.speed.protocol import Protocol
from simdiff.surgery.copies import sharing_copy

PHASES = ("prefill", "decode")
OF_32 = (4, 6, 8, 10, 12)


@pytest.mark.parametrize("of_32", OF_32)
def test_pruned_inference(benchmark: Any, of_32: int, device: str, quick: bool) -> None:
    model, tokenizer = load_model("demo", dtype="float32")
    model.to(device)
    num_layers = len(find_decoder_layers(model))
    num_removed = round(of_32 * num_layers / 32)
    # Which layers does not matter for speed: a run in the middle.
    first = (num_layers - num_removed) // 2
    removed = range(first, first + num_removed)
    length, new_tokens, repeats = (16, 2, 1) if quick else (256, 24, 6)
    pruned = sharing_copy(model, removed)
    prompt = token_windows("demo", tokenizer, num_windows=1, window_length=length).batches(1)[0]
    kept, logits = len(find_decoder_layers(pruned)), pruned(input_ids=prompt.to(device)).logits
    if kept != num_layers - num_removed or not bool(logits.isfinite().all()):
        pytest.fail(
            f"not timed: {kept} layers left of {num_layers}, logits finite: "
            f"{bool(logits.isfinite().all())}"
        )
    protocol = Protocol((1,), (length,), new_tokens, repeats=repeats, warm_up=1)
    found = bench(model, pruned, protocol, removed=removed)
    (setting,) = found["settings"]
    phases = {name: setting["phases"][name] for name in PHASES}
    benchmark.group = f"inference, {num_removed} of {num_layers} layers removed"
    benchmark.extra_info.update(
        removed=num_removed,
        num_layers=num_layers,
        of_32=of_32,
        prompt=length,
        new_tokens=new_tokens,
        decoding=found["decoding"],
        speedup={name: phase["ratio"]["median"] for name, phase in phases.items()},
        interval={
            "speedup": {
                name: {key: phase["ratio"][key] for key in ("low", "high", "coverage")}
                for name, phase in phases.items()
            }
        },
        ideal={name: phase["ideal"] for name, phase in phases.items()},
        share_of_ideal={name: phase["share_of_ideal"] for name, phase in phases.items()},
        tokens_per_second={
            name: {key: setting[name]["tokens_per_second"][key]["median"] for key in PHASES}
            for name in ("dense", "pruned")
        },
    )

    @torch.inference_mode()
    def prefill() -> None:
        pruned(input_ids=prompt.to(device), use_cache=True, logits_to_keep=1)

    benchmark.pedantic(timing.finished(prefill, device), rounds=repeats)
