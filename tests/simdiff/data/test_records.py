"""Several texts in the record of scores, and their windows read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from simdiff.data.documents import TextFile, TextMix, text_of_words
from simdiff.data.records import options_of_record, source_of_record, source_record
from simdiff.data.text import token_windows
from simdiff.errors import SimdiffError
from simdiff.jobs.calibrate import calibration_windows
from simdiff.models.loading import load_model
from simdiff.scoring.calibration_pass import score

pytest.importorskip("datasets")


@pytest.fixture
def mix(tmp_path: Path, tiny_text: Path) -> TextMix:
    rows = [{"body": f"w{n} w7 " * 12} for n in range(20, 60)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    named = TextFile(f"hf:{tmp_path / 'set'}", "body")
    return TextMix((str(tiny_text), named), (2.0, 1.0))


def test_scores_tell_the_mix_and_read_it_again(mix: TextMix, tiny_checkpoint: Path) -> None:
    model, tokenizer = load_model(str(tiny_checkpoint), device="cpu")
    windows = token_windows(mix, tokenizer, num_windows=6, window_length=20)
    identity = windows.identity.to_dict()
    weights, columns = zip(
        *((s["weight"], s.get("column")) for s in identity["sources"]), strict=True
    )
    assert weights == (2.0, 1.0)
    assert columns == (None, "body")
    assert identity["sources"][1]["sources"][0]["rows"] == 40
    scores = score(model, windows.batches(2), name="tiny", progress=False, calibration=identity)
    scores.save(tiny_checkpoint / "scores.json")
    again = type(scores).load(tiny_checkpoint / "scores.json")
    assert calibration_windows(again, tokenizer).tolist() == windows.tokens.tolist()
    source = next(iter(mix.sources))
    Path(str(source)).write_text("w1 w2\n\n" * 300)
    with pytest.raises(SimdiffError, match="2 x .*has changed"):
        calibration_windows(again, tokenizer)


def test_halves_stay_apart_and_in_proportion(mix: TextMix, tiny_checkpoint_files: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint_files)
    parts = [
        token_windows(mix, tokenizer, part=part, num_windows=99, window_length=6).tokens
        for part in ("calibration", "held-out")
    ]
    share = [(part == 7).float().mean().item() for part in parts]
    assert share == pytest.approx([1 / 6, 1 / 6], abs=0.04)  # half of a third; w7 elsewhere too


def test_what_a_command_line_names() -> None:
    assert text_of_words(["a.txt"]) == "a.txt"
    assert text_of_words(["a"], ["c"]) == TextFile("a", "c")
    mix = text_of_words(["a", "b"], ["text", "c"], [2, 1])
    assert mix == TextMix(("a", TextFile("b", "c")), (2, 1))
    assert text_of_words(["a", "b"]) == TextMix(("a", "b"), (1.0, 1.0))
    assert source_of_record({"source": "x", "column": "c"}) == TextFile("x", "c")
    assert source_record("x") == {"source": "x"}
    parts = [{"source": "a b", "weight": 2.0}, {"source": "c", "weight": 0.5, "column": "d"}]
    words = options_of_record({"source": "2 x a b + 0.5 x c", "sources": parts})
    assert words == [
        "--text",
        "a b",
        "--text",
        "c",
        "--text-column",
        "text,d",
        "--text-weights",
        "2,0.5",
    ]
    assert options_of_record({"source": "hf:x@1:y:z[:5]", "sources": [{"rows": 5}]}) == [
        "--text",
        "hf:x@1:y:z[:5]",
    ]
    with pytest.raises(SimdiffError, match="1 column or 2, got 3"):
        text_of_words(["a", "b"], ["c", "d", "e"])
    with pytest.raises(SimdiffError, match="weights of 2 texts .*got 1"):
        text_of_words(["a", "b"], [], [1])
    with pytest.raises(SimdiffError, match="weights of 1 texts .*got 1, 2"):
        text_of_words(["a"], [], [1, 2])
