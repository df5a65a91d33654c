"""The ideal of bytes and flops against what torch counts and what the tensors hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from simdiff.speed.decoding import Decoder, cache_tensor_bytes
from simdiff.speed.ideal import (
    Cost,
    Rates,
    cache_bytes,
    model_size,
    plain_ideal,
    prefill_cost,
    roofline_seconds,
    step_cost,
)
from simdiff.surgery.copies import sharing_copy
from support.speeds import PROMPT, ideal_by_hand
from support.tiny_models import make_tiny


def counted_flops(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> int:
    model.set_attn_implementation("eager")  # its matmuls are counted on every platform
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts(tiny: PreTrainedModel, family: str) -> None:
    size = replace(model_size(tiny), windows=(None,) * 6)
    batch, length = PROMPT.shape
    cache = DynamicCache(config=tiny.config)
    parts = prefill_cost(size, batch, length)
    # Eager attention computes all pairs and masks; the ideal counts those that a token may see.
    full = 4 * batch * 6 * 32 * length**2
    assert parts["attention"].flops == full * (length + 1) / (2 * length)
    matmuls = parts["layers"].flops + parts["rest"].flops
    rotary = 0 if family == "gpt2" else counted_flops(tiny, PROMPT, cache) - matmuls - full
    # The rotation's outer product of positions and frequencies: 2·length·(head_dim / 2) at most.
    assert 0 <= rotary <= 2 * length * 8 * batch
    if family == "gpt2":
        assert counted_flops(tiny, PROMPT, cache) == matmuls + full


def test_step_flops_are_those_that_torch_counts() -> None:
    model = make_tiny("gpt2")
    cache = DynamicCache(config=model.config)
    counted_flops(model, PROMPT, cache)
    parts = step_cost(model_size(model), 3, 10)
    assert counted_flops(model, PROMPT[:, :1], cache) == sum(p.flops for p in parts.values())


def test_bytes_are_those_of_the_parameters(tiny: PreTrainedModel, family: str) -> None:
    size = model_size(tiny)
    parameters = dict(tiny.named_parameters())
    assert size.weight_bytes == sum(p.nbytes for p in parameters.values())
    looked_up = {"llama": ("embed_tokens",), "qwen2": ("embed_tokens",), "gpt2": ("wpe",)}[family]
    read = [p for n, p in parameters.items() if not any(table in n for table in looked_up)]
    parts = step_cost(size, 1, 1)
    moved = sum(p.nbytes for p in read) + 4 * (32 + 97)
    assert parts["layers"].bytes + parts["rest"].bytes == moved
    layers = [p for n, p in parameters.items() if ".layers." in n or ".h." in n]
    assert parts["layers"].bytes == sum(p.nbytes for p in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_the_tensors(tiny: PreTrainedModel, dtype: torch.dtype) -> None:
    tiny.to(dtype)
    generation = Decoder(tiny).generate(PROMPT, 5)
    assert generation.cache_bytes == cache_bytes(model_size(tiny), 3, 9 + 4) > 0
    cache = DynamicCache(config=tiny.config)
    with torch.inference_mode():
        tiny(input_ids=PROMPT[:, :2], past_key_values=cache, use_cache=True)
    assert cache_tensor_bytes(cache) == cache_bytes(model_size(tiny), 3, 2)


def test_a_window_ends_what_a_step_reads() -> None:
    size = model_size(make_tiny("qwen2"))  # layers 3 to 5 look back 4 tokens
    assert size.windows == (None, None, None, 4, 4, 4)
    entries = 2 * 2 * 8  # keys and values, 2 heads of 8
    read = 3 * (20 + 1) + 3 * (4 + 1)
    assert step_cost(size, 1, 20)["attention"].bytes == 4 * entries * read
    pairs = 3 * (6 * 7 // 2) + 3 * (1 + 2 + 3 + 4 + 4 + 4)
    assert prefill_cost(size, 1, 6)["attention"].flops == 4 * 32 * pairs


@pytest.mark.parametrize(("prompt", "steps"), [(3, 1), (9, 4)])
def test_ideal_of_equal_layers(prompt: int, steps: int) -> None:
    model = make_tiny("llama")
    sizes = model_size(model), model_size(sharing_copy(model, range(2, 4)))
    ideal = plain_ideal(*sizes, batch_size=1, prompt_length=prompt, steps=steps)
    assert ideal == pytest.approx(ideal_by_hand(4, prompt, steps), rel=1e-12)


def test_roofline_takes_the_slower_of_the_two() -> None:
    parts = [{"layers": Cost(100, 10), "rest": Cost(10, 300)}]
    assert roofline_seconds(parts, Rates(10, 100)) == 100 / 10 + 300 / 100
