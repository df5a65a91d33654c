"""`simdiff bench` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from simdiff.cli import bench as bench_command
from simdiff.models.identity import model_identity
from simdiff.report.page import report_page
from simdiff.speed.protocol import PRESETS
from support.commands import simdiff
from support.plans import plan_for
from support.tiny_models import make_tiny

COMMAND = (
    "--batch-sizes",
    "1,2",
    "--prompt-lengths",
    "5",
    "--new-tokens",
    "4",
    "--repeats",
    "3",
    "--warm-up",
    "0",
)


def test_command(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, llama: PreTrainedModel, capsys
) -> None:
    output = tmp_path / "bench.json"
    plan = plan_for(6, (2, 3), **model_identity(llama, "tiny"))
    plan.save(tmp_path / "plan.json")
    by_plan = ("bench", tiny_checkpoint, "--plan", tmp_path / "plan.json", *COMMAND)
    draft = ("--draft", "--draft-tokens", 2, "--text", tiny_text)
    page = tmp_path / "bench.html"
    assert simdiff(*by_plan, *draft, "-o", output, "--page", page) == 0
    printed = capsys.readouterr().out
    for text in (
        "tok/s",
        "of ideal",
        "KV cache, batch 2, 8 tokens",
        "3 rounds",
        "prefill",
        "decode",
    ):
        assert text in printed
    content = json.loads(output.read_text())
    assert (content["schema"], content["removed"]) == ("simdiff.bench", [2, 3])
    assert content["shared_weights"]
    drafted = content["draft"]
    assert (drafted["draft_tokens"], drafted["prompts"], drafted["prompt_length"]) == (2, 3, 5)
    assert (drafted["text"]["source"], drafted["equal_prompts"]) == (str(tiny_text), 3)
    assert len(drafted["seconds"]["alone"]) == len(drafted["seconds"]["drafted"]) == 3
    assert f"{100 * drafted['acceptance_rate']:.1f}%" in printed
    assert f"{drafted['ratio']['median']:.3f} (" in printed
    assert content["num_threads"] == torch.get_num_threads()
    for setting in content["settings"]:
        assert setting["tokens_equal_generate"] == {"dense": True, "pruned": True}
        for name in ("dense", "pruned"):
            assert setting[name]["cache_bytes"] == setting[name]["cache_bytes_by_formula"]
            assert len(setting[name]["seconds"]["decode"]) == 3
        for phase in ("prefill", "decode"):
            found = setting["phases"][phase]
            assert found["share_of_ideal"] == found["ratio"]["median"] / found["ideal"]
            seconds = [setting[n]["seconds"][phase] for n in ("dense", "pruned")]
            ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
            assert found["ratio"]["median"] == ratios[1]
    assert page.read_text() == report_page(output)
    assert "<h1>Speed of " in page.read_text()
    for again in (("-o", output), ("--page", page)):
        assert simdiff(*by_plan, *again) == 2
        assert "must not exist yet" in capsys.readouterr().err
    page.write_text("precious")
    assert simdiff(*by_plan, "--page", page, "--overwrite") == 2
    assert "is nothing that simdiff wrote" in capsys.readouterr().err


def test_command_on_two_checkpoints(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    plan_for(6, (1,), **model_identity(make_tiny("llama"), "tiny")).save(tmp_path / "plan.json")
    small = tmp_path / "small"
    assert simdiff("prune", tiny_checkpoint, "--plan", tmp_path / "plan.json", "-o", small) == 0
    capsys.readouterr()
    assert simdiff("bench", tiny_checkpoint, small, *COMMAND, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert not content["shared_weights"]
    assert [content["models"][n]["num_layers"] for n in ("dense", "pruned")] == [6, 5]


def test_bad_commands(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    other = model_identity(make_tiny("gpt2"), "other")
    plan_for(6, (1,), **other).save(tmp_path / "plan.json")
    for arguments, message in (
        ((), "one of PRUNED, --plan, --remove must say what is compared, got none"),
        (("x", "--remove", "1"), "got PRUNED and --remove"),
        (("--plan", tmp_path / "plan.json"), "the plan was made for another model, 'other'"),
        (("--remove", "6"), "layers to remove"),
        (("--remove", "1", "--repeats", "0"), "repeats must be at least 1, got 0"),
        (("--remove", "1", "--preset", "paper"), "at most the 2048 positions"),
        (("--remove", "1", "-o", tmp_path), "must be a file"),
        (("--remove", "1", "--draft"), "--text must be given for a model of your own"),
        (("--remove", "1", "--text", "demo"), "--text has an effect only with --draft"),
        (("--remove", "1", "--draft", "--draft-tokens", "0"), "--draft-tokens must be at least 1"),
    ):
        assert simdiff("bench", tiny_checkpoint, *arguments) == 2
        told = capsys.readouterr().err
        assert message in told
        if "positions" in message:
            assert f"load {tiny_checkpoint}" not in told  # the config alone tells


def test_presets_of_the_command_are_all() -> None:
    assert set(bench_command.PRESETS) == set(PRESETS)
