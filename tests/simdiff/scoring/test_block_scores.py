"""Scores of all blocks against recorded states, and states built for it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.models.structure import find_decoder_layers
from simdiff.scoring.block_scores import BLOCK_SCORES
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.running_block_groups import norm_changes
from simdiff_kernels import NonFiniteError, row_sums
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
