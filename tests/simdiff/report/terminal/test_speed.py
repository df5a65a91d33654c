"""What `simdiff bench` prints, of figures written out here."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from simdiff.report.terminal.speed import draft_table, memory_table, speed_notes, speed_table


def spread(median: float) -> dict[str, float]:
    return {"lower_quartile": median - 1, "median": median, "upper_quartile": median + 1}


def phase(median: float, share: float | None) -> dict[str, Any]:
    ratio = {"median": median, "low": median - 0.1, "high": median + 0.2, "coverage": 0.96875}
    if share is None:
        return {"ratio": ratio}
    return {
        "ratio": ratio,
        "ideal": 1.5,
        "share_of_ideal": share,
        "roofline_ideal": 1.25,
        "share_of_roofline_ideal": 0.9,
    }


def setting(batch: int, **changes: Any) -> dict[str, Any]:
    speeds = {
        name: {
            "tokens_per_second": {
                "prefill": spread(1234.5 * times),
                "decode": spread(12.345 * times),
                "whole": spread(99.5 * times),
            },
            "cache_bytes": 3_000_000 * batch // times,
            "cache_bytes_by_formula": 3_000_000 * batch // times,
        }
        for name, times in (("dense", 1), ("pruned", 2))
    }
    return {
        "batch_size": batch,
        "prompt_length": 128,
        "new_tokens": 64,
        "wanted_new_tokens": 64,
        "shortened": False,
        "repeats": 7,
        **speeds,
        "tokens_equal_generate": {"dense": True, "pruned": True},
        "phases": {
            "prefill": phase(1.2, 0.8),
            "decode": phase(1.4, 0.9),
            "whole": phase(1.3, None),
        },
        **changes,
    }


def content(*settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    sizes = {
        "num_layers": 30,
        "num_parameters": 134_515_008,
        "weight_bytes": 538_060_032,
        "cache_bytes_per_token": 46_080,
    }
    smaller = {
        "num_layers": 24,
        "num_parameters": 113_275_008,
        "weight_bytes": 453_100_032,
        "cache_bytes_per_token": 36_864,
    }
    return {
        "models": {"dense": {"name": "large", **sizes}, "pruned": {"name": "small", **smaller}},
        "settings": list(settings),
        "device": "cpu",
        "num_threads": 2,
        "preset": None,
        "dtype": "float32",
        "decoding": "eager",
        "attention": "sdpa",
        "machine": "a machine",
        "protocol": {"warm_up": 2, "repeats": 7, "max_seconds": 600.0},
        "other_processes_cores": 0.1,
        **changes,
    }


def cells(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(list(column.cells) for column in table.columns), strict=True))


def test_speeds() -> None:
    """Head and shares once for a setting; a star where tokens were left out."""
    short = setting(16, shortened=True, new_tokens=8)
    table = speed_table(content(setting(1), short)).table
    assert [str(column.header) for column in table.columns] == [
        "batch",
        "prompt",
        "new",
        "phase",
        "dense, tok/s",
        "pruned, tok/s",
        "ratio",
        "interval",
        "ideal",
        "of ideal",
        "roofline",
        "of roofline",
    ]
    assert [c.justify for c in table.columns] == 3 * ["right"] + ["left"] + 8 * ["right"]
    assert cells(table) == [
        (*head, phase, *speeds, *ratio)
        for heads in (("1", "128", "64"), ("16", "128", "8*"))
        for head, phase, speeds, ratio in (
            (
                heads,
                "prefill",
                ("1234 [1234-1236]", "2469 [2468-2470]"),
                ("1.200", "1.100-1.400", "1.500", "0.800", "1.250", "0.900"),
            ),
            (
                ("", "", ""),
                "decode",
                ("12.3 [11.3-13.3]", "24.7 [23.7-25.7]"),
                ("1.400", "1.300-1.600", "1.500", "0.900", "1.250", "0.900"),
            ),
            (
                ("", "", ""),
                "both",
                ("99.5 [98.5-100]", "199 [198-200]"),
                ("1.300", "1.200-1.500", "", "", "", ""),
            ),
        )
    ]
    assert [row.end_section for row in table.rows] == 2 * [False, False, True]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "float32, 2 threads, eager"),
        ({"preset": "paper"}, "preset paper, float32, 2 threads, eager"),
        ({"device": "cuda:0"}, "float32, eager"),
    ],
)
def test_title(changes: dict[str, str], line: str) -> None:
    wanted = f"Speed of large against small: {line}, sdpa attention\na machine"
    assert speed_table(content(setting(1), **changes)).table.title == wanted


@pytest.mark.parametrize("width", [80, 130])
def test_the_speeds_fit_a_terminal(width: int) -> None:
    stream = io.StringIO()
    Console(file=stream, width=width).print(speed_table(content(setting(1), setting(16))))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in stream.getvalue()
    assert ("of roofline" in stream.getvalue()) == (width > 100)


def test_memory() -> None:
    """64 new tokens take 63 steps after the prompt of 128: the last token is in no cache."""
    table = memory_table(content(setting(1), setting(16)))
    assert [str(column.header) for column in table.columns] == ["", "dense", "pruned", "ratio"]
    assert [column.justify for column in table.columns] == ["left", "right", "right", "right"]
    assert cells(table) == [
        ("layers", "30", "24", "0.800"),
        ("parameters", "134.52 M", "113.28 M", "0.842"),
        ("weights", "538.06 MB", "453.10 MB", "0.842"),
        ("KV cache, per token", "46.08 kB", "36.86 kB", "0.800"),
        ("KV cache, batch 1, 191 tokens", "3.00 MB", "1.50 MB", "0.500"),
        ("KV cache, batch 16, 191 tokens", "48.00 MB", "24.00 MB", "0.500"),
    ]
    none = content()
    none["models"]["dense"]["cache_bytes_per_token"] = 0
    assert cells(memory_table(none))[-1][-1] == ""


def test_notes_of_a_whole_measurement() -> None:
    """Two, without what would have to be said against it; a tenth of a core is no load."""
    rounds, terms = speed_notes(content(setting(1), setting(2)))
    assert rounds.startswith("7 rounds after 2 of warm-up; ")
    assert "with its 97% interval; " in terms
    assert len(speed_notes(content(setting(1), other_processes_cores=None))) == 2
    few = setting(2, repeats=3)
    few["phases"]["decode"]["ratio"]["coverage"] = 0.75
    rounds, terms, *_ = speed_notes(content(setting(1), few))
    assert rounds.startswith("7, 3 rounds after")
    assert "its 75% interval" in terms
    one = setting(2, repeats=1)
    for phase in one["phases"].values():
        phase["ratio"]["coverage"] = 0.0
    found = content(one)
    rounds, terms, *_ = speed_notes(found)
    assert rounds.startswith("1 round after 2 of warm-up")
    assert "ratios, without an interval; " in terms
    assert "0%" not in terms
    assert {row[7] for row in cells(speed_table(found).table)} == {""}


def above_one() -> dict[str, Any]:
    found = setting(1)
    found["phases"]["decode"]["share_of_ideal"] = 1.01
    return found


@pytest.mark.parametrize(
    ("changes", "load", "wanted"),
    [
        ({"phases": above_one()["phases"]}, 0.0, "A share above 1: "),
        (
            {"shortened": True, "new_tokens": 8},
            0.0,
            "* Shortened: 8 instead of 64 new tokens at batch 4, prompt 128, to end within 600 s ",
        ),
        ({"repeats": 6}, 0.0, "Ended after 6 of 7 rounds at batch 4, prompt 128: "),
        (
            {"tokens_equal_generate": {"dense": True, "pruned": False}},
            0.0,
            "pruned: some tokens differ from generate's",
        ),
        (
            {"pruned": setting(4)["pruned"] | {"cache_bytes": 7}},
            0.0,
            "The KV cache of pruned holds 7 bytes where the formula of the ideal counts 6000000.",
        ),
        ({}, 0.11, "Other processes kept 0.1 cores busy"),
    ],
)
def test_what_is_to_be_said_against_it(changes: dict[str, Any], load: float, wanted: str) -> None:
    """One more note, of the setting that it is about."""
    both = content(setting(1), setting(4, **changes), other_processes_cores=load)
    (note,) = speed_notes(both)[2:]
    assert note.startswith(wanted)


def test_what_a_draft_brought() -> None:
    content = {
        "draft": {
            "text": {"source": "corpus.txt"},
            "prompts": 7,
            "prompt_length": 128,
            "new_tokens": 64,
            "draft_tokens": 5,
            "acceptance_rate": 0.6789,
            "accepted_per_step": 3.3945,
            "equal_prompts": 6,
            "tokens_per_second": {"alone": spread(1234.5), "drafted": spread(43.21)},
            "ratio": {"median": 0.0351, "low": 0.03, "high": 0.04},
        }
    }
    table, caption, _ = draft_table(content)
    assert isinstance(table, Table)
    shown = [list(column.cells)[1:4] for column in table.columns][1]
    assert shown == ["67.9%", "3.39 tokens", "1234 tokens/s"]
    assert list(table.columns[1].cells)[4:] == ["43.2 tokens/s", "0.035 (0.030 to 0.040)", "6 of 7"]
    assert "7 prompts of 128 tokens from corpus.txt, 64 new tokens each" in str(caption)
    assert "the others differ where two logits nearly tie" in str(caption)
    assert draft_table({}) == []
