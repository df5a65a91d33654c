"""When calibration stops, told by given shares of draws; what is read by then and what is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.data.text import TextIdentity, TokenWindows
from simdiff.errors import SimdiffError
from simdiff.jobs import stability
from simdiff.jobs.stability import ScoringOptions, score_windows
from simdiff.planning.make_plan import make_plan
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from simdiff_kernels import METRICS


@pytest.mark.parametrize(
    "options",
    [
        ScoringOptions(skip_leading=15, groups=1, max_state_bytes=1, max_windows=0, confidence=7.0),
        ScoringOptions(sublayers=True),
        ScoringOptions(until_stable=True, confidence=1.0, max_windows=4, groups=2),
        ScoringOptions(until_stable=True, confidence=1e-9, skip_leading=1),
    ],
)
def test_what_just_goes(options: ScoringOptions) -> None:
    options.check(4, 16)
    assert options.num_windows(5) == (options.max_windows if options.until_stable else 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ScoringOptions(skip_leading=-1), "below the window length 16, got -1"),
        (ScoringOptions(skip_leading=16), "below the window length 16, got 16"),
        (ScoringOptions(groups=0), "groups must be at least 1"),
        (ScoringOptions(max_state_bytes=0), "hidden states must be at least a byte, got 0"),
        (ScoringOptions(sublayers=True, skip_leading=1), "sub-layers are scored over all tokens"),
        (ScoringOptions(sublayers=True, until_stable=True), "sub-layers are scored over all"),
        (ScoringOptions(until_stable=True, confidence=0.0), "above 0 and at most 1, got 0.0"),
        (ScoringOptions(until_stable=True, confidence=1.5), "at most 1, got 1.5"),
        (ScoringOptions(until_stable=True, groups=1), "at least 2 groups"),
        (ScoringOptions(until_stable=True, max_windows=3), "at least the 4 windows .* got 3"),
    ],
)
def test_what_does_not(options: ScoringOptions, message: str) -> None:
    with pytest.raises(SimdiffError, match=message):
        options.check(4, 16)


def test_a_single_window_cannot_be_drawn_from() -> None:
    with pytest.raises(SimdiffError, match="at least 2 and at least the 1 windows .* got 1"):
        ScoringOptions(until_stable=True, max_windows=1).check(1, 16)


class Pass:
    """Stands for the calibration pass; keeps what it was fed."""

    def __init__(self, scores: LayerScores) -> None:
        self.given, self.fed, self.tokens = scores, [], []

    def __call__(self, model: object, **options: Any) -> Pass:
        self.options = options
        return self

    def feed(self, batches: list[torch.Tensor], description: str) -> None:
        self.fed.append((description, [len(batch) for batch in batches]))
        self.tokens += batches

    def scores(self, calibration: dict[str, Any]) -> LayerScores:
        assert calibration["num_windows"] == sum(map(len, self.tokens))
        return self.given


@pytest.mark.parametrize(
    ("agreements", "most", "said"),
    [
        ([0.95], 20, ["comes in 95% of draws (95% wanted): stable"]),
        (
            [0.5, None, 0.96],
            20,
            [
                "comes in 50% of draws (95% wanted): more windows",
                "cannot be drawn again (95% wanted): more windows",
                "comes in 96% of draws (95% wanted): stable",
            ],
        ),
        (
            [0.5, 0.6, 0.7, 0.8],
            20,
            [
                *(
                    f"comes in {share} of draws (95% wanted): more windows"
                    for share in ("50%", "60%", "70%")
                ),
                "comes in 80% of draws (95% wanted): not stable, and no more windows",
            ],
        ),
        (
            [0.1, 0.2, 0.3, None],
            13,
            [
                *(
                    f"comes in {share} of draws (95% wanted): more windows"
                    for share in ("10%", "20%", "30%")
                ),
                "cannot be drawn again (95% wanted): not stable, and no more windows",
            ],
        ),
    ],
)
def test_calibration_until_stable(
    llama_scores: LayerScores,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    agreements: list[float | None],
    most: int,
    said: list[str],
) -> None:
    """13 windows, in batches of 3: checked after 2, 4, 8 and 13 of them."""
    tokens = torch.arange(13 * 8).view(13, 8)
    windows = TokenWindows(tokens, TextIdentity("t", "calibration", 0, 1, 13, 8, 104, False))
    shares = iter(agreements)

    def drawn(scores: LayerScores, plan_of: object, **options: int) -> SimpleNamespace | None:
        assert options == {"num_resamples": 60, "seed": 4}
        share = next(shares)
        return None if share is None else SimpleNamespace(agreement=share)

    whole = Pass(llama_scores)
    monkeypatch.setattr(stability, "CalibrationPass", whole)
    monkeypatch.setattr(stability, "bootstrap_plan", drawn)
    options = ScoringOptions(
        until_stable=True, max_windows=most, groups=9, skip_leading=1, max_state_bytes=77
    )
    scores, used = score_windows(
        object(),
        windows,
        options,
        lambda given: SimpleNamespace(removed=(4, 1)),
        first=2,
        name="a model",
        batch_size=3,
        num_resamples=60,
        seed=4,
    )
    assert whole.options == {
        "num_sequences": 13,
        "name": "a model",
        "groups": 9,
        "skip_leading": 1,
        "max_state_bytes": 77,
    }
    checks = len(agreements)
    done = (2, 4, 8, 13)[:checks]
    assert (
        whole.fed
        == [
            ("score, windows 1 to 2", [2]),
            ("score, windows 3 to 4", [2]),
            ("score, windows 5 to 8", [3, 1]),
            ("score, windows 9 to 13", [3, 2]),
        ][:checks]
    )
    assert torch.equal(torch.cat(whole.tokens), tokens[: done[-1]])
    assert torch.equal(used.tokens, tokens[: done[-1]])
    lines = "\n".join(f"{n} windows: the plan {s}" for n, s in zip(done, said, strict=True))
    assert " ".join(capsys.readouterr().err.split()) == " ".join(lines.split())
    found = scores.stability
    assert found is not None
    stable = said[-1].endswith(": stable")
    assert found["checks"] == [
        {"num_windows": n, "agreement": share, "removed": [1, 4]}
        for n, share in zip(done, agreements, strict=True)
    ]
    rest = {key: value for key, value in found.items() if key not in ("checks", "note")}
    assert rest == {
        "stable": stable,
        "confidence": 0.95,
        "num_resamples": 60,
        "seed": 4,
        "max_windows": most,
    }
    counted = ", ".join(map(str, done))
    rule = f"(checked after {counted} windows, 95% of 60 bootstrap resamples wanted)"
    start = f"calibration stopped at {done[-1]} windows"
    if stable:
        share = f"{agreements[-1]:.0%} of resamples give it"
        assert found["note"] == f"{start}: the plan from scores alone is stable, {share} {rule}"
    else:
        why = "--max-windows was reached" if most == 13 else "the text ended"
        share = said[-1].partition(" (")[0]
        assert found["note"] == (
            f"{start} WITHOUT a stable plan, since {why}: the plan from scores alone {share} {rule}"
        )


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
            llama,
            windows,
            options,
            lambda given: make_plan(given, 2, criterion=criterion, selection="lowest"),
            first=2,
            batch_size=3,
            num_resamples=60,
        )
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
