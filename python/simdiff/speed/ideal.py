"""The ideal: bytes and flops of a prefill and of a decoding step, and the speed-up they allow.

For B sequences, S prompt tokens, c tokens in the cache (including the new one), e bytes per entry:

- A step reads the weights once, e·(all parameters − lookup tables), where a lookup table is an
  embedding that is not tied to the head. It also reads B rows of the input embedding and, for every
  layer, the keys and values of its c tokens (at most `sliding_window`, if the layer has one). It
  writes the keys and values of the new token and the logits. Other activations of one token stay in
  the caches and count as free.
- The flops of a step are B·(2·P_layers + 2·P_head + Σ_layers 4·heads·head_dim·c), where P counts
  the entries of matrices that are multiplied with tokens.
- The flops of a prefill are B·(S·2·P_layers + 2·P_head + Σ_layers 4·heads·head_dim·pairs), with the
  head on the last token only and pairs = S(S+1)/2 (causal), fewer with a sliding window. It reads
  the weights once.

All experts of a mixture count, in bytes and flops; routing is not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from simdiff.models.structure import find_decoder_layers, text_config


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model that determine its cost, counted from its parameters and config."""

    num_layers: int
    bytes_per_entry: int
    weight_bytes: int
    """Bytes of all parameters, each counted once."""
    step_parameters: int
    """Parameters that every step reads: all but the lookup tables."""
    layer_parameters: int
    """Parameters of all layers together."""
    layer_matmul_parameters: int
    """Entries of the matrices in the layers, which take 2 flops each for every token."""
    head_matmul_parameters: int
    hidden_size: int
    vocab_size: int
    cache_entries: tuple[int, ...]
    """Entries of the keys and values of one token in every layer: 2·key/value heads·head_dim."""
    attention_width: int
    """heads·head_dim, with 4 flops each for every pair of a query and a key (scores and sum)."""
    windows: tuple[int | None, ...]
    """Number of tokens that each layer attends to, including the current one; None for all."""


@dataclass(frozen=True)
class Cost:
    """The bytes that one part of a forward must move, and its flops."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Rates:
    """Rates of the machine: bytes per second of a pure read, flops per second of a matmul."""

    bytes_per_second: float
    flops_per_second: float


def model_size(model: PreTrainedModel) -> ModelSize:
    """Count a model's parameters by their use in a forward."""
    layers = find_decoder_layers(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    everything = {id(p): p for p in model.parameters()}
    in_layers = {id(p): p for p in layers.modules.parameters()}
    tied = head is not None and head.weight is embedding.weight
    # Learned positions and per-layer embeddings are lookup tables too.
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
    """The sliding window of each layer, read from the config as transformers' cache does."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def cache_bytes(size: ModelSize, batch_size: int, tokens: int) -> int:
    """Bytes of the KV cache after `tokens` tokens; a layer with a window w keeps w − 1 of them."""
    held = (tokens if window is None else min(tokens, window - 1) for window in size.windows)
    entries = sum(n * count for n, count in zip(size.cache_entries, held, strict=True))
    return batch_size * entries * size.bytes_per_entry


def step_cost(size: ModelSize, batch_size: int, context: int) -> dict[str, Cost]:
    """The cost of a decoding step, in three parts: layers, attention over the cache, and the rest.

    Args:
        size: sizes of the model.
        batch_size: number of sequences.
        context: number of tokens attended to, including the new one.
    """
    width, batch = size.bytes_per_entry, batch_size
    seen = [context if window is None else min(context, window) for window in size.windows]
    # Keys and values of the new token are written, and read as part of the context.
    entries = sum(n * (count + 1) for n, count in zip(size.cache_entries, seen, strict=True))
    rest = size.step_parameters - size.layer_parameters
    return {
        "layers": Cost(width * size.layer_parameters, 2.0 * batch * size.layer_matmul_parameters),
        "attention": Cost(width * batch * entries, 4.0 * batch * size.attention_width * sum(seen)),
        "rest": Cost(
            width * (rest + batch * (size.hidden_size + size.vocab_size)),
            2.0 * batch * size.head_matmul_parameters,
        ),
    }


def prefill_cost(size: ModelSize, batch_size: int, length: int) -> dict[str, Cost]:
    """The cost of a prefill of `length` tokens with logits of the last one, in parts as
    `step_cost`."""
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
    """Number of pairs of a query and a key that it attends to."""
    reach = length if window is None else min(length, window)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def plain_ideal(
    dense: ModelSize, pruned: ModelSize, *, batch_size: int, prompt_length: int, steps: int
) -> dict[str, float]:
    """Ratios dense / pruned of the bytes moved in decoding and of the flops of prefill.

    Args:
        dense, pruned: sizes of the models.
        batch_size, prompt_length: shape of the prompt.
        steps: number of steps after the prompt; step i attends to prompt_length + i tokens, i from
            1.
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
    """Ratios dense / pruned of the least times of both phases, by `roofline_seconds`.

    Args:
        dense, pruned, batch_size, prompt_length, steps: see `plain_ideal`.
        rates: measured rates for `prefill` and `decode`.
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
    """The least time of several forwards, whose parts run one after the other.

    It is the sum over parts of max(bytes / bytes per second, flops / flops per second).
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
    """Total bytes or flops of several forwards."""
    return sum(float(getattr(cost, kind)) for part in parts for cost in part.values())
