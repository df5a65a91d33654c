"""Statistics by sequence, the bootstrap over them, leading tokens, calibration until stable."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from states import hidden_states
from transformers import AutoModelForCausalLM, CpmAntConfig, PreTrainedModel, ProphetNetConfig

from simdiff import cli
from simdiff.block_scores import BLOCK_SCORES
from simdiff.bootstrap import amounts_of_text, bootstrap_plan, draws, resampled
from simdiff.calibration import TextIdentity, TokenWindows
from simdiff.criteria import CRITERIA
from simdiff.errors import SimdiffError
from simdiff.planning import BLOCK_CRITERION_OF, make_plan
from simdiff.scores import LayerScores, score
from simdiff.selection import PruningPlan
from simdiff.sequence_scores import is_maximum, to_matrix
from simdiff.stability import ScoringOptions, score_windows
from simdiff_kernels import METRICS


@pytest.fixture
def ids() -> torch.Tensor:
    """Six sequences of unlike text: each repeats a few tokens of its own."""
    generator = torch.Generator().manual_seed(5)
    own = torch.randint(0, 97, (6, 3), generator=generator)
    return own.gather(1, torch.randint(0, 3, (6, 12), generator=generator))


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
    weights = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 3, 0, 1, 2, 0], [0, 0, 6, 0, 0, 0]])
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
    n, m = mask.sum(1).numpy(), scores.sequences.means["cosine_distance"].numpy()
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
        assert grouped.sequences.maxima[name].max(0).values.tolist() == pytest.approx(
            first.metrics[name].maximum, rel=1e-7
        )


@pytest.mark.parametrize("criterion", [*CRITERIA])
def test_plan_frequencies_of_every_criterion(
    llama_scores: LayerScores, llama: PreTrainedModel, ids: torch.Tensor, criterion: str
) -> None:
    """Against plans of the concatenated sequences of each draw, scored from the model anew."""
    scores = score(llama, [ids], progress=False)
    selections = ["lowest", "contiguous", "blocks"] if criterion in BLOCK_CRITERION_OF else [None]
    weights = draws(6, 8, seed=3)
    for selection in selections:

        def plan_of(given: LayerScores, selection: str | None = selection) -> PruningPlan:
            return make_plan(given, 2, criterion=criterion, selection=selection)

        found = bootstrap_plan(scores, plan_of, num_resamples=8, seed=3)
        assert found is not None
        plans = [
            sorted(
                plan_of(score(llama, [ids.repeat_interleave(row, dim=0)], progress=False)).removed
            )
            for row in weights
        ]
        times = [sum(layer in plan for plan in plans) / 8 for layer in range(6)]
        assert found.plan_frequency == pytest.approx(times)
        assert list(found.removed) == sorted(plan_of(scores).removed)
        assert found.agreement == pytest.approx(plans.count(list(found.removed)) / 8)


def test_draws_are_seeded_and_even() -> None:
    assert torch.equal(draws(5, 40, seed=1), draws(5, 40, seed=1))
    assert not torch.equal(draws(5, 40, seed=1), draws(5, 40, seed=2))
    counts = draws(4, 20_000, seed=0).double()
    assert counts.sum(1).unique().tolist() == [4]
    # A count is binomial (4, 1/4): mean 1, variance 3/4.
    assert counts.mean(0).tolist() == pytest.approx([1] * 4, abs=0.03)
    assert counts.var(0).tolist() == pytest.approx([0.75] * 4, abs=0.04)
    assert draws(7, 3, size=2).sum(1).tolist() == [2, 2, 2]


def test_a_resample_without_a_plan_counts_as_another(llama_scores: LayerScores) -> None:
    calls = itertools.count()

    def plan_of(scores: LayerScores) -> PruningPlan:
        if next(calls) in (2, 5):  # the first call is for the scores themselves
            raise SimdiffError("too few are free")
        return make_plan(scores, 2, criterion="last-n")

    found = bootstrap_plan(llama_scores, plan_of, num_resamples=10)
    assert found is not None
    assert (found.num_failed, found.agreement) == (2, 0.8)
    assert found.plan_frequency == (0, 0, 0, 0, 0.8, 0.8)
    assert "2 give no plan at all" in found.note(found.removed)
    with pytest.raises(SimdiffError, match="at least 1, got 0"):
        bootstrap_plan(llama_scores, plan_of, num_resamples=0)


def test_draws_without_any_plan_are_an_error(llama_scores: LayerScores) -> None:
    """What fails in all of them is missing from them: no frequency of zero, silently."""
    calls = itertools.count()

    def plan_of(scores: LayerScores) -> PruningPlan:
        if next(calls):
            raise SimdiffError("criterion angular-block needs angles")
        return make_plan(scores, 2, criterion="last-n")

    with pytest.raises(SimdiffError, match="10 draws .* got none .*angular-block needs angles"):
        bootstrap_plan(llama_scores, plan_of, num_resamples=10)


def test_files_and_their_earlier_versions(llama_scores: LayerScores, tmp_path: Path) -> None:
    """Saved and loaded, scores give the same frequencies; version 2 gives none, and says so."""
    path = tmp_path / "scores.json"
    llama_scores.save(path)
    loaded = LayerScores.load(path)
    assert loaded == llama_scores

    def found(scores: LayerScores) -> object:
        return bootstrap_plan(scores, lambda given: make_plan(given, 3), num_resamples=50)

    assert found(loaded) == found(llama_scores)
    assert found(loaded) is not None
    content = json.loads(path.read_text())
    old = {k: v for k, v in content.items() if k not in ("sequences", "leading", "stability")}
    for table in old["metrics"].values():
        del table["cluster_standard_error"]
    path.write_text(json.dumps(old | {"schema_version": 2}))
    earlier = LayerScores.load(path)
    assert earlier.sequences is None
    assert earlier.metrics["cosine_distance"].error == earlier.metrics[METRICS[0]].standard_error
    assert found(earlier) is None
    assert make_plan(earlier, 3).removed == make_plan(llama_scores, 3).removed
    with pytest.raises(SimdiffError, match="score the model again"):
        next(resampled(earlier, draws(5, 1)))


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


def test_damaged_stability(llama_scores: LayerScores, tmp_path: Path) -> None:
    for bad in ("stable", {"stable": True}):
        (tmp_path / "s.json").write_text(json.dumps(llama_scores.to_dict() | {"stability": bad}))
        with pytest.raises(SimdiffError, match="damaged"):
            LayerScores.load(tmp_path / "s.json")


def test_leading_tokens_in_the_file(llama: PreTrainedModel, ids: torch.Tensor, tmp_path) -> None:
    scores = score(llama, [ids], progress=False, skip_leading=1)
    scores.save(tmp_path / "s.json")
    assert LayerScores.load(tmp_path / "s.json") == scores
    assert scores.calibration["skip_leading"] == 1
    content = scores.to_dict()
    del content["leading"]["metrics"]["norm_after"]
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(SimdiffError, match="norm_after"):
        LayerScores.load(tmp_path / "s.json")


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


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (
            CpmAntConfig(
                vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                dim_head=8, dim_ff=48, prompt_length=4,
            ),
            r"\(2, 13, 32\)",
        ),
        (
            ProphetNetConfig(
                vocab_size=97, hidden_size=32, num_decoder_layers=2, num_encoder_layers=1,
                num_decoder_attention_heads=4, num_encoder_attention_heads=4, encoder_ffn_dim=48,
                decoder_ffn_dim=48, is_decoder=True, is_encoder_decoder=False,
                add_cross_attention=False,
            ),
            r"\(2, 27, 32\)",
        ),
    ],
    ids=["cpmant", "prophetnet"],
)  # fmt: skip
def test_more_states_than_tokens_are_refused(config: object, shape: str) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(SimdiffError, match=rf"each token of input_ids \(2, 9\), got shape {shape}"):
        score(model, [torch.ones(2, 9, dtype=torch.int64)], progress=False)


def windows_of(ids: torch.Tensor) -> TokenWindows:
    identity = TextIdentity("text", "calibration", 0, 1, len(ids), ids.shape[1], ids.numel(), False)
    return TokenWindows(ids, identity)


def test_until_stable_stops_and_does_not(llama: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(6)
    windows = windows_of(torch.randint(0, 97, (13, 8), generator=generator))

    def passed(criterion: str, confidence: float, most: int = 13) -> tuple[LayerScores, int]:
        options = ScoringOptions(until_stable=True, confidence=confidence, max_windows=most)
        options.check(2, 8)
        scores, used = score_windows(
            llama, windows, options,
            lambda given: make_plan(given, 2, criterion=criterion, selection="lowest"),
            first=2, batch_size=3, num_resamples=60,
        )  # fmt: skip
        whole = score(llama, used.batches(3), progress=False)
        assert scores.num_tokens == 8 * len(used.tokens) == whole.num_tokens
        for name in METRICS:
            assert scores.metrics[name].mean == pytest.approx(whole.metrics[name].mean, rel=1e-6)
        assert scores.calibration == used.identity.to_dict()
        assert scores.calibration["num_windows"] == len(used.tokens)
        assert scores.calibration["num_tokens"] == used.tokens.numel()
        return scores, len(used.tokens)

    scores, used = passed("last-n", 1.0)  # the text does not matter to it
    assert used == 2
    assert scores.stability is not None
    assert scores.stability["stable"] is True
    scores, used = passed("block-influence", 1.0, 20)
    assert used == 13
    assert scores.stability is not None
    assert scores.stability["stable"] is False
    assert [check["num_windows"] for check in scores.stability["checks"]] == [2, 4, 8, 13]
    assert "WITHOUT a stable plan, since the text ended" in scores.stability["note"]
    agreements = [check["agreement"] for check in scores.stability["checks"]]
    wanted = sorted(agreements)[1] if agreements[0] != max(agreements) else agreements[0]
    scores, used = passed("block-influence", wanted)
    first = next(n for n, share in zip((2, 4, 8, 13), agreements, strict=True) if share >= wanted)
    assert used == first


def test_until_stable_refuses_nonsense() -> None:
    for options, wanted in (
        (ScoringOptions(skip_leading=16), "below the window length 16, got 16"),
        (ScoringOptions(groups=0), "groups must be at least 1"),
        (ScoringOptions(until_stable=True, confidence=1.5), "at most 1, got 1.5"),
        (ScoringOptions(until_stable=True, max_windows=3), "at least the 4 windows"),
        (ScoringOptions(until_stable=True, groups=1), "at least 2 groups"),
    ):
        with pytest.raises(SimdiffError, match=wanted):
            options.check(4, 16)


def simdiff(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_commands(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys) -> None:
    """Until stable, then a plan with the model on the windows used, and its frequencies."""
    scores, plan = tmp_path / "s.json", tmp_path / "p.json"
    text = ("--text", tiny_text, "--window-length", 16, "--windows", 2, "--batch-size", 2)
    until = ("--calibrate-until-stable", "--max-windows", 8, "--stable-confidence", 1)
    kind = ("--num-layers", 2, "--criterion", "simdiff")
    command = ("score", tiny_checkpoint, *text, *until, *kind, "--skip-leading", 1, "-o", scores)
    assert simdiff(*command) == 0
    printed = capsys.readouterr()
    stability = json.loads(scores.read_text())["stability"]
    assert f"Note: {stability['note']}." in " ".join(printed.out.split())
    assert "2 windows: the plan comes in" in printed.err
    used = stability["checks"][-1]["num_windows"]
    assert json.loads(scores.read_text())["calibration"]["num_windows"] == used
    assert simdiff("plan", scores, *kind, "--model", tiny_checkpoint, "-o", plan) == 0
    printed = capsys.readouterr()
    loaded = PruningPlan.load(plan)
    assert loaded.confidence is not None
    assert loaded.confidence.num_groups == used
    assert loaded.confidence.num_resamples == 500
    assert "in draws" in printed.out
    for share in loaded.confidence.plan_frequency:
        assert f"{share:.0%}" in printed.out
    assert simdiff("plan", scores, *kind, "--bootstrap", 0, "--overwrite", "-o", plan) == 0
    assert PruningPlan.load(plan).confidence is None
    assert "in draws" not in capsys.readouterr().out
    refused = ("score", tiny_checkpoint, *text, "--skip-leading", 16, "-o", tmp_path / "x.json")
    assert simdiff(*refused) == 2
    assert "below the window length 16, got 16" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_confidence_in_a_plan_file(llama_scores: LayerScores, tmp_path: Path) -> None:
    found = bootstrap_plan(llama_scores, lambda given: make_plan(given, 2), num_resamples=20)
    assert found is not None
    for low, value, high in zip(
        found.importance_low, make_plan(llama_scores, 2).importance, found.importance_high,
        strict=True,
    ):  # fmt: skip
        assert low < value < high
    plan = dataclasses.replace(make_plan(llama_scores, 2), confidence=found)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    content = plan.to_dict()
    content["confidence"]["plan_frequency"].pop()
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(SimdiffError, match="plan_frequency must have 6 entries"):
        PruningPlan.load(tmp_path / "plan.json")


def test_amounts_of_text(llama_scores: LayerScores) -> None:
    found = amounts_of_text(llama_scores, lambda given: make_plan(given, 2))
    assert [amount.num_groups for amount in found] == [1, 2, 4]
    assert all(0 <= amount.agreement <= amount.overlap <= 1 for amount in found)
    assert found[0].overlap < 1
    wanted = {*make_plan(llama_scores, 2).removed}
    alone = [
        len({*make_plan(given, 2).removed} & wanted) / 2
        for given in resampled(llama_scores, draws(5, 60, size=1))
    ]
    assert found[0].overlap == pytest.approx(np.mean(alone))
    always = amounts_of_text(llama_scores, lambda given: make_plan(given, 2, criterion="last-n"))
    assert [(amount.agreement, amount.overlap) for amount in always] == [(1, 1)] * 3


def test_maxima_are_told_from_means() -> None:
    assert [name for name in BLOCK_SCORES if is_maximum(name)] == ["squared_difference_maximum"]
