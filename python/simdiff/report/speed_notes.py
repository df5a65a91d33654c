"""What readers of a benchmark must know, on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simdiff.errors import number_of
from simdiff.report.numbers import speed_text


def measured_by(bench: Mapping[str, Any] | None, results: Mapping[str, Any] | None) -> Any:
    """What tells of a measurement of speed: a benchmark, or else the results of a run."""
    return bench or (results or {}).get("pruned", {}).get("speed", {})


def busy_note(measured: Mapping[str, Any]) -> str | None:
    """That other processes disturbed a measurement of speed; None where they hardly did."""
    cores = measured.get("other_processes_cores")
    if cores is None or cores <= 0.1:
        return None
    return (
        f"Other processes kept {cores:.1f} cores busy in the meantime: measure again on an idle "
        "machine."
    )


def measured_notes(content: Mapping[str, Any]) -> list[str]:
    """What is unusual about these measurements, beside a busy machine."""
    settings, notes = content["settings"], []
    if any(
        "ideal" in p and p["share_of_ideal"] > 1 for s in settings for p in s["phases"].values()
    ):
        notes.append(
            "A share above 1: the layers cost more time per byte or flop than embedding and head."
        )
    notes += [
        f"* Shortened: {s['new_tokens']} instead of {s['wanted_new_tokens']} new tokens at batch "
        f"{s['batch_size']}, prompt {s['prompt_length']}, to end within "
        f"{content['protocol']['max_seconds']:g} s on this machine."
        for s in settings
        if s["shortened"]
    ]
    notes += [
        f"Ended after {s['repeats']} of {number_of(content['protocol']['repeats'], 'round')} at "
        f"batch "
        f"{s['batch_size']}, prompt {s['prompt_length']}: the time was up."
        for s in settings
        if s["repeats"] < content["protocol"]["repeats"]
    ]
    for setting in settings:
        for name in ("dense", "pruned"):
            held, counted = (setting[name][k] for k in ("cache_bytes", "cache_bytes_by_formula"))
            if held != counted:
                notes.append(
                    f"The KV cache of {name} holds {held} bytes where the formula of the ideal "
                    f"counts {counted}."
                )
            if not setting["tokens_equal_generate"][name]:
                notes.append(
                    f"{name}: some tokens differ from generate's where two logits nearly tie."
                )
    return notes


def draft_rows(bench: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a draft brought, by names; none where none was measured."""
    draft = bench.get("draft")
    if draft is None:
        return []
    ratio, speeds = draft["ratio"], draft["tokens_per_second"]
    equal = draft["equal_prompts"]
    interval = f" ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio.get("coverage", 1) else ""
    return [
        ("proposed in a step", number_of(draft["draft_tokens"], "token")),
        ("accepted of those proposed", f"{100 * draft['acceptance_rate']:.1f}%"),
        ("accepted in a step, mean", f"{draft['accepted_per_step']:.2f} tokens"),
        ("parent alone", f"{speed_text(speeds['alone']['median'])} tokens/s"),
        ("parent with the draft", f"{speed_text(speeds['drafted']['median'])} tokens/s"),
        ("times faster", f"{ratio['median']:.3f}{interval}"),
        ("prompts with the parent's own tokens", f"{equal} of {draft['prompts']}"),
    ]


def draft_caption(bench: Mapping[str, Any]) -> str:
    """How a draft was measured."""
    draft = bench["draft"]
    nearly = (
        ""
        if draft["equal_prompts"] == draft["prompts"]
        else "; the others differ where two logits nearly tie"
    )
    return (
        "Speculative decoding by transformers, greedy, batch 1: "
        f"{number_of(draft['prompts'], 'prompt')} of "
        f"{number_of(draft['prompt_length'], 'token')} from "
        f"{draft['text'].get('source', 'a text')}, "
        f"{draft['new_tokens']} new tokens each, with the draft and without by turns{nearly}."
    )
