"""Greedy generation with the KV cache, timed step by step: eager, compiled, or as a CUDA graph."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from simdiff.errors import SimdiffError


@dataclass(frozen=True)
class TimedGeneration:
    """Greedily generated tokens and their times; end-of-sequence tokens do not stop generation."""

    tokens: Tensor
    """Token ids `(batch, new_tokens)`; the first is from the prefill, each other from a step."""
    prefill_seconds: float
    step_seconds: tuple[float, ...]
    """Seconds of each step; one fewer than tokens."""
    cache_bytes: int
    """Bytes of the keys and values at the end; all allocated bytes of a static cache."""

    @property
    def decode_seconds(self) -> float:
        """Seconds of all steps together."""
        return sum(self.step_seconds)


@dataclass(frozen=True)
class Probe:
    """Seconds of a prefill, of a step right after it, and of a step at the longest context."""

    prefill: float
    first_step: float
    last_step: float


class Decoder:
    """Decodes with the stock dynamic cache; each step is one forward and one argmax.

    There is no mask, logits are of the last position only, and positions come from the cache.

    Args:
        model: causal language model.
    """

    description = "eager, dynamic cache"
    exact = True
    """Whether the decoder runs the same kernels as `generate`."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Start without a cache."""
        self._model = model
        self._device = model.get_input_embeddings().weight.device
        self._cache: Any = None

    @torch.inference_mode()
    def generate(self, prompt: Tensor, new_tokens: int) -> TimedGeneration:
        """Continue a prompt.

        Args:
            prompt: token ids `(batch, length)`.
            new_tokens: at least 2, since with one there is no step to time.

        Raises:
            SimdiffError: `new_tokens` is less than 2.
        """
        if new_tokens < 2:
            raise SimdiffError(f"new tokens must be at least 2, got {new_tokens}")
        ids = prompt.to(self._device)
        self._start(prompt.shape[0], prompt.shape[1] + new_tokens - 1)
        clock = _Clock(self._device)
        clock.mark()
        token = self._forward(ids)
        tokens = [token]
        clock.mark()
        for _ in range(new_tokens - 1):
            token = self._step(token)
            tokens.append(token)
            clock.mark()
        prefill, *steps = clock.seconds()
        result = TimedGeneration(
            torch.cat(tokens, 1).cpu(), prefill, tuple(steps), self._cache_bytes()
        )
        self._finish()
        return result

    @torch.inference_mode()
    def probe(self, prompt: Tensor, context: int, steps: int = 3) -> Probe:
        """Time a prefill and steps; the longest context is filled with zeros, not computed.

        Args:
            prompt: token ids `(batch, length)`.
            context: number of tokens of the longest context.
            steps: number of steps timed at each context; the median counts.
        """
        self.generate(prompt[:, :1], 2)
        short = self.generate(prompt, 1 + steps)
        self._start(prompt.shape[0], context + steps)
        token = self._forward(prompt[:, :1].to(self._device))
        for index, layer in enumerate(self._cache.layers):
            keys, values = (
                torch.zeros_like(held[:, :, :1]).expand(-1, -1, context - 1, -1)
                for held in (layer.keys, layer.values)
            )
            if context > 1:
                self._cache.update(keys, values, index)
        clock = _Clock(self._device)
        clock.mark()
        for _ in range(steps):
            token = self._step(token)
            clock.mark()
        last = statistics.median(clock.seconds())
        self._finish()
        return Probe(short.prefill_seconds, statistics.median(short.step_seconds), last)

    def _start(self, batch_size: int, length: int) -> None:
        """Make an empty cache for `length` tokens; this is not timed."""
        self._cache = DynamicCache(config=self._model.config)

    def _finish(self) -> None:
        self._cache = None

    def _forward(self, ids: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        # float32 like generate: an argmax of 16-bit logits takes four times as long.
        return output.logits[:, -1].float().argmax(-1, keepdim=True).to(self._device)

    def _step(self, token: Tensor) -> Tensor:
        return self._forward(token)

    def _cache_bytes(self) -> int:
        return cache_tensor_bytes(self._cache)


class StaticDecoder(Decoder):
    """Decodes with the stock static cache, which is emptied between generations.

    Args:
        model: causal language model.
        compiled: run the steps through torch.compile; the prefill is eager, as in `generate`.
    """

    exact = False

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        """Start without a cache."""
        super().__init__(model)
        self._shape: tuple[int, int] | None = None
        self.description = "torch.compile, static cache" if compiled else "eager, static cache"
        self._run = torch.compile(self._forward, dynamic=False) if compiled else self._forward

    def _start(self, batch_size: int, length: int) -> None:
        if self._shape == (batch_size, length):
            self._cache.reset()
            return
        self._cache = StaticCache(config=self._model.config, max_cache_len=length)
        self._shape = batch_size, length

    def _finish(self) -> None:
        pass

    def _step(self, token: Tensor) -> Tensor:
        return self._run(token)


class GraphDecoder(StaticDecoder):
    """Decodes with the static cache by replaying a CUDA graph for every step; the prefill is eager.

    The graph contains a step from the token in `_input` to the token in `_output`. The cache counts
    its tokens on the device, so that each replay continues where the last one ended.
    """

    _WARM_UP = 3

    def __init__(self, model: PreTrainedModel) -> None:
        """Start without a graph."""
        super().__init__(model)
        self.description = "CUDA graph, static cache"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input = self._output = torch.empty(0)

    def _start(self, batch_size: int, length: int) -> None:
        if self._shape == (batch_size, length):
            self._cache.reset()
            return
        self._graph = None  # its kernels write to the old cache
        super()._start(batch_size, length)
        self._capture(batch_size)
        self._cache.reset()

    def _capture(self, batch_size: int) -> None:
        self._input = torch.zeros((batch_size, 1), dtype=torch.long, device=self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # steps beforehand: lazy initialisation cannot be captured
            for _ in range(self._WARM_UP):
                self._forward(self._input)
                self._cache.reset()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._forward(self._input)

    def _step(self, token: Tensor) -> Tensor:
        assert self._graph is not None
        self._input.copy_(token)
        self._graph.replay()
        return self._output.clone()


def make_decoder(model: PreTrainedModel, *, compiled: bool = False, graphs: bool = True) -> Decoder:
    """The decoder for a model's device: compiled, a CUDA graph on one GPU, or eager.

    Args:
        model: causal language model.
        compiled: use torch.compile with the static cache.
        graphs: use a CUDA graph if the whole model is on one GPU.
    """
    devices = {p.device for p in model.parameters()}
    if compiled:
        return StaticDecoder(model, compiled=True)
    if graphs and len(devices) == 1 and next(iter(devices)).type == "cuda":
        return GraphDecoder(model)
    return Decoder(model)


def cache_tensor_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a cache of transformers."""
    tensors = (
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
    )
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def check_tokens(model: PreTrainedModel, prompt: Tensor, tokens: Tensor, *, exact: bool) -> bool:
    """Check tokens against `model.generate`; return whether they are equal.

    Args:
        model: causal language model.
        prompt: token ids `(batch, length)`.
        tokens: greedy continuation of `prompt`, `(batch, new_tokens)`.
        exact: require equality. Otherwise other kernels may decide near-ties differently, and every
            token must have the highest logit of a forward without cache up to 1e-3 (float32) or
            0.25 (16 bits).

    Raises:
        SimdiffError: the tokens are not those of the model.
    """
    device = model.get_input_embeddings().weight.device
    ids = prompt.to(device)
    with torch.inference_mode(), endless(model):
        wanted = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens.shape[1],
            use_cache=True,
            pad_token_id=0,
        )[:, ids.shape[1] :].cpu()
        if torch.equal(wanted, tokens):
            return True
        if exact or not nearly_best(model, ids, tokens):
            row, column = (wanted != tokens).nonzero()[0].tolist()
            raise SimdiffError(
                f"not timed: the decoding loop must write the tokens of generate, got "
                f"{int(tokens[row, column])} instead of {int(wanted[row, column])} as token "
                f"{column} of sequence {row}"
            )
    return False


def nearly_best(model: PreTrainedModel, prompt: Tensor, tokens: Tensor) -> bool:
    """Whether every token has the highest logit in a forward without cache, up to rounding."""
    chosen = tokens.to(prompt.device)
    output = model(input_ids=torch.cat([prompt, chosen], 1), use_cache=False)
    logits = output.logits[:, prompt.shape[1] - 1 : -1].float()
    got = logits.gather(2, chosen[:, :, None].to(logits.device)).squeeze(2)
    slack = 1e-3 if model.dtype == torch.float32 else 0.25
    return bool((logits.amax(2) - got <= slack).all())


@contextlib.contextmanager
def endless(model: PreTrainedModel) -> Iterator[None]:
    """Make `generate` ignore end-of-sequence tokens and the checkpoint's sampling settings."""
    old = model.generation_config
    assert old is not None
    endless = type(old)()
    endless.cache_implementation = copy.copy(old.cache_implementation)
    model.generation_config = endless
    try:
        yield
    finally:
        model.generation_config = old


class _Clock:
    """Measures the times between marks by the host's clock, or by events on the GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        if not self._marks:
            torch.cuda.synchronize(self._device)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def seconds(self) -> list[float]:
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._device.type != "cuda":
            return [end - start for start, end in pairs]
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1000 for start, end in pairs]
