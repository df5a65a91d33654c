"""`simdiff recover` by training: verified checkpoints, killed and interrupted runs, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simdiff import cli
from simdiff.models.identity import model_identity
from simdiff.provenance.verify import verify
from simdiff.recovery.record import RecoveryRecord
from simdiff.recovery.training.state import START, STATE
from support.own_text import decided, drawn
from support.plans import plan_for
from support.tiny_models import make_tiny

# 160 documents of 32 words: 80 calibrate; the examples are 24 tokens long.
TEXT = ("--num-windows", "32", "--window-length", "24")
TRAINING = (
    "--train-length",
    "24",
    "--rank",
    "4",
    "--set-apart",
    "16",
    "--learning-rate",
    "1e-2",
    "--warmup-steps",
    "2",
    "--evaluations",
    "4",
    "--patience",
    "0",
    "--threads",
    "1",
)
REMOVED = (3, 2)


def simdiff(*arguments: object) -> int:
    threads = torch.get_num_threads()
    try:
        return cli.main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def given(tiny_checkpoint: Path, tmp_path: Path) -> tuple[object, ...]:
    """A dense checkpoint, its text and a plan, as arguments."""
    model = decided(make_tiny("llama"))
    model.save_pretrained(tiny_checkpoint)
    rows = drawn(model, 160, 32).tolist()
    text, plan = tmp_path / "own.jsonl", tmp_path / "a-plan.json"
    words = [" ".join(f"w{n}" if n else "<unk>" for n in row) for row in rows]
    text.write_text("\n".join(json.dumps({"text": document}) for document in words))
    plan_for(6, REMOVED, **model_identity(model, "tiny")).save(plan)
    return ("recover", tiny_checkpoint, "--plan", plan, "--text", text, *TEXT, *TRAINING)


def test_distillation(given: tuple[object, ...], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    options = ("--method", "distillation", "--steps", "24", "-o", out)
    assert simdiff(*given, *options) == 0
    captured = capsys.readouterr()
    assert "train: step 24 of 24, perplexity on what is set apart" in captured.err
    checks = verify(out, against=str(given[1]))
    assert [check.line() for check in checks if check.passed is False] == []
    record = RecoveryRecord.load(out / "recovery.json")
    assert record.trained
    share = record.recovered_share
    assert share is not None
    assert share > 0.4, "on text that nothing was trained on"
    curve = record.details["training"]["curve"]
    assert [point["step"] for point in curve] == [0, 6, 12, 18, 24]
    for key in ("tokens", "seconds", "train_loss", "set_apart_loss"):
        assert all(key in point for point in curve)
    assert record.details["start"]["layers"], "it started from the closed form"
    for key in (
        "rank",
        "lora_alpha",
        "learning_rate",
        "steps",
        "train_seed",
        "distillation_weight",
    ):
        assert key in record.settings
    assert not (tmp_path / "out.training").exists()
    card = (out / "README.md").read_text()
    assert "trained afterwards" in card
    command = next(line for line in card.splitlines() if "--method distillation" in line)
    for words in ("--steps 24", "--rank 4", "--train-length 24", "--start closed-form"):
        assert words in command


def test_the_last_layers_themselves(
    given: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those from the cut on, without peft; the command of the card says how many."""
    monkeypatch.setitem(sys.modules, "peft", None)
    out, words = tmp_path / "out", list(given)
    at = words.index("--rank")
    del words[at : at + 2]
    assert simdiff(*words, "--method", "partial", "--steps", "12", "-o", out) == 0
    assert [check.line() for check in verify(out, str(given[1])) if check.passed is False] == []
    record = RecoveryRecord.load(out / "recovery.json")
    share = record.recovered_share
    assert share is not None
    assert share > 0.4, "on text that nothing was trained on"
    assert record.settings["last_layers"] == 3, "two lie behind the cut, one before it"
    assert "rank" not in record.settings
    assert "lm_head.weight" in record.changed
    assert "model.layers.0.mlp.up_proj.weight" not in record.changed
    card = (out / "README.md").read_text()
    command = next(line for line in card.splitlines() if "--method partial" in line)
    assert "--last-layers 3" in command


def test_the_card_repeats_it(given: tuple[object, ...], tmp_path: Path) -> None:
    """The command that the card gives makes the same weights; a flag is repeated as a flag."""
    out, again = tmp_path / "out", tmp_path / "again"
    options = ("--method", "lora", "--epochs", "1", "--gradient-checkpointing", "-o", out)
    assert simdiff(*given, *options) == 0
    card = (out / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("simdiff recover")]
    words = line.split()[1:]
    words[words.index("--plan") + 1] = str(out / "plan.json")
    words[words.index("--output") + 1] = str(again)
    assert simdiff(words[0], given[1], *words[2:], "--threads", 1) == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_papers_recipe_on_instructions(given: tuple[object, ...], tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "alpaca.json"
    rows = drawn(decided(make_tiny("llama")), 48, 20, seed=9).tolist()
    data.write_text(
        json.dumps(
            [
                {
                    "instruction": " ".join(f"w{n}" for n in row[:5]),
                    "input": "",
                    "output": " ".join(f"w{n}" for n in row[5:]),
                }
                for row in rows
            ]
        )
    )
    options = ("--method", "lora", "--preset", "paper", "--training-text", data, "-o", out)
    assert simdiff(*given, *options, "--train-length", "256") == 0
    record = RecoveryRecord.load(out / "recovery.json")
    assert record.details["examples"]["kind"] == "instructions"
    assert record.details["examples"]["train"] == 36, "a quarter at most is set apart"
    assert record.details["start"] is None, "the paper trains the plain cut"
    assert record.settings["schedule"] == "linear"
    assert record.settings["dropout"] == 0.05
    assert record.settings["train_batch_size"] == 64
    assert [check.name for check in verify(out, str(given[1])) if check.passed is False] == []


def test_killed_then_interrupted_it_gives_the_same_weights(
    given: tuple[object, ...], tmp_path: Path, capsys
) -> None:
    """SIGKILL in one run of the command, Ctrl-C in the next, and a third one ends it."""
    options = ("--method", "distillation", "--steps", "16", "--checkpoint-minutes", "0")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert simdiff(*given, *options, "-o", whole) == 0
    state = tmp_path / "out.training" / STATE
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "simdiff.cli", *map(str, (*given, *options, "-o", out))]
    reached = []
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        before = step_of(state)
        while step_of(state) < before + 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
        assert process.returncode == (-9 if number == signal.SIGKILL else 130), told
        reached.append(step_of(state))
        assert not out.exists()
    assert "interrupted, finishing this step to keep it; again stops at once" in told
    assert "given again the command goes on from the last state of the training" in told
    assert 2 <= reached[0] < reached[1] < 16, reached
    assert (state.parent / START).exists()
    assert simdiff(*given, *options, "-o", out) == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not state.parent.exists()


def step_of(state: Path) -> int:
    """Of the state on the disk, which is whole whenever it is read; -1 where there is none."""
    return torch.load(state, weights_only=True)["state"]["step"] if state.exists() else -1


def test_what_another_run_left(given: tuple[object, ...], tmp_path: Path, capsys) -> None:
    folder = tmp_path / "out.training"
    folder.mkdir()
    (folder / STATE).write_bytes(b"nothing")
    options = ("--method", "lora", "--start", "cut", "--steps", "2", "-o", tmp_path / "out")
    assert simdiff(*given, *options) == 2
    assert "remove" in capsys.readouterr().err
    (folder / "mine.txt").write_text("")
    assert simdiff(*given, *options, "--restart") == 2
    assert "holds other files than training leaves (mine.txt)" in capsys.readouterr().err
    (folder / "mine.txt").unlink()
    assert simdiff(*given, *options, "--restart") == 0
    assert load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "lora", "--temperature", "2"), "temperature of another method"),
        (
            (
                "--method",
                "closed-form",
            ),
            "of another method",
        ),
        (("--method", "lora", "--preset", "distillation"), "must be one of text, paper"),
        (("--method", "lora", "--targets", "x_proj"), "got x_proj"),
        (("--method", "distillation", "--rank", "0"), "rank must be at least 1"),
        (("--method", "lora", "--last-layers", "2"), "last_layers of another method"),
        (("--method", "lora", "--training-text", "none.jsonl"), "none.jsonl"),
        (("--method", "lora", "--train-length", "100000"), "one window of 100000 tokens"),
    ],
)
def test_bad_options(
    given: tuple[object, ...], tmp_path: Path, capsys, options: tuple[str, ...], message: str
) -> None:
    assert simdiff(*given, *options, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_plan_of_no_layers(given: tuple[object, ...], tmp_path: Path, capsys) -> None:
    model = make_tiny("llama")
    plan_for(6, (), **model_identity(model, "tiny")).save(tmp_path / "none.json")
    arguments = ["recover", *given[1:], "--plan", tmp_path / "none.json", "--method", "lora"]
    assert simdiff(*arguments, "-o", tmp_path / "out") == 2
    assert "removed must name 1 to 5 layers" in capsys.readouterr().err
