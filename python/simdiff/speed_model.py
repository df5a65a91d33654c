"""The ideal: bytes and flops of prefill and of a decoding step, and the speed-up they allow.

With B sequences, S prompt tokens, c tokens in the cache (the new one included), e bytes per entry:

- a step reads the weights once, e·(all parameters − lookup tables), where a lookup table is an
  embedding that is not the head too; it reads B rows of the input embedding, and of every layer the
  keys and values of its c tokens (of at most `sliding_window` where the layer has one); it writes
  those of the new token and the logits. Other activations of one token stay in the caches and cost
  nothing.
- its flops are B·(2·P_layers + 2·P_head + Σ_layers 4·heads·head_dim·c), P counting the entries of
  matrices that tokens are multiplied with.
- prefill takes B·(S·2·P_layers + 2·P_head + Σ_layers 4·heads·head_dim·pairs), the head on the last
  token only, pairs = S(S+1)/2 (causal), fewer where a window ends. It reads the weights once.

All experts of a mixture are counted, in bytes and flops: what a router leaves out is not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from simdiff.models import find_decoder_layers, text_config


@dataclass(frozen=True)
class ModelSize:
    """What one model costs, counted from its parameters and config."""

    num_layers: int
    bytes_per_entry: int
    weight_bytes: int
    """Of all parameters, each counted once."""
    step_parameters: int
    """Read in every step: all but the lookup tables."""
    layer_parameters: int
    """Of all layers together."""
    layer_matmul_parameters: int
    """Entries of matrices in the layers: 2 flops each for every token."""
    head_matmul_parameters: int
    hidden_size: int
    vocab_size: int
    cache_entries: tuple[int, ...]
    """Of the keys and values of one token, for every layer: 2·key/value heads·head_dim."""
    attention_width: int
    """heads·head_dim: 4 flops each for every pair of a query and a key (scores and their sum)."""
    windows: tuple[int | None, ...]
    """Tokens that each layer looks back to, itself included; None is all."""


@dataclass(frozen=True)
class Cost:
    """Bytes that must be moved and flops, of one part of a forward."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Rates:
    """What the machine can do: bytes per second of a pure read, flops per second of a matmul."""

    bytes_per_second: float
    flops_per_second: float


def model_size(model: PreTrainedModel) -> ModelSize:
    """Count a model's parameters by what a forward does with them."""
    layers = find_decoder_layers(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    everything = {id(p): p for p in model.parameters()}
    in_layers = {id(p): p for p in layers.modules.parameters()}
    tied = head is not None and head.weight is embedding.weight
    # Learned positions and per-layer embeddings are looked up too.
    tables = {
        id(p): p
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
        if not (tied and p is embedding.weight)
    }
    text = text_config(model)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return ModelSize(
        num_layers=len(layers),
        bytes_per_entry=model.dtype.itemsize,
        weight_bytes=sum(p.nbytes for p in everything.values()),
        step_parameters=sum(p.numel() for key, p in everything.items() if key not in tables),
        layer_parameters=sum(p.numel() for p in in_layers.values()),
        layer_matmul_parameters=sum(
            p.numel() for key, p in in_layers.items() if p.dim() > 1 and key not in tables
        ),
        head_matmul_parameters=0 if head is None else head.weight.numel(),
        hidden_size=text.hidden_size,
        vocab_size=embedding.weight.shape[0],
        cache_entries=(2 * kv_heads * head_dim,) * len(layers),
        attention_width=heads * head_dim,
        windows=_windows(text, len(layers)),
    )


def _windows(text: object, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, as the cache of transformers reads it from the config."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def cache_bytes(size: ModelSize, batch_size: int, tokens: int) -> int:
    """Bytes of the KV cache after so many tokens: a layer with a window w keeps w − 1 of them."""
    held = (tokens if window is None else min(tokens, window - 1) for window in size.windows)
    entries = sum(n * count for n, count in zip(size.cache_entries, held, strict=True))
    return batch_size * entries * size.bytes_per_entry


def step_cost(size: ModelSize, batch_size: int, context: int) -> dict[str, Cost]:
    """Of one decoding step: the layers' weights, the attention over the cache, and the rest.

    Args:
        size: of the model.
        batch_size: sequences.
        context: tokens attended to, the new one included.
    """
    width, batch = size.bytes_per_entry, batch_size
    seen = [context if window is None else min(context, window) for window in size.windows]
    # Keys and values of the new token are written and, as a part of the context, read.
    entries = sum(n * (count + 1) for n, count in zip(size.cache_entries, seen, strict=True))
    rest = size.step_parameters - size.layer_parameters
    return {
        "layers": Cost(
            width * size.layer_parameters, 2.0 * batch * size.layer_matmul_parameters
        ),
        "attention": Cost(width * batch * entries, 4.0 * batch * size.attention_width * sum(seen)),
        "rest": Cost(
            width * (rest + batch * (size.hidden_size + size.vocab_size)),
            2.0 * batch * size.head_matmul_parameters,
        ),
    }  # fmt: skip


def prefill_cost(size: ModelSize, batch_size: int, length: int) -> dict[str, Cost]:
    """Of a prompt of `length` tokens, with logits of its last token only; parts as `step_cost`."""
    width, batch = size.bytes_per_entry, batch_size
    pairs = sum(_pairs(length, window) for window in size.windows)
    rest = size.step_parameters - size.layer_parameters
    return {
        "layers": Cost(
            width * size.layer_parameters, 2.0 * batch * length * size.layer_matmul_parameters
        ),
        "attention": Cost(
            width * batch * length * sum(size.cache_entries),
            4.0 * batch * size.attention_width * pairs,
        ),
        "rest": Cost(
            width * (rest + batch * (length * size.hidden_size + size.vocab_size)),
            2.0 * batch * size.head_matmul_parameters,
        ),
    }


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it may see."""
    reach = length if window is None else min(length, window)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def plain_ideal(
    dense: ModelSize, pruned: ModelSize, *, batch_size: int, prompt_length: int, steps: int
) -> dict[str, float]:
    """How many times less the pruned model moves in decoding, and computes in prefill.

    Args:
        dense, pruned: sizes of the models.
        batch_size, prompt_length: of the prompt.
        steps: decoded after the prompt; step i attends to prompt_length + i tokens, i from 1.
    """
    before, after = (_phases(size, batch_size, prompt_length, steps) for size in (dense, pruned))
    return {
        phase: _total(before[phase], kind) / _total(after[phase], kind)
        for phase, kind in (("prefill", "flops"), ("decode", "bytes"))
    }


def roofline_ideal(
    dense: ModelSize,
    pruned: ModelSize,
    *,
    batch_size: int,
    prompt_length: int,
    steps: int,
    rates: Mapping[str, Rates],
) -> dict[str, float]:
    """Ratio of the least times of both phases, by `roofline_seconds`.

    Args:
        dense, pruned, batch_size, prompt_length, steps: see `plain_ideal`.
        rates: measured ones for `prefill` and `decode`.
    """
    before, after = (_phases(size, batch_size, prompt_length, steps) for size in (dense, pruned))
    return {
        phase: roofline_seconds(before[phase], rates[phase])
        / roofline_seconds(after[phase], rates[phase])
        for phase in before
    }


def total_cost(size: ModelSize, batch_size: int, prompt_length: int, steps: int) -> dict[str, Any]:
    """Bytes and flops of prefill and of all steps after it, for the record."""
    phases = _phases(size, batch_size, prompt_length, steps)
    return {
        phase: {kind: _total(parts, kind) for kind in ("bytes", "flops")}
        for phase, parts in phases.items()
    }


def roofline_seconds(parts: Sequence[dict[str, Cost]], rates: Rates) -> float:
    """Least time of several forwards, whose parts run one after the other.

    The sum over parts of max(bytes / bytes per second, flops / flops per second).
    """
    return sum(
        max(cost.bytes / rates.bytes_per_second, cost.flops / rates.flops_per_second)
        for part in parts
        for cost in part.values()
    )


def _phases(
    size: ModelSize, batch_size: int, prompt_length: int, steps: int
) -> dict[str, list[dict[str, Cost]]]:
    return {
        "prefill": [prefill_cost(size, batch_size, prompt_length)],
        "decode": [step_cost(size, batch_size, prompt_length + i) for i in range(1, steps + 1)],
    }


def _total(parts: Sequence[dict[str, Cost]], kind: str) -> float:
    """Bytes or flops of several forwards."""
    return sum(float(getattr(cost, kind)) for part in parts for cost in part.values())
