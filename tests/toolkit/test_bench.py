"""Speed against the ideal: the formulas against what is counted, the loop against generate."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from plans import plan_for
from torch._inductor import metrics as inductor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache, PreTrainedModel

from simdiff import cli
from simdiff import speed as speed_of_run
from simdiff.cli import bench as bench_command
from simdiff.decoding import (
    Decoder,
    Generation,
    StaticDecoder,
    cache_tensor_bytes,
    check_tokens,
    make_decoder,
)
from simdiff.errors import SimdiffError
from simdiff.models import model_identity
from simdiff.speed import measure_speed
from simdiff.speed_bench import (
    Rounds,
    bench,
    draw_prompt,
    interleave,
    ratios,
    sharing_copy,
    tokens_per_second,
)
from simdiff.speed_model import (
    Cost,
    Rates,
    cache_bytes,
    model_size,
    plain_ideal,
    prefill_cost,
    roofline_seconds,
    step_cost,
)
from simdiff.speed_protocol import (
    PRESETS,
    Protocol,
    Setting,
    check_memory,
    memory_needed,
    tokens_within,
)
from simdiff.speed_statistics import paired_ratio, spread

PROMPT = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(2))
QUICK = Protocol((1, 2), (5,), new_tokens=4, repeats=3, warm_up=1)


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


def ideal_by_hand(kept: int, prompt: int, steps: int) -> dict[str, float]:
    """Of the tiny LLaMA with 6 layers and with `kept`, batch 1, counted on paper.

    A layer has 2 32 x 32 + 2 32 x 16 + 3 32 x 48 = 7680 entries of matrices and 64 of norms; keys
    and values of a token are 2 2 8 = 32. A step reads the layer, the cache with the new token, and
    writes the latter; beside the layers it reads the head (97 x 32), the last norm and a row of the
    embedding, and writes 97 logits.
    """
    context = [prompt + step for step in range(1, steps + 1)]
    pairs = prompt * (prompt + 1) // 2

    def entries(layers: int) -> int:
        cached = sum(32 * (tokens + 1) for tokens in context)
        return layers * (steps * (7680 + 64) + cached) + steps * (97 * 32 + 32 + 32 + 97)

    def flops(layers: int) -> int:
        return layers * (prompt * 2 * 7680 + pairs * 4 * 32) + 2 * 97 * 32

    return {"prefill": flops(6) / flops(kept), "decode": entries(6) / entries(kept)}


@pytest.mark.parametrize(("prompt", "steps"), [(3, 1), (9, 4)])
def test_ideal_of_equal_layers(prompt: int, steps: int) -> None:
    model = make_tiny("llama")
    sizes = model_size(model), model_size(sharing_copy(model, range(2, 4)))
    ideal = plain_ideal(*sizes, batch_size=1, prompt_length=prompt, steps=steps)
    assert ideal == pytest.approx(ideal_by_hand(4, prompt, steps), rel=1e-12)


def test_roofline_takes_the_slower_of_the_two() -> None:
    parts = [{"layers": Cost(100, 10), "rest": Cost(10, 300)}]
    assert roofline_seconds(parts, Rates(10, 100)) == 100 / 10 + 300 / 100


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


def test_models_take_turns_in_alternating_order() -> None:
    calls: list[str] = []

    def generate(name: str) -> Generation:
        calls.append(name)
        return Generation(torch.zeros(1, 2), 1.0, (float(len(calls)),), 0)

    rounds = interleave(["a", "b"], generate, repeats=3, warm_up=1)
    assert "".join(calls) == "abbaabba"
    assert rounds.orders == [["b", "a"], ["a", "b"], ["b", "a"]]
    assert [g.decode_seconds for g in rounds.generations["a"]] == [4, 5, 8]
    calls.clear()
    interleave(["a", "b"], generate, repeats=9, warm_up=0, go_on=lambda done: done < 2)
    assert "".join(calls) == "abba"


def test_statistics() -> None:
    found = paired_ratio([2, 4, 6, 8, 10, 12, 28], [2, 2, 2, 2, 2, 2, 4])
    assert (found.median, found.low, found.high) == (4, 1, 7)
    assert found.coverage == 1 - 2 / 2**7
    narrow = paired_ratio(range(1, 10), [1] * 9)  # 2nd smallest and largest of 9
    assert (narrow.low, narrow.high, narrow.coverage) == (2, 8, 1 - 2 * 10 / 2**9)
    assert paired_ratio([3], [2]).coverage == 0
    value = spread([1, 2, 3, 4, 5])
    assert (value.lower_quartile, value.median, value.upper_quartile) == (2, 3, 4)


def test_speeds_and_shares_of_rounds() -> None:
    """3 sequences of 5 prompt tokens and 9 new ones, of which 8 come from steps."""

    def generation(prefill: float, decode: float) -> Generation:
        return Generation(torch.zeros(3, 9), prefill, (decode / 8,) * 8, 0)

    dense = [generation(3, 6), generation(4, 16), generation(5, 16)]
    pruned = [generation(2, 4), generation(1, 4), generation(5, 2)]
    speeds = tokens_per_second(dense, Setting(3, 5, 9))
    assert {phase: value.median for phase, value in speeds.items()} == pytest.approx(
        {"prefill": 3 * 5 / 4, "decode": 3 * 8 / 16, "whole": 3 * 9 / 20}
    )
    assert speeds["decode"].upper_quartile == pytest.approx((24 / 16 + 24 / 6) / 2)
    rounds = Rounds({"dense": dense, "pruned": pruned}, [])
    found = ratios(rounds, {"ideal": {"prefill": 2.0, "decode": 5.0}, "other": {"decode": 8.0}})
    # Rounds 1.5, 4, 1 and 1.5, 4, 8 times; of the whole 9 / 6, 20 / 5, 21 / 7.
    medians = {phase: values["ratio"]["median"] for phase, values in found.items()}
    assert medians == {"prefill": 1.5, "decode": 4, "whole": 3}
    assert (found["prefill"]["ideal"], found["prefill"]["share_of_ideal"]) == (2, 0.75)
    assert (found["decode"]["share_of_ideal"], found["decode"]["share_of_other"]) == (0.8, 0.5)
    assert "share_of_ideal" not in found["whole"]


def test_tokens_that_fit() -> None:
    wanted = Setting(1, 4, 101)

    def fit(seconds: float) -> int:
        return tokens_within(wanted, seconds, 2, first_steps=1.0, last_steps=3.0, prefills=5.0)

    assert fit(2 * (5 + 100 + 100)) == 101  # 100 steps of 2 s on average
    assert fit(2 * (5 + 50 + 25)) == 51
    assert fit(2 * (5 + 50 + 25) - 0.1) == 50
    assert fit(1) == 1


def test_shortened_and_says_so(llama: PreTrainedModel) -> None:
    llama.config.max_position_embeddings = 10**9
    protocol = replace(PRESETS["paper"], new_tokens=20000, max_seconds=4.0)
    protocol = replace(protocol, batch_sizes=(1,))
    content = bench(llama, sharing_copy(llama, (2, 3)), protocol, preset="paper")
    (setting,) = content["settings"]
    assert 8 <= setting["new_tokens"] < setting["wanted_new_tokens"] == 20000
    assert setting["shortened"]
    from simdiff.speed_tables import speed_notes

    assert any(f"{setting['new_tokens']} instead of 20000" in n for n in speed_notes(content))
    with pytest.raises(SimdiffError, match="max seconds must leave time for 8 new tokens"):
        bench(llama, sharing_copy(llama, (2,)), replace(protocol, max_seconds=1e-3))


def test_memory_is_refused_before_it_is_used(llama: PreTrainedModel) -> None:
    size = model_size(llama)
    setting = Setting(16, 4, 2048)
    needed = memory_needed(size, setting)
    # Float32 keys and values, 32 of a token, of 16 sequences of 2052 tokens in 6 layers, those of
    # one of them again; 12 states of 32 for each token of the prompt, and a row of 97 logits.
    assert needed == 4 * 16 * (32 * 2052 * (6 + 1) + 12 * 4 * 32 + 97)
    check_memory({"dense": size}, setting, needed)
    check_memory({"dense": size}, setting, None)
    with pytest.raises(SimdiffError, match="batch 16, prompt 4, 2048 new tokens: must fit"):
        check_memory({"dense": size}, setting, needed - 1)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (replace(QUICK, repeats=0), "repeats must be at least 1, got 0"),
        (replace(QUICK, warm_up=-1), "warm-up must be at least 0, got -1"),
        (replace(QUICK, new_tokens=1), "new tokens must be at least 2, got 1"),
        (replace(QUICK, batch_sizes=(1, 0)), "batch sizes must be at least 1, got 1,0"),
        (replace(QUICK, batch_sizes=()), "batch sizes must be at least 1, got none"),
        (replace(QUICK, prompt_lengths=(5, 0)), "prompt lengths must be at least 1, got 5,0"),
        (replace(QUICK, max_seconds=math.inf), "max seconds must be above 0, got inf"),
        (replace(QUICK, prompt_lengths=(5, 2045, 7)), r"got 2045 \+ 4 = 2049"),
        (replace(QUICK, max_seconds=0.0), "max seconds must be above 0, got 0"),
        (replace(QUICK, new_tokens=2044), r"2048 positions .* got 5 \+ 2044 = 2049"),
    ],
)
def test_bad_protocols(llama: PreTrainedModel, protocol: Protocol, message: str) -> None:
    with pytest.raises(SimdiffError, match=message):
        bench(llama, sharing_copy(llama, (2,)), protocol)


def test_protocols_at_the_limit(llama: PreTrainedModel) -> None:
    replace(QUICK, new_tokens=2043, repeats=1, warm_up=0, max_seconds=1e-9).check(llama)
    replace(QUICK, prompt_lengths=(2046,), new_tokens=2).check(llama)


def test_models_that_cannot_be_compared(llama: PreTrainedModel) -> None:
    twin = sharing_copy(llama, (1,))
    with pytest.raises(SimdiffError, match="same architecture, got LlamaFor.* and GPT2LMHead"):
        bench(llama, make_tiny("gpt2"), QUICK)
    with pytest.raises(SimdiffError, match=r"at most the 5 layers .* got 6: give the dense"):
        bench(twin, llama, QUICK)
    with pytest.raises(SimdiffError, match=r"one dtype, got float32 .* bfloat16"):
        bench(llama, make_tiny("llama").bfloat16(), QUICK)
    other = make_tiny("llama")
    other.resize_token_embeddings(101)
    with pytest.raises(SimdiffError, match=r"one vocabulary size, got 97 .* 101"):
        bench(llama, other, QUICK)


def test_speed_of_a_run_is_what_bench_measures(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([9, 9, 1, 3, 6, 2, 3, 4, 8, 2, 1, 9])  # pruned is first in every second round
    prompts: list[torch.Tensor] = []

    def generate(self: Decoder, prompt: torch.Tensor, new_tokens: int) -> Generation:
        prompts.append(prompt)
        value = float(next(seconds))
        return Generation(torch.zeros(1, new_tokens), 2 * value, (value / 4,) * 4, 0)

    monkeypatch.setattr(Decoder, "generate", generate)
    twin = sharing_copy(llama, (2, 3))
    speeds = measure_speed(llama, twin, prompt_length=9, new_tokens=5, repeats=5)
    assert list(seconds) == []  # a round to warm up and five that count
    dense, pruned = speeds["dense"], speeds["pruned"]
    assert dense.ideal is dense.share_of_ideal is dense.times_faster is None
    # dense 3, 6, 4, 8, 9 seconds and pruned 1, 2, 3, 2, 1: the median of ratios, not of speeds.
    assert pruned.times_faster == {"prefill": 3, "decode": 3}
    assert (dense.prefill, pruned.prefill) == (9 / 12, 9 / 4)
    assert (dense.decode, pruned.decode) == (4 / 6, 4 / 2)
    ideal = ideal_by_hand(4, 9, 4)
    assert pruned.ideal == pytest.approx(ideal, rel=1e-12)
    assert pruned.share_of_ideal == pytest.approx({phase: 3 / ideal[phase] for phase in ideal})
    protocol = Protocol((1,), (9,), new_tokens=5)
    assert torch.equal(prompts[-1], draw_prompt(llama, protocol.settings()[0], protocol.seed))
    assert (dense.decoding, dense.device) == ("eager, dynamic cache", "cpu")


def test_speed_of_a_run_keeps_to_the_positions_there_are(llama: PreTrainedModel) -> None:
    llama.config.max_position_embeddings = 20
    speed = measure_speed(llama, llama, repeats=1, warm_up=0)["pruned"]
    assert (speed.prompt_tokens, speed.new_tokens) == (10, 10)
    assert min(speed.prefill, speed.decode) > 0


def test_a_model_may_have_no_limit_of_positions() -> None:
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    wanted = Setting(1, 10**6, 10**6)
    assert speed_of_run._fitting(model, wanted) == wanted
    replace(QUICK, new_tokens=10**9).check(model)


class Failing(StaticDecoder):
    """What a GPU would be given, and cannot capture."""

    def generate(self, prompt: torch.Tensor, new_tokens: int) -> Generation:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


class Wrong(StaticDecoder):
    """A graph that writes other tokens."""

    def generate(self, prompt: torch.Tensor, new_tokens: int) -> Generation:
        found = super().generate(prompt, new_tokens)
        return replace(found, tokens=(found.tokens + 1) % 97)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (StaticDecoder, r"eager, static cache"),
        (Failing, r"eager, dynamic cache \(eager, static cache failed: operation not permitted "
                  r"when stream is capturing\)"),
        (Wrong, r"eager, dynamic cache \(eager, static cache failed: not timed: .*\)"),
    ],
)  # fmt: skip
def test_speed_of_a_run_falls_back(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, kind: type[Decoder], told: str
) -> None:
    """The decoder that the device suggests is used where it works, and never ends the run."""

    def make(model: PreTrainedModel, graphs: bool = True) -> Decoder:
        return kind(model) if graphs else Decoder(model)

    monkeypatch.setattr(speed_of_run, "make_decoder", make)
    speeds = measure_speed(llama, sharing_copy(llama, (2, 3)), prompt_length=9, new_tokens=4)
    for speed in speeds.values():
        assert re.fullmatch(told, speed.decoding)
        assert min(speed.prefill, speed.decode) > 0


COMMAND = ("--batch-sizes", "1,2", "--prompt-lengths", "5", "--new-tokens", "4", "--repeats", "3",
           "--warm-up", "0")  # fmt: skip


def simdiff(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_command(tiny_checkpoint: Path, tmp_path: Path, llama: PreTrainedModel, capsys) -> None:
    output, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    plan = plan_for(6, (2, 3), **model_identity(llama, "tiny"))
    plan.save(tmp_path / "plan.json")
    by_plan = ("bench", tiny_checkpoint, "--plan", tmp_path / "plan.json", *COMMAND)
    assert simdiff(*by_plan, "-o", output, "--plot", plot) == 0
    printed = capsys.readouterr().out
    for text in ("tok/s", "share", "KV cache, batch 2, 8 tokens", "3 rounds", "prefill", "decode"):
        assert text in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    content = json.loads(output.read_text())
    assert (content["schema"], content["removed"]) == ("simdiff.bench", [2, 3])
    assert content["shared_weights"]
    assert content["num_threads"] == torch.get_num_threads()
    for setting in content["settings"]:
        assert setting["tokens_equal_generate"] == {"dense": True, "pruned": True}
        for name in ("dense", "pruned"):
            assert setting[name]["cache_bytes"] == setting[name]["cache_bytes_by_formula"]
            assert len(setting[name]["seconds"]["decode"]) == 3
        for phase in ("prefill", "decode"):
            found = setting["phases"][phase]
            assert found["share_of_ideal"] == found["ratio"]["median"] / found["ideal"]
            seconds = [setting[n]["seconds"][phase] for n in ("dense", "pruned")]
            ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
            assert found["ratio"]["median"] == ratios[1]
    assert simdiff(*by_plan, "-o", output) == 2
    assert "must not exist yet" in capsys.readouterr().err


def test_command_on_two_checkpoints(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    plan_for(6, (1,), **model_identity(make_tiny("llama"), "tiny")).save(tmp_path / "plan.json")
    small = tmp_path / "small"
    assert simdiff("prune", tiny_checkpoint, "--plan", tmp_path / "plan.json", "-o", small) == 0
    capsys.readouterr()
    assert simdiff("bench", tiny_checkpoint, small, *COMMAND, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert not content["shared_weights"]
    assert [content["models"][n]["num_layers"] for n in ("dense", "pruned")] == [6, 5]


def test_bad_commands(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    other = model_identity(make_tiny("gpt2"), "other")
    plan_for(6, (1,), **other).save(tmp_path / "plan.json")
    for arguments, message in (
        ((), "one of PRUNED, --plan, --remove must say what is compared, got none"),
        (("x", "--remove", "1"), "got PRUNED and --remove"),
        (("--plan", tmp_path / "plan.json"), "the plan was made for another model, 'other'"),
        (("--remove", "6"), "layers to remove"),
        (("--remove", "1", "--repeats", "0"), "repeats must be at least 1, got 0"),
        (("--remove", "1", "--preset", "paper"), "at most the 2048 positions"),
        (("--remove", "1", "-o", tmp_path), "must be a file"),
    ):
        assert simdiff("bench", tiny_checkpoint, *arguments) == 2
        assert message in capsys.readouterr().err


def test_presets_of_the_command_are_all() -> None:
    assert set(bench_command.PRESETS) == set(PRESETS)


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
