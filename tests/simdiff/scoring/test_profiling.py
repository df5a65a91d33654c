"""The profile of a calibration pass: every layer is named, its figures come from the trace."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from simdiff import cli
from simdiff.errors import SimdiffError
from simdiff.scoring.profiling import profile_pass
from simdiff_kernels import RunningScores


@pytest.fixture
def batches(token_batches: list[torch.Tensor]) -> list[torch.Tensor]:
    return token_batches


def test_layers_are_named_and_summed(
    llama: PreTrainedModel,
    batches: list[torch.Tensor],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    trace = tmp_path / "trace.json.gz"
    result = profile_pass(llama, batches, trace)
    assert "USDT" not in capfd.readouterr().err, "of torch's profiler"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    for layer in result.layers:
        for name, seconds in (
            (f"layer {layer.layer}", layer.forward_seconds),
            (f"score layer {layer.layer}", layer.scoring_seconds),
        ):
            own = [event["dur"] for event in ranges if event["name"] == name]
            assert len(own) == 2, "one range for each batch"
            assert seconds == pytest.approx(sum(own) / 1e6)
        # At least the two projections of the largest batch's MLP are alive at once.
        assert layer.peak_bytes >= 2 * batches[0].numel() * 48 * 4
    assert [layer.layer for layer in result.layers] == list(range(6))
    # The forward's range does not hold the scoring's.
    first = next(event for event in ranges if event["name"] == "layer 0")
    scoring = next(event for event in ranges if event["name"] == "score layer 0")
    assert scoring["ts"] >= first["ts"] + first["dur"]
    total = result.to_dict()["total"]
    assert total["overhead"] == total["scoring_seconds"] / total["forward_seconds"]
    assert result.num_tokens == sum(ids.numel() for ids in batches)


def test_nothing_stays_behind(
    llama: PreTrainedModel,
    batches: list[torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = RunningScores.update, []

    def failing(self: RunningScores, layer: int, *arguments: object) -> None:
        calls.append(layer)
        if len(calls) > 8:  # the warm-up has passed
            raise RuntimeError("broken")
        original(self, layer, *arguments)

    monkeypatch.setattr(RunningScores, "update", failing)
    with pytest.raises(RuntimeError, match="broken"):
        profile_pass(llama, batches, tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []
    for layer in llama.model.layers:
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [("trace.txt", 1, "named .json or .json.gz, got trace.txt"), ("t.json", 0, "at least one")],
)
def test_bad_input(
    llama: PreTrainedModel,
    batches: list[torch.Tensor],
    tmp_path: Path,
    name: str,
    count: int,
    message: str,
) -> None:
    with pytest.raises(SimdiffError, match=message):
        profile_pass(llama, batches[:count], tmp_path / name)


def test_command(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys) -> None:
    trace = tmp_path / "trace.json"
    arguments = ["profile", str(tiny_checkpoint), "--text", str(tiny_text), "--output", str(trace)]
    arguments += ["--num-windows", "4", "--window-length", "16", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        assert cli.main(arguments) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "scored by cpu" in " ".join(out.split())
    assert "all" in out
    assert trace.is_file()
    assert cli.main(arguments) == 2  # exists
    assert cli.main([*arguments[:-1], "0", "--overwrite"]) == 2
    assert "--threads must be at least 1, got 0" in capsys.readouterr().err


def test_an_unknown_instruction_set_is_told_in_one_line() -> None:
    code = "import sys; from simdiff import cli; sys.exit(cli.main(['info']))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SIMDIFF_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "error: SIMDIFF_CPU_ISA: instruction set must be one of" in result.stderr
