"""Every criterion against its formula on hidden states that transformers itself gave out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from states import blocks_of, hidden_states
from transformers import PreTrainedModel

from simdiff.block_costs import block_costs
from simdiff.block_scores import BlockScores, block_scores_of
from simdiff.budget import Budget
from simdiff.criteria import CRITERIA, importance
from simdiff.errors import SimdiffError
from simdiff.plan_options import PlanOptions
from simdiff.planning import BLOCK_CRITERION_OF, ONE_BLOCK, make_plan
from simdiff.scores import LayerScores, score
from simdiff.selection import PruningPlan, select
from simdiff_kernels import RunningBlockScores


def test_criteria_of_single_layers(tiny: PreTrainedModel, token_batches: list) -> None:
    scores = score(tiny, token_batches, progress=False)
    states = hidden_states(tiny, token_batches)
    before, after = states[:-1].flatten(1, 2), states[1:].flatten(1, 2)
    wanted = {
        "block-influence": 1 - torch.cosine_similarity(before, after, dim=-1).mean(1),
        "relative-magnitude": ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean(1),
        "norm-ratio": (after.norm(dim=-1).mean(1) / before.norm(dim=-1).mean(1)).log().abs(),
        "last-n": torch.arange(5, -1, -1),
    }
    for name, values in wanted.items():
        ranked = importance(scores, name)
        assert ranked.values == pytest.approx(values.tolist(), rel=1e-4, abs=1e-9), name
        assert (ranked.alpha, "seed" in ranked.formula) == (None, False)
    assert select(scores, importance(scores, "last-n"), 3).removed == (5, 4, 3)


def test_random_follows_its_seed(llama_scores: LayerScores) -> None:
    plans = {
        seed: select(llama_scores, importance(llama_scores, "random", seed=seed), 3).removed
        for seed in range(200)
    }
    again = importance(llama_scores, "random", seed=3)
    assert select(llama_scores, again, 3).removed == plans[3]
    assert "seed 3" in again.formula
    assert len({frozenset(removed) for removed in plans.values()}) == math.comb(6, 3)
    counts = [sum(layer in removed for removed in plans.values()) for layer in range(6)]
    assert all(70 < count < 130 for count in counts)  # 100 expected, four standard deviations


def test_criteria_of_blocks(tiny: PreTrainedModel, token_batches: list) -> None:
    scores = score(tiny, token_batches, progress=False)
    states = hidden_states(tiny, token_batches)
    similarity = torch.cosine_similarity(states[:, None], states[None], dim=-1).clamp(-1, 1)
    wanted = {
        "cosine-block": 1 - similarity.mean((-1, -2)),
        "angular-block": similarity.arccos().mean((-1, -2)) / torch.pi,  # as PruneMe does
        "angular-block-last": similarity[..., -1].arccos().mean(-1) / torch.pi,
    }
    formulas = {
        "cosine-block": "mean(1 - cos)",
        "angular-block": "mean arccos(cos) / pi",
        "angular-block-last": "mean arccos(cos) / pi over the last token of each sequence",
    }
    assert set(wanted) == set(formulas) == set(ONE_BLOCK)
    for name, costs in wanted.items():
        of_blocks = block_costs(scores, BLOCK_CRITERION_OF[name])
        assert of_blocks.criterion == BLOCK_CRITERION_OF[name]
        assert of_blocks.formula == importance(scores, name).formula == formulas[name]
        found = of_blocks.values
        # arccos near 1, which the independent way uses, loses half of the digits.
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), costs.triu(1), rtol=1e-4, atol=1e-7
        )
        for count in (1, 3, 5):
            starts = {start: float(costs[start, start + count]) for start in range(7 - count)}
            first = min(starts, key=lambda start: starts[start])
            plan = make_plan(scores, count, criterion=name)
            assert sorted(plan.removed) == list(range(first, first + count))
        assert importance(scores, name).values == tuple(found[k][k + 1] for k in range(6))


def test_the_mean_of_angles_is_not_the_angle_of_the_mean(llama_scores: LayerScores) -> None:
    """Turning ten tokens by 0.1 pi, or one of them by 0.4 pi: cosine and angle disagree.

    The states are built from the angles, so that the means are known, with a massive activation; a
    third block turns every token by 1e-7 pi.
    """
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(10, 64, generator=generator, dtype=torch.float64)
    first[:, 3] *= 300
    side = torch.randn(10, 64, generator=generator, dtype=torch.float64)
    side = (
        side - (side * first).sum(-1, keepdim=True) / first.square().sum(-1, keepdim=True) * first
    )
    side = side * first.norm(dim=-1, keepdim=True) / side.norm(dim=-1, keepdim=True)

    def turned(*shares: float) -> torch.Tensor:
        angles = torch.pi * torch.tensor(shares, dtype=torch.float64)[:, None]
        return angles.cos() * first + angles.sin() * side

    shares = [(0.1,) * 10, (0.5,) + (0.1,) * 9, (0.5 + 1e-7,) + (0.1 + 1e-7,) * 9]
    blocks = blocks_of([first, *(turned(*row) for row in shares)])
    scores = dataclasses.replace(llama_scores, blocks=blocks)
    angles = block_costs(scores, "angular-distance").values
    cosines = block_costs(scores, "cosine-distance").values
    wanted = (0.1, 0.04, 1e-7)
    assert [angles[k][k + 1] for k in range(3)] == pytest.approx(wanted, rel=1e-6)
    assert cosines[0][1] < cosines[1][2]
    assert angles[0][1] > angles[1][2]


def test_scores_of_older_versions(llama_scores: LayerScores, tmp_path: Path) -> None:
    """Version 2 had blocks without angles: all but their criterion, which says what to run."""
    content = llama_scores.to_dict()
    assert content["schema_version"] == 4
    del content["blocks"]["angular_distance"]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SimdiffError, match="damaged: KeyError: 'angular_distance'"):
        LayerScores.load(path)
    path.write_text(json.dumps({**content, "schema_version": 2}))
    scores = LayerScores.load(path)
    assert make_plan(scores, 2) == make_plan(llama_scores, 2)
    assert make_plan(scores, 2, criterion="cosine-block").criterion == "cosine-block"
    wanted = "angular-distance needs the angular_distance of all blocks.*`simdiff score`"
    for use in (lambda: make_plan(scores, 2, criterion="angular-block"),
                lambda: importance(scores, "angular-block")):  # fmt: skip
        with pytest.raises(SimdiffError, match=wanted):
            use()
    scores.save(tmp_path / "again.json")
    assert LayerScores.load(tmp_path / "again.json") == scores


def test_the_absolute_difference_of_blocks_is_kept_where_it_is(
    llama_scores: LayerScores, tmp_path: Path
) -> None:
    """Files up to version 3 have it, later ones where it was asked for; nothing depends on it."""
    assert llama_scores.blocks is not None
    assert "absolute_difference" not in llama_scores.blocks.metrics
    assert llama_scores.to_dict()["blocks"]["absolute_difference"] is None
    running = RunningBlockScores(6, absolute_difference=True)
    running.update([torch.randn(9, 16) for _ in range(7)])
    blocks = block_scores_of(running.finish(), torch.rand(7, 7).triu(1))
    assert blocks.metrics["absolute_difference"][2][5] > 0
    path = tmp_path / "scores.json"
    for version in (3, 4):
        content = dataclasses.replace(llama_scores, blocks=blocks).to_dict()
        path.write_text(json.dumps(content | {"schema_version": version}))
        scores = LayerScores.load(path)
        assert scores.blocks == blocks
        without = {k: v for k, v in blocks.metrics.items() if k != "absolute_difference"}
        same = dataclasses.replace(scores, blocks=BlockScores(without))
        for criterion in ("simdiff", "cosine-block", "simdiff-masd"):
            assert make_plan(scores, 2, criterion=criterion) == make_plan(
                same, 2, criterion=criterion
            )


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


def test_what_a_criterion_lacks_is_said(llama_scores: LayerScores) -> None:
    metrics = dict(llama_scores.metrics)
    del metrics["norm_after"]
    scores = dataclasses.replace(llama_scores, metrics=metrics)
    with pytest.raises(SimdiffError, match="norm-ratio needs norm_after.*run `simdiff score`"):
        importance(scores, "norm-ratio")
    bare = dataclasses.replace(llama_scores, blocks=None, last_token_angles=None)
    with pytest.raises(SimdiffError, match="needs the scores of all blocks.*`simdiff score`"):
        make_plan(bare, 2, criterion="cosine-block")
    with pytest.raises(SimdiffError, match="at the last token of each.*`simdiff score`"):
        make_plan(bare, 2, criterion="angular-block-last")
    with pytest.raises(SimdiffError, match="protected layers .* leave no such choice"):
        make_plan(llama_scores, 3, criterion="cosine-block", protect=(1, 4))
    erased = dataclasses.replace(metrics["norm_before"], mean=(1.0, 1.0, 0.0, 1.0, 1.0, 1.0))
    scores = dataclasses.replace(
        llama_scores, metrics={**llama_scores.metrics, "norm_before": erased}
    )
    with pytest.raises(SimdiffError, match="norm-ratio: importance must be finite.*layers 2"):
        importance(scores, "norm-ratio")


def test_every_criterion_plans_from_the_same_saved_scores(
    llama_scores: LayerScores, tmp_path: Path
) -> None:
    llama_scores.save(tmp_path / "scores.json")
    scores = LayerScores.load(tmp_path / "scores.json")
    for name in CRITERIA:
        plan = PlanOptions(name, budget=Budget(num_layers=2), protect=(2,)).plan(scores)
        assert len(plan.removed) == 2
        assert 2 not in plan.removed
        assert plan.criterion == name
        plan.save(tmp_path / "plan.json")
        assert PruningPlan.load(tmp_path / "plan.json") == plan
    for damage in ([[0.5]], [[math.nan] * (6 - row) for row in range(6)], "none"):
        content = {**llama_scores.to_dict(), "last_token_angles": damage}
        (tmp_path / "scores.json").write_text(json.dumps(content))
        with pytest.raises(SimdiffError, match="damaged"):
            LayerScores.load(tmp_path / "scores.json")
