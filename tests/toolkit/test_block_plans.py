"""Block scores against recorded states, selection over blocks against brute force, budgets."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from states import blocks_of as blocks_of_states
from torch import nn
from transformers import PreTrainedModel

from simdiff.block_costs import BLOCK_CRITERIA, block_costs
from simdiff.block_scores import BLOCK_SCORES
from simdiff.block_selection import BlockCosts, best_contiguous_block, blocks_of, optimal_blocks
from simdiff.criteria import importance
from simdiff.errors import SimdiffError
from simdiff.exchange import exchange_search, losses_of_cuts
from simdiff.hooks import LayerHooks
from simdiff.models import find_decoder_layers
from simdiff.planning import make_plan
from simdiff.running_block_groups import norm_changes
from simdiff.scores import LayerScores, score
from simdiff.shortlist import Candidate, shortlist
from simdiff_kernels import NonFiniteError, RunningBlockScores, RunningScores, row_sums
from simdiff_kernels.metrics import COUNTED, LEFT_OUT


def states_of(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """h_0 ... h_L of the unmasked tokens, float64, by hooks of the test's own."""
    seen: list[torch.Tensor] = []
    layers = find_decoder_layers(model).modules
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in layers
    ]
    last = layers[-1].register_forward_hook(
        lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in (*handles, last):
        handle.remove()
    return [state[mask.bool()].double() for state in seen]


def test_block_scores(tiny: PreTrainedModel) -> None:
    """Two batches of unequal size, one padded on the right, against the formulas in float64."""
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 97, (size, 9), generator=generator) for size in (3, 2)]
    masks = [torch.ones(3, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64)]
    masks[0][1, 5:] = 0
    inputs = [{"input_ids": i, "attention_mask": m} for i, m in zip(batches, masks, strict=True)]
    blocks = score(tiny, inputs, progress=False).blocks
    assert blocks is not None
    both = [states_of(tiny, i, m) for i, m in zip(batches, masks, strict=True)]
    states = [torch.cat(pair) for pair in zip(*both, strict=True)]
    for i, j in itertools.combinations(range(7), 2):
        x, y = states[i], states[j]
        d, a, b = y - x, x.norm(dim=-1), y.norm(dim=-1)
        wanted = {
            "cosine_distance": (1 - (x * y).sum(-1) / (a * b)).mean(),
            "squared_difference": d.square().sum(-1).mean(),
            "squared_difference_maximum": d.square().sum(-1).max(),
            "relative_difference": (d.norm(dim=-1) / a).mean(),
            "angular_distance": ((x * y).sum(-1) / (a * b)).arccos().mean() / torch.pi,
            "norm_change": torch.cosh((b / a).log()).sub(1).mean(),
        }
        assert set(wanted) == set(blocks.metrics) == {*BLOCK_SCORES} - {"absolute_difference"}
        for name, value in wanted.items():
            assert blocks.metrics[name][i][j] == pytest.approx(value.item(), rel=1e-5), name
            assert blocks.metrics[name][j][i] == 0


def test_simdiff_is_the_squared_relative_error(llama_scores: LayerScores) -> None:
    """Cosine distance plus norm change is ||y - x||^2 / (2 ||x|| ||y||), in any unit."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(50, 16, generator=generator, dtype=torch.float64) for _ in range(4)]
    states[2][7] *= 1e4  # a massive activation in one token
    costs = []
    for unit in (1.0, 1e3):
        blocks = blocks_of_states([unit * state for state in states])
        costs.append(block_costs(dataclasses.replace(llama_scores, blocks=blocks)).values)
    for i, j in itertools.combinations(range(4), 2):
        x, y = states[i], states[j]
        direct = (y - x).square().sum(-1) / (2 * x.norm(dim=-1) * y.norm(dim=-1))
        assert costs[0][i][j] == pytest.approx(direct.mean().item(), rel=1e-9)
        assert costs[1][i][j] == pytest.approx(costs[0][i][j], rel=1e-9)
    # 1e4 in one of 50 tokens: the cosine distance of random states is 1, the cost is over 50.
    assert costs[0][1][2] > 50
    assert costs[0][2][3] > 50
    assert costs[0][1][3] < 2


def test_norm_change_of_zero_masked_and_bad_tokens() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [math.nan, 0.0]])
    y = torch.tensor([[6.0, 8.0], [0.0, 0.0], [1.0, 0.0], [9.0, 0.0], [1.0, 0.0]])
    z = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 0.0], [9.0, 0.0], [1.0, 0.0]])
    kinds = torch.tensor([[COUNTED, COUNTED, COUNTED, LEFT_OUT, COUNTED]], dtype=torch.uint8)
    sums = torch.stack([row_sums(x, y), row_sums(y, z)]).unsqueeze(1)
    found = norm_changes(sums, kinds)[0]
    assert found[0, 1].item() == pytest.approx(0.25 + 0 + 1)
    assert found[0, 2].item() == pytest.approx((1 / 5 + 5) / 2 - 1 + 1 + 0)
    assert found[1, 2].item() == pytest.approx((1 / 10 + 10) / 2 - 1 + 1 + 1)
    assert not bool(found.tril().any())


def test_blocks_see_nan(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        llama.model.layers[2].mlp.down_proj.weight[0] = math.nan
    with pytest.raises(NonFiniteError):
        score(llama, [torch.ones(1, 4, dtype=torch.int64)], progress=False)


def test_layers_out_of_order_and_overwritten_states_are_refused() -> None:
    class Add(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + 1

    layers = nn.ModuleList([Add(), Add()])
    with LayerHooks(layers, RunningScores(2), RunningBlockScores(2)), torch.no_grad():
        with pytest.raises(
            SimdiffError, match="once and in order .*got layer 1 where layer 0 was due"
        ):
            layers[1](torch.ones(1, 3))
        state = layers[0](torch.ones(1, 3))
        copy = state.clone()
        state.zero_()
        with pytest.raises(SimdiffError, match="state 1 was written over"):
            layers[1](copy)


def random_costs(num_layers: int, seed: int) -> BlockCosts:
    """Some costs repeat, so that ties happen."""
    choose = random.Random(seed)
    size = range(num_layers + 1)
    values = tuple(tuple(choose.randint(1, 9) / 2 if i < j else 0.0 for j in size) for i in size)
    return BlockCosts("random", "", values)


@pytest.mark.parametrize("num_layers", [2, 5, 8])
@pytest.mark.parametrize("max_blocks", [None, 1, 2, 3])
def test_optimal_blocks_are_those_of_brute_force(num_layers: int, max_blocks: int | None) -> None:
    for seed in range(12):
        costs = random_costs(num_layers, seed)
        protect = set(random.Random(seed).sample(range(num_layers), seed % 3))
        for count in range(1, num_layers):
            plans = [
                plan
                for plan in itertools.combinations(range(num_layers), count)
                if not protect & set(plan)
                and (max_blocks is None or len(blocks_of(plan)) <= max_blocks)
            ]
            if not plans:
                with pytest.raises(SimdiffError, match="leave no such choice"):
                    optimal_blocks(costs, count, protect, max_blocks)
                continue
            found = optimal_blocks(costs, count, protect, max_blocks)
            assert found in plans
            assert costs.of(found) == min(map(costs.of, plans))
            if max_blocks == 1:
                assert best_contiguous_block(costs, count, protect) == found


def test_bad_block_selections() -> None:
    costs = random_costs(4, 0)
    for arguments, wanted in (
        ((0,), "1 to 3, got 0"),
        ((4,), "1 to 3, got 4"),
        ((2, (), 0), "at least 1, got 0"),
    ):
        with pytest.raises(SimdiffError, match=wanted):
            optimal_blocks(costs, *arguments)
    broken = BlockCosts("", "", ((0, math.nan, 1), (0, 0, 1), (0, 0, 0)))
    with pytest.raises(SimdiffError, match="finite and not negative, got nan for layers 0 to 0"):
        optimal_blocks(broken, 1)


def test_plans_by_every_selection(llama_scores: LayerScores) -> None:
    costs = block_costs(llama_scores).raised(5 / 6)
    plan = make_plan(llama_scores, 3, protect=(1,))
    free = [p for p in itertools.combinations(range(6), 3) if 1 not in p]
    assert costs.of(plan.removed) == pytest.approx(min(map(costs.of, free)))
    assert plan.selection == "optimal blocks, p = 0.833"
    block = make_plan(llama_scores, 3, selection="contiguous")
    assert len(blocks_of(block.removed)) == 1
    lowest = make_plan(llama_scores, 3, selection="lowest")
    assert list(lowest.removed) == importance(llama_scores, "simdiff").ranking()[:3]
    influence = make_plan(llama_scores, 3, criterion="block-influence", selection="blocks")
    cosine = block_costs(llama_scores, "cosine-distance")
    assert cosine.of(influence.removed) == pytest.approx(
        min(cosine.of(p) for p in itertools.combinations(range(6), 3))
    )
    for wrong, wanted in (
        ({"criterion": "simdiff-mssd", "selection": "blocks"}, "criterion simdiff-mssd does not"),
        ({"selection": "best"}, "lowest, contiguous, blocks, got 'best'"),
        ({"max_blocks": 0}, "at least 1"),
        ({"selection": "lowest", "max_blocks": 2}, "go with selection 'blocks'"),
    ):
        with pytest.raises(SimdiffError, match=wanted):
            make_plan(llama_scores, 3, **wrong)
    with pytest.raises(SimdiffError, match="must be one of simdiff, cosine-distance"):
        block_costs(llama_scores, "cosine")
    assert set(BLOCK_CRITERIA) >= {"simdiff", "cosine-distance", "norm-change"}


def test_scores_without_blocks_say_what_to_run(llama_scores: LayerScores, tmp_path: Path) -> None:
    content = {**llama_scores.to_dict(), "schema_version": 1}
    del content["blocks"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = LayerScores.load(tmp_path / "old.json")
    assert old.blocks is None
    with pytest.raises(SimdiffError, match="lack: score the model again with `simdiff score`"):
        make_plan(old, 2)
    assert make_plan(old, 2, criterion="block-influence").selection == "lowest"
    for rows in ([[1.0]], [[1.0] * 6] * 6, "none"):
        damaged = llama_scores.to_dict()
        damaged["blocks"]["norm_change"] = rows
        (tmp_path / "old.json").write_text(json.dumps(damaged))
        with pytest.raises(SimdiffError, match="norm_change of blocks must have 6 rows"):
            LayerScores.load(tmp_path / "old.json")


def test_choice_by_perplexity(llama: PreTrainedModel, llama_scores: LayerScores) -> None:
    windows = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(5))
    candidates = shortlist(llama_scores, 2)
    assert len({candidate.removed for candidate in candidates}) == len(candidates) <= 2
    assert candidates[0].removed == optimal_blocks(block_costs(llama_scores).raised(5 / 6), 2)
    influence = tuple(sorted(importance(llama_scores, "block-influence").ranking()[:2]))
    assert influence in [candidate.removed for candidate in candidates]
    assert all(3 not in c.removed for c in shortlist(llama_scores, 2, protect=(3,)))
    assert all(len(blocks_of(c.removed)) == 1 for c in shortlist(llama_scores, 2, max_blocks=1))

    candidates = [Candidate((0, 1), "a"), Candidate((2, 4), "b"), Candidate((4, 5), "c")]
    best, evaluated, _ = exchange_search(
        losses_of_cuts(llama, windows), candidates, block_costs(llama_scores), max_reads=0
    )
    assert len(evaluated) == 3
    assert len(find_decoder_layers(llama)) == 6
    for candidate in evaluated:
        kept = [llama.model.layers[k] for k in range(6) if k not in candidate.removed]
        whole, llama.model.layers = llama.model.layers, nn.ModuleList(kept)
        llama.config.num_hidden_layers = 4
        with torch.no_grad():
            wanted = llama(input_ids=windows[:1], labels=windows[:1], use_cache=False).loss
        llama.model.layers, llama.config.num_hidden_layers = whole, 6
        assert candidate.nll == pytest.approx(wanted.item(), rel=1e-5)
    assert best.nll == min(candidate.nll for candidate in evaluated if candidate.nll is not None)


def test_a_candidate_with_nan_is_out_and_told(
    llama: PreTrainedModel, llama_scores: LayerScores
) -> None:
    windows = torch.randint(0, 97, (1, 8), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0] = math.nan
    pair = [Candidate((4, 5), "with NaN"), Candidate((1, 5), "without")]
    losses, costs = losses_of_cuts(llama, windows), block_costs(llama_scores)
    best, evaluated, _ = exchange_search(losses, pair, costs, max_reads=2)
    assert best.origin == "without"
    assert [candidate.nll is None for candidate in evaluated] == [True, False]
    with pytest.raises(SimdiffError, match="NaN, Inf or a cut"):
        exchange_search(losses, pair[:1], costs, max_reads=2)
    plan = make_plan(llama_scores, 1, protect=(0, 2, 3, 4, 5), model=llama, windows=windows)
    assert plan.removed == (1,)
    assert plan.candidates[0]["nll"] > 0
    assert "chosen among 1 plans by perplexity" in plan.notes[-1]
