"""Statistics by groups of sequences: draws of them, standard errors, padding, leading tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.planning.draws import resampled
from simdiff.scoring.block_scores import BLOCK_SCORES
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.group_scores import is_maximum, to_matrix
from simdiff.scoring.scores import LayerScores
from simdiff_kernels import METRICS
from support.states import hidden_states, unlike_sequences


@pytest.fixture
def ids() -> torch.Tensor:
    return unlike_sequences()


def of_tokens(before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of tokens, each written out."""
    d, a, b = after - before, np.linalg.norm(before, axis=-1), np.linalg.norm(after, axis=-1)
    return {
        "cosine_distance": 1 - (before * after).sum(-1) / (a * b),
        "squared_difference": (d**2).sum(-1),
        "absolute_difference": np.abs(d).mean(-1),
        "relative_difference": np.linalg.norm(d, axis=-1) / a,
        "norm_before": a,
        "norm_after": b,
        "norm_change": (b - a) ** 2 / (2 * a * b),
    }


def test_sequences_apart_and_draws_of_them(tiny: PreTrainedModel, ids: torch.Tensor) -> None:
    """Scores of draws against all tokens of the sequences drawn, as often as they are drawn."""
    scores = score(tiny, list(ids.split(4)), progress=False)
    states = hidden_states(tiny, [ids]).numpy()
    assert scores.sequences is not None
    assert scores.sequences.num_tokens == (12,) * 6
    weights = np.array([[1, 1, 1, 1, 1, 1], [0, 3, 0, 1, 2, 0], [0, 0, 6, 0, 0, 0]])
    for counts, drawn in zip(weights.tolist(), resampled(scores, weights), strict=True):
        rows = np.repeat(np.arange(6), counts)
        assert drawn.num_tokens == 72
        for layer in range(6):
            values = of_tokens(states[layer][rows], states[layer + 1][rows])
            for name in METRICS:
                table = drawn.metrics[name]
                assert table.mean[layer] == pytest.approx(values[name].mean(), rel=3e-6), name
                assert table.maximum[layer] == pytest.approx(values[name].max(), rel=3e-6), name
        assert drawn.blocks is not None
        assert drawn.last_token_angles is not None
        for i, j in itertools.combinations(range(7), 2):
            values = of_tokens(states[i][rows], states[j][rows])
            values["squared_difference_maximum"] = values["squared_difference"].max()
            for name in {*scores.sequences.blocks} & {*values}:
                got = drawn.blocks.metrics[name][i][j]
                assert got == pytest.approx(values[name].mean(), rel=1e-5, abs=1e-9), name
            angle = np.arccos(1 - values["cosine_distance"][:, -1]) / np.pi
            assert drawn.last_token_angles[i][j] == pytest.approx(angle.mean(), rel=1e-4)


def test_standard_errors_by_sequence(llama: PreTrainedModel, ids: torch.Tensor) -> None:
    """Unequal lengths: the linearised variance of a ratio, and the spread of 4000 draws."""
    mask = (torch.arange(12) < torch.tensor([12, 5, 9, 12, 7, 10]).unsqueeze(1)).long()
    scores = score(llama, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    assert scores.sequences is not None
    n, m = mask.sum(1).numpy(), scores.sequences.means["cosine_distance"]
    mean = (n[:, None] * m).sum(0) / n.sum()
    wanted = np.sqrt(6 / 5 * ((n[:, None] * (m - mean)) ** 2).sum(0)) / n.sum()
    table = scores.metrics["cosine_distance"]
    assert table.mean == pytest.approx(mean, rel=1e-6)
    assert table.cluster_standard_error == pytest.approx(wanted, rel=1e-9)
    assert table.error == table.cluster_standard_error
    drawn = np.random.default_rng(0).integers(0, 6, (4000, 6))
    spread = ((n[:, None] * m)[drawn].sum(1) / n[drawn].sum(1)[:, None]).std(0)
    # The plain bootstrap lacks the factor G / (G - 1), and G = 6 is few for a linearisation.
    assert table.cluster_standard_error == pytest.approx(spread * np.sqrt(6 / 5), rel=0.15)
    alone = score(llama, [ids[:1]], progress=False).metrics["cosine_distance"]
    assert alone.cluster_standard_error == (None,) * 6
    assert alone.error == alone.standard_error


def padded(ids: torch.Tensor, side: str) -> dict[str, torch.Tensor]:
    """The same sequences in wider rows, and one row of padding alone in the middle."""
    wide, mask = torch.zeros(7, 16, dtype=torch.int64), torch.zeros(7, 16, dtype=torch.int64)
    rows = [0, 1, 2, 4, 5, 6]
    where = slice(4, 16) if side == "left" else slice(0, 12)
    wide[rows, where], mask[rows, where] = ids, 1
    return {"input_ids": wide, "attention_mask": mask}


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_skipped_tokens(
    tiny: PreTrainedModel, ids: torch.Tensor, side: str, skip: int
) -> None:
    """Positions count from the first real token; a sequence of padding alone is left out."""
    scores = score(tiny, [padded(ids, side)], progress=False, skip_leading=skip)
    states = hidden_states(tiny, [ids]).numpy()
    assert scores.sequences is not None
    assert scores.sequences.first == (0, 1, 2, 4, 5, 6)
    assert scores.sequences.num_tokens == (12 - skip,) * 6
    assert scores.num_tokens == 6 * (12 - skip)
    parts = [(scores.metrics, slice(skip, None))]
    if skip:
        assert scores.leading is not None
        assert (scores.leading.skip_leading, scores.leading.num_tokens) == (2, 12)
        parts.append((scores.leading.metrics, slice(0, skip)))
    else:
        assert scores.leading is None
    for tables, positions in parts:
        for layer in range(6):
            values = of_tokens(states[layer][:, positions], states[layer + 1][:, positions])
            for name in METRICS:
                assert tables[name].mean[layer] == pytest.approx(values[name].mean(), rel=1e-5)
                assert tables[name].maximum[layer] == pytest.approx(values[name].max(), rel=1e-5)
            place = tables["squared_difference"].location[layer]
            row, position = np.unravel_index(
                values["squared_difference"].argmax(), values["squared_difference"].shape
            )
            shift = 4 if side == "left" else 0
            assert place.sequence == (0, 1, 2, 4, 5, 6)[row]
            assert place.position == position + shift + (positions.start or 0)
            assert place.token_id == ids[row, position + (positions.start or 0)]
    for row in range(6):
        first, last = states[2][row, skip:], states[5][row, skip:]
        got = to_matrix(scores.sequences.blocks["cosine_distance"][row], 6)[2][5]
        wanted = of_tokens(first, last)["cosine_distance"].mean()
        assert got == pytest.approx(wanted, rel=1e-4)


def test_the_total_does_not_depend_on_the_run_or_on_batches(
    llama: PreTrainedModel, ids: torch.Tensor
) -> None:
    """Bitwise, for the same hidden states: six batches of one against each other and themselves."""
    first = score(llama, list(ids.split(1)), progress=False)
    again = score(llama, list(ids.split(1)), progress=False)
    assert first == again
    assert json.dumps(first.to_dict()["sequences"]) == json.dumps(again.to_dict()["sequences"])
    grouped = score(llama, list(ids.split(1)), progress=False, groups=3)
    assert grouped.sequences is not None
    assert grouped.sequences.first == (0, 2, 4)
    assert grouped.sequences.num_sequences == (2, 2, 2)
    uneven = score(llama, list(ids.split(4)), progress=False, groups=4)
    assert uneven.sequences is not None
    assert uneven.sequences.num_tokens == (24, 24, 24)
    for name in METRICS:
        assert uneven.metrics[name].mean == pytest.approx(first.metrics[name].mean, rel=1e-6)
        assert grouped.sequences.maxima[name].max(0).tolist() == pytest.approx(
            first.metrics[name].maximum, rel=1e-7
        )


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"encoding": "hexadecimal"}, "must be base64 .*got 'hexadecimal'"),
        ({"num_tokens": [11] * 4}, "of each group"),
        ({"num_tokens": [0] * 5}, "a sequence and a token"),
        ({"num_tokens": [10] * 5}, "55 tokens together"),
        ({"means": {}}, "must have cosine_distance"),
        ({"last_token_angles": "AAAA"}, "last_token_angles of sequences must have 5 x 21 values"),
        ({"last_token_angles": "?" * 560}, "damaged"),
        ({"last_token_angles": "AADAfwAA" * 70}, "not finite"),
        ({"blocks": None}, "damaged"),
        ({"blocks": {"cosine_distance": "AAAA"}}, "blocks cosine_distance of sequences"),
    ],
)
def test_damaged_sequences(
    llama_scores: LayerScores, tmp_path: Path, change: dict, wanted: str
) -> None:
    content = llama_scores.to_dict()
    content["sequences"] = content["sequences"] | change
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SimdiffError, match=wanted):
        LayerScores.load(path)


def test_bad_options(llama: PreTrainedModel, ids: torch.Tensor) -> None:
    short = torch.ones_like(ids)
    short[:, 2:] = 0
    for keywords, batches, wanted in (
        ({"skip_leading": 12}, [ids], "below the length of every sequence, got 12 for 12 tokens"),
        ({"skip_leading": -1}, [ids], "skip_leading at least 0, got 128 and -1"),
        ({"groups": 0}, [ids], "groups must be at least 1"),
        (
            {"skip_leading": 2},
            [{"input_ids": ids, "attention_mask": short}],
            "after the first 2, which are skipped, got all tokens masked",
        ),
    ):
        with pytest.raises(SimdiffError, match=wanted):
            score(llama, batches, progress=False, **keywords)  # type: ignore[arg-type]


def test_maxima_are_told_from_means() -> None:
    assert [name for name in BLOCK_SCORES if is_maximum(name)] == ["squared_difference_maximum"]
