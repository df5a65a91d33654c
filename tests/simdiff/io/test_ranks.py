"""Processes that share a job: the same bits as one, the same errors, no output by halves."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

    make = tempfile.mkstemp

    def checked(**options: Any) -> Any:
        assert ranks.writes(), "a process other than the first writes"
        return make(**options)

    def body(rank: int) -> int:
        tempfile.mkstemp = checked  # type: ignore[assignment]
        return next((code for words in lists if (code := cli.main(list(map(str, words))))), 0)

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
                [
                    *("plan", scores, "--model", model, "--effort", "normal", "--num-layers", 2),
                    *("-o", output / "normal.json"),
                ],
                [
                    *score,
                    "--stream",
                    "--offload-folder",
                    output / "states",
                    "-o",
                    output / "streamed.json",
                ],
                [
                    "plan",
                    scores,
                    *greedy,
                    "--stream",
                    "--evaluation-windows",
                    2,
                    "-o",
                    output / "greedy-streamed.json",
                ],
                [
                    "eval",
                    model,
                    "--text",
                    text,
                    "--window-length",
                    16,
                    "--stream",
                    "-o",
                    output / "eval-streamed.json",
                ],
                ["eval", model, "--text", text, "--window-length", 16, "-o", output / "eval.json"],
            )
            assert ended[0].output.count("Scores: ") == 4
        return found[count]

    return make


@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_number_of_processes_gives_the_same_bits(
    made: Callable[[int], Path], count: int
) -> None:
    one, several = made(1), made(count)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in several.iterdir())
    assert len(names) == 11
    for name in names:
        assert without_time(several / name) == without_time(one / name), name


def test_run_and_compare_in_two_processes(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    reads = [tiny_checkpoint, "--text", tiny_text, *SMALL, "--num-windows", 6, "--num-layers", 2]
    criteria = ["--criteria", "simdiff,one-shot-perplexity", "--evaluation-windows", 2]
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        commands(
            tmp_path / f"processes-{count}",
            count,
            ["run", *reads, "--bootstrap", 20, "-o", tmp_path / str(count) / "run"],
            ["compare", *reads, *criteria, "-o", tmp_path / str(count) / "compared"],
            ["prune", tiny_checkpoint, "--remove", 1, "-o", tmp_path / str(count) / "pruned"],
        )
    one, two = tmp_path / "1", tmp_path / "2"
    files = {path.relative_to(one) for path in one.rglob("*")}
    assert files == {path.relative_to(two) for path in two.rglob("*")}
    for name in ("run/scores.json", "run/plan.json", "compared/scores.json"):
        assert without_time(two / name) == without_time(one / name)
    for name in ("run/model/model.safetensors", "pruned/model.safetensors"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    measured = [json.loads((path / "run/results.json").read_text()) for path in (one, two)]
    for model in ("dense", "pruned"):
        assert measured[0][model].pop("speed").keys() == measured[1][model].pop("speed").keys()
        assert measured[0][model] == measured[1][model]
    cells = [json.loads((path / "compared/compare.json").read_text()) for path in (one, two)]
    for found in cells:
        for cell in found["cells"]:
            cell.pop("seconds_to_plan")
    assert cells[0]["cells"] == cells[1]["cells"]


def failing(
    folder: Path, model: Path, text: Path, prepare: Callable[[int], list[object] | None]
) -> list[Ended]:
    """A calibration pass in two processes that must leave nothing; `prepare` spoils one of them."""
    (folder / "out").mkdir()

    def body(rank: int) -> int:
        more = prepare(rank) or ["--num-windows", 6]
        output = ["-o", folder / "out" / "scores.json"]
        words = ["score", model, "--text", text, *SMALL, *more, *output]
        return cli.main(list(map(str, words)))

    start = time.monotonic()
    ended = run(folder / "processes", 2, body)
    assert time.monotonic() - start < 30
    assert not list((folder / "out").iterdir())
    return ended


def test_other_text_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        words = "\n\n".join(" ".join(f"w{k + rank}" for k in range(20)) for _ in range(20))
        (tmp_path / str(rank) / "text.txt").write_text(words)
    ended = failing(
        tmp_path, tiny_checkpoint, Path("text.txt"), lambda rank: os.chdir(tmp_path / str(rank))
    )
    assert [end.code for end in ended] == [2, 2]
    message = "what is scored must be the same in all processes, got other tokens ("
    assert message in ended[0].errors
    assert not ended[1].errors


def test_other_options_and_versions_are_refused(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    ended = failing(tmp_path, tiny_checkpoint, tiny_text, lambda rank: ["--num-windows", 4 + rank])
    assert [end.code for end in ended] == [2, 2]
    assert "got other --num-windows (4 in process 0, 5 in process 1)" in ended[0].errors
    assert not ended[1].errors

    def body(rank: int) -> int:
        ranks._versions = lambda: {"torch": f"2.{rank}"}  # type: ignore[assignment]
        return cli.main(["score", str(tiny_checkpoint), "--text", str(tiny_text), "-o", "x.json"])

    ended = run(tmp_path / "versions", 2, body)
    assert [end.code for end in ended] == [2, 2]
    assert "got other torch (2.0 in process 0, 2.1 in process 1)" in ended[0].errors


@pytest.mark.parametrize("dies", ["killed", "raises"])
def test_a_process_that_dies_ends_all(
    dies: str, tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    def spoil(rank: int) -> None:
        from transformers import LlamaModel

        def forward(*_: object, **__: object) -> None:
            if dies == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("out of memory, say")

        if rank == 1:
            LlamaModel.forward = forward  # type: ignore[method-assign]

    ended = failing(tmp_path, tiny_checkpoint, tiny_text, spoil)
    if dies == "killed":
        assert [end.code for end in ended] == [1, -signal.SIGKILL]
        assert "error: another process has ended" in ended[0].errors
    else:
        assert ended[0].code == 1
        assert ended[1].code != 0
        assert "error: process 1: RuntimeError: out of memory, say" in ended[0].errors
        assert "out of memory, say" in ended[1].errors


def test_errors_of_all_and_of_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ended = failing(tmp_path, tiny_checkpoint, tmp_path / "missing.txt", lambda rank: None)
    assert [end.code for end in ended] == [2, 2]
    assert "missing.txt" in ended[0].errors
    assert not ended[1].errors

    def body(rank: int) -> int:
        def refuse() -> None:
            raise SurgeryError("not this one")

        def odd(item: int) -> int:
            if item == 6:
                raise KeyError(item)
            return 10 * item

        with ranks.processes():
            assert (ranks.rank(), ranks.size(), ranks.local()) == (rank, 3, (rank, 3))
            assert ranks.shared(lambda item: 10 * item, range(7)) == list(range(0, 70, 10))
            assert ranks.shared(lambda item: item, range(1)) == [0]
            assert ranks.first(lambda: os.getpid()) == ranks.gather(os.getpid())[0]
            assert ranks.all_of(lambda: (ranks.rank(), ranks.size())) == [(0, 1)] * 3
            with pytest.raises(SurgeryError, match="not this one"):
                ranks.first(refuse)
            kind = KeyError if rank == 2 else ranks.ElsewhereError
            with pytest.raises(kind, match="6"):
                ranks.shared(odd, range(7))
            with pytest.raises(SimdiffError, match=r"other a\.b \(0 in process 0, 1 in process 1"):
                ranks.agree("they", {"a": {"b": rank, "c": 0}})
            assert ranks.writes() == ranks.prints() == (rank == 0)
            with ranks.alone():
                assert (ranks.writes(), ranks.prints()) == (True, rank == 0)
        return 0

    ended = run(tmp_path / "three", 3, body)
    assert [end.code for end in ended] == [0, 0, 0], ended


def test_one_process_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks.processes():
        assert (ranks.rank(), ranks.size(), ranks.writes(), ranks.local()) == (0, 1, True, (0, 1))
        assert ranks.shared(lambda item: -item, [1, 2]) == [-1, -2]
        assert ranks.part(5) == range(5)
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert ranks.announced() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SimdiffError, match="RANK must be a number below WORLD_SIZE"):
        ranks.announced()
