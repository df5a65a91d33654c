"""Processes that share a job: the same bits as one process, the same errors, no output by halves."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simdiff import cli
from simdiff.errors import SimdiffError, SurgeryError
from simdiff.io import ranks
from support.processes import Ended, Processes

SMALL = ("--window-length", "16", "--batch-size", "3")


def run(folder: Path, count: int, body: Callable[[int], int]) -> list[Ended]:
    return Processes(count, body, folder).wait()


def commands(folder: Path, count: int, *lists: list[object]) -> list[Ended]:
    """Commands one after the other in the same processes; every process must end well."""

    def body(rank: int) -> int:
        return max(cli.main(list(map(str, words))) for words in lists)

    ended = run(folder, count, body)
    assert [end.code for end in ended] == [0] * count, [end.errors[-900:] for end in ended]
    assert not any(end.output or end.errors for end in ended[1:]), ended[1:]
    return ended


def without_time(path: Path) -> dict[str, object]:
    """What a file of results holds, without when and how fast it was made."""

    def kept(value: object) -> object:
        if isinstance(value, dict):
            gone = ("created", "seconds", "command")
            return {key: kept(entry) for key, entry in value.items() if key not in gone}
        return [kept(entry) for entry in value] if isinstance(value, list) else value

    return kept(json.loads(path.read_text()))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def made(
    tiny_checkpoint_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """The outputs of the same commands in so many processes."""
    folder = tmp_path_factory.mktemp("ranks")
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 96, (40, 30), generator=generator).tolist()
    text = folder / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{n}" for n in row) for row in numbers))
    model, found = tiny_checkpoint_files, dict[int, Path]()

    def make(count: int) -> Path:
        if count not in found:
            output = found[count] = folder / str(count)
            output.mkdir()
            reads = [model, "--text", text, *SMALL]
            # 19 windows in 7 batches; groups of two windows; skipped tokens kept apart
            score = ["score", *reads, "--num-windows", 19, "--skip-leading", 1, "--groups", 10]
            few = ["score", *reads, "--num-windows", 2]
            until = ["score", *reads, "--num-windows", 5, "--calibrate-until-stable"]
            greedy = ["--criterion", "greedy-perplexity", "--model", model, "--num-layers", 2]
            swept = ["--criterion", "simdiff-masd-swept", "--model", model, "--num-layers", 2]
            scores = output / "scores.json"
            ended = commands(
                folder / f"processes-{count}",
                count,
                [*score, "-o", scores],
                [*few, "-o", output / "few.json"],
                [*until, "--max-windows", 17, "--groups", 6, "-o", output / "until.json"],
                ["plan", scores, *greedy, "--evaluation-windows", 2, "-o", output / "greedy.json"],
                ["plan", scores, *swept, "-o", output / "swept.json"],
                ["plan", scores, "--model", model, "-o", output / "plan.json"],
                ["eval", model, "--text", text, "--window-length", 16, "-o", output / "eval.json"],
            )
            assert ended[0].output.count("Scores: ") == 3
        return found[count]

    return make


@pytest.mark.parametrize("count", [2, 3])
def test_every_number_of_processes_gives_the_same_bits(
    made: Callable[[int], Path], count: int
) -> None:
    one, several = made(1), made(count)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in several.iterdir())
    assert len(names) == 7
    for name in names:
        assert without_time(several / name) == without_time(one / name), name
