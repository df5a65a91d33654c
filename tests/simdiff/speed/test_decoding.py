"""Timed decoding writes the tokens of generate, eager, compiled and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._inductor import metrics as inductor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.speed.bench import bench
from simdiff.speed.decoding import Decoder, StaticDecoder, check_tokens, make_decoder
from simdiff.speed.run_speed import measure_speed
from simdiff.surgery.copies import sharing_copy
from support.speeds import PROMPT, QUICK


@pytest.mark.parametrize("make", [Decoder, StaticDecoder])
def test_tokens_are_those_of_generate(
    tiny: PreTrainedModel, make: Callable[[PreTrainedModel], Decoder]
) -> None:
    decoder = make(tiny)
    tiny.generation_config.eos_token_id = int(decoder.generate(PROMPT, 3).tokens[0, 1])
    for _ in range(2):  # a static cache is used again
        generation = decoder.generate(PROMPT, 7)
        assert generation.tokens.shape == (3, 7)
        assert len(generation.step_seconds) == 6
        assert check_tokens(tiny, PROMPT, generation.tokens, exact=True)
    wrong = generation.tokens.clone()
    wrong[1, 4] = (wrong[1, 4] + 1) % 97
    for exact in (True, False):
        with pytest.raises(SimdiffError, match="as token 4 of sequence 1"):
            check_tokens(tiny, PROMPT, wrong, exact=exact)


def test_probe_reaches_the_longest_context(llama: PreTrainedModel) -> None:
    for decoder in (Decoder(llama), StaticDecoder(llama)):
        lengths: list[int] = []
        step = decoder._step

        def seen(token: torch.Tensor, decoder=decoder, step=step, lengths=lengths) -> torch.Tensor:
            lengths.append(int(decoder._cache.get_seq_length()))
            return step(token)

        decoder._step = seen
        probe = decoder.probe(PROMPT, 40)
        assert lengths == [1, 9, 10, 11, 40, 41, 42]
        assert min(probe.prefill, probe.first_step, probe.last_step) > 0


def test_twin_shares_every_weight(llama: PreTrainedModel) -> None:
    twin = sharing_copy(llama, (1, 2))
    kept = [llama.model.layers[i] for i in (0, 3, 4, 5)]
    for own, other in zip(twin.model.layers, kept, strict=True):
        assert all(a is b for a, b in zip(own.parameters(), other.parameters(), strict=True))
    assert len(llama.model.layers) == llama.config.num_hidden_layers == 6
    Decoder(llama).generate(PROMPT, 3)
    Decoder(twin).generate(PROMPT, 3)


def test_compiled_steps_write_the_same_tokens(llama: PreTrainedModel) -> None:
    decoder = make_decoder(llama, compiled=True)
    inductor.reset()
    for _ in range(2):  # they may round otherwise: what is no token of the model is refused
        check_tokens(llama, PROMPT, decoder.generate(PROMPT, 5).tokens, exact=False)
    assert inductor.generated_kernel_count > 0


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu(llama: PreTrainedModel, graphs: bool) -> None:
    llama.to("cuda")
    decoder = make_decoder(llama, graphs=graphs)
    assert decoder.description.startswith("CUDA graph") == graphs
    for _ in range(2):  # the second replays a graph on an emptied cache
        generation = decoder.generate(PROMPT, 7)
        check_tokens(llama, PROMPT, generation.tokens, exact=False)  # refuses other tokens
        assert min(generation.prefill_seconds, *generation.step_seconds) > 0
    content = bench(llama, sharing_copy(llama, (2, 3)), replace(QUICK, graphs=graphs))
    assert content["device"].startswith("cuda")
    speed = measure_speed(llama, sharing_copy(llama, (2, 3)), new_tokens=4)["pruned"]
    assert speed.decoding == "CUDA graph, static cache"
    assert speed.device.startswith("cuda")
