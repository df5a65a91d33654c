"""Costs of blocks against their formulas, on states of transformers and on states built for it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.planning.block_costs import block_costs
from simdiff.planning.criteria import importance
from simdiff.planning.make_plan import BLOCK_CRITERION_OF, ONE_BLOCK, make_plan
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from support.states import blocks_of, hidden_states
from support.states import blocks_of as blocks_of_states


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
