"""The calibration pass against an independent float64 computation on recorded hidden states."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CpmAntConfig, PreTrainedModel, ProphetNetConfig

from simdiff.errors import SimdiffError
from simdiff.models.structure import find_decoder_layers
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from simdiff_kernels import METRICS, NonFiniteError
from simdiff_kernels.testing import exact_metrics


def record(model: PreTrainedModel, inputs: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    """What enters and leaves every layer, batch by batch, by hooks of the test's own."""
    states: list[list[Tensor]] = []
    for batch in inputs:
        seen: list[Tensor] = []

        def enter(module, args, kwargs, seen=seen):
            seen.append((args[0] if args else kwargs["hidden_states"]).clone())

        def leave(module, args, output, seen=seen):
            seen.append((output[0] if isinstance(output, tuple) else output).clone())

        layers = find_decoder_layers(model).modules
        handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
        handles.append(layers[-1].register_forward_hook(leave))
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        states.append(seen)
    return states


def check_scores(scores: LayerScores, states: list[list[Tensor]], masks: list[Tensor]) -> None:
    mask = torch.cat([m.flatten() for m in masks]).bool()
    assert scores.num_tokens == mask.sum()
    for layer in range(scores.num_layers):
        exact = [exact_metrics(seen[layer], seen[layer + 1]) for seen in states]
        for m, name in enumerate(METRICS):
            values = torch.cat([metrics[m].flatten() for metrics in exact])
            kept, table = values[mask], scores.metrics[name]
            # The CPU makes up to 52 additions in float32 before it widens them (block_sums_loop.h);
            # the cosine distance may magnify what that costs by 16 (short_sums.h).
            limit = 52 / 4 * 2.0**-24 * (16 if name == "cosine_distance" else 1)
            assert table.mean[layer] == pytest.approx(kept.mean().item(), rel=limit)
            assert table.maximum[layer] == pytest.approx(kept.max().item(), rel=limit)
            index = int(values.where(mask, -1).argmax())
            place, sequence = table.location[layer], 0
            for batch in masks:
                if index < batch.numel():
                    break
                index -= batch.numel()
                sequence += len(batch)
            row, position = divmod(index, batch.shape[1])
            assert (place.sequence, place.position) == (sequence + row, position)


def test_scores_of_unequal_batches(tiny: PreTrainedModel, token_batches: list[Tensor]) -> None:
    scores = score(tiny, token_batches, progress=False)
    states = record(tiny, [{"input_ids": ids} for ids in token_batches])
    check_scores(scores, states, [torch.ones_like(ids) for ids in token_batches])
    place = scores.metrics["squared_difference"].location[2]
    ids = torch.cat(token_batches)
    assert place.token_id == ids[place.sequence, place.position]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tiny: PreTrainedModel, side: str) -> None:
    """Padded sequences in one batch score like the same alone; GPT-2 has absolute positions."""
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(0, 97, (1, n), generator=generator) for n in (9, 4, 7)]
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, text in enumerate(texts):
        where = slice(9 - text.shape[1], 9) if side == "left" else slice(0, text.shape[1])
        ids[row, where], mask[row, where] = text[0], 1
    together = score(tiny, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    alone = score(tiny, texts, progress=False)
    assert together.num_tokens == alone.num_tokens == 20
    for name in METRICS:
        assert together.metrics[name].mean == pytest.approx(alone.metrics[name].mean, rel=1e-5)
        assert together.metrics[name].maximum == pytest.approx(
            alone.metrics[name].maximum, rel=1e-5
        )


def test_layers_are_the_same_with_and_without_blocks(
    tiny: PreTrainedModel, token_batches: list[Tensor]
) -> None:
    """With blocks the layers are adjacent pairs of states; without, rows are read by layer."""
    pair = [
        score(tiny, token_batches, blocks=blocks, skip_leading=2, groups=2, progress=False)
        for blocks in (True, False)
    ]
    assert pair[0].num_tokens == pair[1].num_tokens
    leading = [scores.leading for scores in pair]
    assert leading[0] is not None
    assert leading[1] is not None
    for name in METRICS:
        for one, other in (
            [scores.metrics[name] for scores in pair],
            [part.metrics[name] for part in leading],
        ):
            assert one.mean == pytest.approx(other.mean, rel=1e-6)
            assert one.maximum == pytest.approx(other.maximum, rel=1e-6)
            assert one.location == other.location
        sequences = [scores.sequences for scores in pair]
        np.testing.assert_allclose(sequences[0].means[name], sequences[1].means[name], rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_gpu_scores_as_the_cpu_does(llama: PreTrainedModel, blocks: bool, padded: bool) -> None:
    """In float64, on the states of the same forward; the model's norms are float32 on the CPU too,
    so that its own states there differ by some 1e-8."""
    llama.double()
    ids = torch.randint(0, 90, (6, 40), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 30:] = mask[4, :7] = 0
    batches = [
        {"input_ids": ids[:4], "attention_mask": mask[:4]},
        {"input_ids": ids[4:], "attention_mask": mask[4:]},
    ]
    options = {"blocks": blocks, "skip_leading": 1, "groups": 3, "progress": False}
    on_cpu = score(llama, batches, **options)
    wanted = score(llama.cuda(), batches, backend="reference", **options)
    found = score(llama, batches, **options)
    assert found.provenance["device"] == "cuda"
    for name in METRICS:
        assert found.metrics[name].mean == pytest.approx(wanted.metrics[name].mean, rel=1e-9)
        assert found.metrics[name].mean == pytest.approx(on_cpu.metrics[name].mean, rel=1e-6)
        for other in (wanted, on_cpu):
            assert found.metrics[name].location == other.metrics[name].location
    if blocks:
        assert found.blocks is not None
        assert wanted.blocks is not None
        for name, matrix in wanted.blocks.metrics.items():
            ours = torch.tensor(found.blocks.metrics[name])
            assert torch.allclose(ours, torch.tensor(matrix), rtol=1e-8, atol=1e-12), name


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("calls", [0, 2], ids=["skipped", "twice"])
def test_layers_that_do_not_run_once_are_refused(
    llama: PreTrainedModel, blocks: bool, calls: int
) -> None:
    """Else the sums of another batch, or of one of two runs, would stand for this one."""
    layer, inner = llama.model.layers[2], llama.model.forward
    times = 1

    class Repeated(nn.Module):
        def forward(self, states: Tensor, **keywords: object) -> Tensor:
            for _ in range(times):
                states = layer(states, **keywords)
            return states

    def run(**keywords: object) -> object:
        """With the layer called by another module; the hooks are its own."""
        layers = list(llama.model.layers)
        llama.model.layers = nn.ModuleList([*layers[:2], Repeated(), *layers[3:]])
        try:
            return inner(**keywords)
        finally:
            llama.model.layers = nn.ModuleList(layers)

    llama.model.forward = run
    ids = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    score(llama, [ids], blocks=blocks, progress=False)
    times = calls
    with pytest.raises(SimdiffError, match="every layer must run once"):
        score(llama, [ids], blocks=blocks, progress=False)


@pytest.mark.parametrize("blocks", [True, False])
def test_a_batch_may_begin_within_a_group(llama: PreTrainedModel, blocks: bool) -> None:
    """Five sequences in groups of two, given as three and two: the second batch ends the group."""
    ids = torch.randint(0, 90, (5, 11), generator=torch.Generator().manual_seed(8))
    options = {"blocks": blocks, "groups": 3, "progress": False}
    parts, whole = (score(llama, split, **options).sequences for split in (ids.split(3), [ids]))
    assert parts is not None
    assert whole is not None
    assert parts.num_tokens == whole.num_tokens == (22, 22, 11)
    for name in METRICS:
        np.testing.assert_allclose(parts.means[name], whole.means[name], rtol=1e-5)
    for name, matrix in whole.blocks.items():
        np.testing.assert_allclose(parts.blocks[name], matrix, rtol=1e-4, atol=1e-9)
    if whole.last_token_angles is not None:
        np.testing.assert_allclose(parts.last_token_angles, whole.last_token_angles, rtol=1e-4)


@pytest.mark.parametrize("most", [1, 8000, 1 << 40])
def test_states_take_no_more_memory_than_allowed(
    llama: PreTrainedModel, token_batches: list[Tensor], most: int
) -> None:
    wanted = score(llama, token_batches, skip_leading=1, progress=False)
    rows: list[int] = []
    hook = llama.model.layers[0].register_forward_hook(
        lambda layer, args, output: rows.append(len(args[0] if args else output))
    )
    found = score(llama, token_batches, skip_leading=1, progress=False, max_state_bytes=most)
    hook.remove()
    width = llama.config.hidden_size * 4 * (len(llama.model.layers) + 1)
    assert sum(rows) == sum(map(len, token_batches))
    for ids in token_batches if most == 8000 else ():
        assert max(1, most // (width * ids.shape[1])) < len(ids), "a batch that must be split"
    if most == 1:
        assert set(rows) == {1}
    for name in METRICS:
        assert found.metrics[name].mean == pytest.approx(wanted.metrics[name].mean, rel=1e-5)
        assert found.metrics[name].location == wanted.metrics[name].location
    assert found.sequences is not None
    assert found.sequences.num_tokens == wanted.sequences.num_tokens
    with pytest.raises(SimdiffError, match="max_state_bytes must be at least 1, got 0"):
        score(llama, token_batches, progress=False, max_state_bytes=0)


def test_last_layer_is_measured_before_the_final_norm(
    llama: PreTrainedModel, token_batches: list[Tensor]
) -> None:
    with torch.no_grad():
        llama.model.norm.weight.mul_(100)
    scaled = score(llama, token_batches, progress=False)
    with torch.no_grad():
        llama.model.norm.weight.div_(100)
    assert scaled.metrics == score(llama, token_batches, progress=False).metrics


def test_no_logits_and_no_cache(llama: PreTrainedModel, token_batches: list[Tensor]) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the head must not run")

    seen: list[object] = []
    llama.lm_head.forward = forbidden  # type: ignore[method-assign]
    layer = llama.model.layers[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    score(llama, token_batches, progress=False)
    assert seen == [None, None]


def test_nonfinite_states_are_reported_by_layer(
    llama: PreTrainedModel, token_batches: list[Tensor]
) -> None:
    with torch.no_grad():
        llama.model.layers[3].mlp.down_proj.weight[5] = float("inf")
    with pytest.raises(NonFiniteError, match="layer 3: 55 of 55 tokens") as caught:
        score(llama, token_batches, progress=False)
    assert set(caught.value.tokens_by_layer) == {3, 4, 5}
    assert not any(layer._forward_hooks for layer in llama.model.layers)


def test_bad_batches(llama: PreTrainedModel) -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    for batches, wanted in (
        ([], "at least one batch, got none"),
        ([ids.float()], "must be integers"),
        ([ids[0]], r"\(batch, sequence\)"),
        ([{"input_ids": ids, "attention_mask": ids[:1]}], r"shape \(2, 4\) like input_ids"),
        ([{"input_ids": ids, "attention_mask": ids * 0}], "got all tokens masked"),
    ):
        with pytest.raises(SimdiffError, match=wanted):
            score(llama, batches, progress=False)


@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_demo_model_against_float64(demo: tuple, dtype: torch.dtype) -> None:
    """Real model, real text: the massive activation that layer 11 writes included."""
    from simdiff.data.text import token_windows

    tokenizer = demo[1]
    model = copy.deepcopy(demo[0]).to(dtype)  # there and back again would round the shared weights
    windows = token_windows("demo", tokenizer, num_windows=3, window_length=64)
    scores = score(model, windows.batches(2), progress=False)
    states = record(model, [{"input_ids": ids} for ids in windows.batches(2)])
    check_scores(scores, states, [torch.ones_like(ids) for ids in windows.batches(2)])
    peaks = scores.metrics["squared_difference"].maximum
    assert peaks[11] > 1000 * max(peaks[10], peaks[12])


def test_last_tokens_are_not_padding(llama: PreTrainedModel) -> None:
    ids = torch.randint(0, 97, (4, 9), generator=torch.Generator().manual_seed(3))
    lengths = (9, 4, 6, 1)
    right, left, mask = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros(4, 9).long()
    for row, length in enumerate(lengths):
        right[row, :length] = left[row, 9 - length :] = ids[row, :length]
        mask[row, :length] = 1
    alone = [score(llama, [ids[r : r + 1, :n]], progress=False) for r, n in enumerate(lengths)]
    wanted = torch.tensor([s.last_token_angles for s in alone]).mean(0)
    for tokens, attention in ((right, mask), (left, mask.flip(1))):
        batch = {"input_ids": tokens, "attention_mask": attention}
        found = score(llama, [batch], progress=False).last_token_angles
        torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (
            CpmAntConfig(
                vocab_size=97,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                dim_head=8,
                dim_ff=48,
                prompt_length=4,
            ),
            r"\(2, 13, 32\)",
        ),
        (
            ProphetNetConfig(
                vocab_size=97,
                hidden_size=32,
                num_decoder_layers=2,
                num_encoder_layers=1,
                num_decoder_attention_heads=4,
                num_encoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                is_decoder=True,
                is_encoder_decoder=False,
                add_cross_attention=False,
            ),
            r"\(2, 27, 32\)",
        ),
    ],
    ids=["cpmant", "prophetnet"],
)
def test_more_states_than_tokens_are_refused(config: object, shape: str) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(SimdiffError, match=rf"each token of input_ids \(2, 9\), got shape {shape}"):
        score(model, [torch.ones(2, 9, dtype=torch.int64)], progress=False)
