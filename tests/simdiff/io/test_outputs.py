"""Outputs appear whole or not at all: killed anywhere, on a full disk, without permission."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from simdiff.checkpoints import cut as checkpoint
from simdiff.checkpoints.cut import CheckpointCut, cut_checkpoint, write_cut
from simdiff.errors import SimdiffError
from simdiff.io.kinds import Kind
from simdiff.io.outputs import new_directory, remove_leftovers, write_bytes
from support.checkpoints import content, plan_for, save_model
from support.commands import simdiff

Make = Callable[[], None]


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return save_model("llama", tmp_path / "dense")


@pytest.fixture
def cut(model: PreTrainedModel, tmp_path: Path) -> CheckpointCut:
    return cut_checkpoint(tmp_path / "dense", plan_for(model), max_shard_size="20KB")


def write(cut: CheckpointCut, target: Path, overwrite: bool = False) -> None:
    with new_directory(target, overwrite, Kind.MODEL) as scratch:
        write_cut(cut, scratch)


def in_a_child(work: Make, kill_after: float | None = None) -> int:
    """Run in a forked process, killed after some seconds; returns its wait status."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs ends too
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def killed_at_call(work: Make, call: int) -> int:
    """Run in a forked process that kills itself at its n-th call of anything, Python's or C's."""

    def counted() -> None:
        left = call

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal left
            left -= event in ("call", "c_call")
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        work()

    return in_a_child(counted)


def count_calls(work: Make) -> int:
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def partial_models(folder: Path, whole: dict[str, bytes]) -> list[Path]:
    """Directories that a loader would take for a model although they are not the whole one."""
    return [
        path.parent
        for path in folder.rglob("config.json")
        if path.parent.name not in ("dense", "whole", "small") and content(path.parent) != whole
    ]


def test_killed_at_any_call(cut: CheckpointCut, tmp_path: Path) -> None:
    """Thirty calls out of all, drawn anew in every run of the tests."""
    write(cut, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    target = tmp_path / "small"
    calls = count_calls(lambda: write(cut, tmp_path / "counted"))
    assert calls > 1000
    chance = random.Random()
    seen = {"absent": 0, "whole": 0, "leftovers": 0}
    for _ in range(30):
        call = chance.randrange(1, calls)
        status = killed_at_call(lambda: write(cut, target), call)
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, f"call {call}"
        leftovers = list(tmp_path.glob(".small.*"))
        seen["leftovers"] += bool(leftovers)
        assert partial_models(tmp_path, whole) == [], f"call {call}"
        if target.exists():
            seen["whole"] += 1
            assert content(target) == whole, f"call {call}"
            for path in target.iterdir():
                path.unlink()
            target.rmdir()
        else:
            seen["absent"] += 1
    assert seen["absent"] > 15, seen
    assert seen["leftovers"] > 0, seen
    write(cut, target)  # the next run for the same output clears up
    assert content(target) == whole
    assert list(tmp_path.glob(".small.*")) == []


def test_killed_at_any_time_while_it_replaces_an_earlier_output(
    model: PreTrainedModel, cut: CheckpointCut, tmp_path: Path
) -> None:
    """At the name there is always one of the two, whole."""
    other = cut_checkpoint(tmp_path / "dense", plan_for(model, (0, 2, 3)), max_shard_size="20KB")
    target = tmp_path / "small"
    start = time.monotonic()
    write(other, tmp_path / "whole")
    seconds = time.monotonic() - start
    write(cut, target)
    versions = [content(tmp_path / "whole"), content(target)]
    chance = random.Random()
    killed = 0
    for trial in range(24):
        work = (cut, other)[trial % 2]
        status = in_a_child(
            lambda work=work: write(work, target, overwrite=True), chance.uniform(0, 1.5 * seconds)
        )
        killed += os.WIFSIGNALED(status)
        assert content(target) in versions
        assert [p for p in partial_models(tmp_path, versions[0]) if content(p) != versions[1]] == []
    assert killed > 5
    write(cut, target, overwrite=True)
    assert content(target) == versions[1]
    assert list(tmp_path.glob(".small.*")) == []


def test_a_killed_command_leaves_nothing_that_loads(model: PreTrainedModel, tmp_path: Path) -> None:
    """The real command, stopped and then killed while it writes one shard for every tensor."""
    plan_for(model).save(tmp_path / "plan.json")
    options = [
        "prune",
        tmp_path / "dense",
        "--plan",
        tmp_path / "plan.json",
        "-o",
        tmp_path / "small",
    ]
    command = [sys.executable, "-m", "simdiff.cli", *map(str, options), "--max-shard-size", "1KB"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".small.partial-*/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    try:
        (scratch,) = tmp_path.glob(".small.partial-*")
        assert not (tmp_path / "small").exists()
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            AutoModelForCausalLM.from_pretrained(scratch)
        assert remove_leftovers(tmp_path / "small") == [], "it is in use: not a leftover"
    finally:
        process.kill()
        process.wait()
    assert simdiff(*options) == 0
    assert list(tmp_path.glob(".small.*")) == []
    AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_running_job_keeps_its_directory(cut: CheckpointCut, tmp_path: Path) -> None:
    with new_directory(tmp_path / "small") as first:
        (first / "half").write_text("")
        with new_directory(tmp_path / "small") as second:
            assert first != second
            assert (first / "half").exists()
            write_cut(cut, second)
        with pytest.raises(SimdiffError, match="must not exist yet"):
            raise_on_exit(tmp_path / "small")
        assert (first / "half").exists()
        (tmp_path / "small").rename(tmp_path / "moved")
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["half"]


def raise_on_exit(path: Path) -> None:
    with new_directory(path):
        pass


def test_a_file_that_grows_too_large(cut: CheckpointCut, tmp_path: Path) -> None:
    """RLIMIT_FSIZE, which the kernel enforces, half way through a shard."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
        with pytest.raises(SimdiffError, match="file would be larger than allowed"):
            write(cut, tmp_path / "small")

    assert in_a_child(work) == 0
    assert list(tmp_path.glob("*small*")) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(cut: CheckpointCut, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(7_000_000))
    wanted = rf"disk of {small_disk} must have [\d,]+ bytes free .* got [\d,]+: free 0\.0[1-9] GB"
    with pytest.raises(SimdiffError, match=wanted):
        write(cut, small_disk / "small")
    assert list(small_disk.iterdir()) == [filler]
    room = os.statvfs(small_disk)
    filler.write_bytes(bytes(7_000_000 + room.f_bavail * room.f_frsize - 60_000))
    # As if another program had taken the space after it was checked.
    monkeypatch.setattr(checkpoint, "check_space", lambda directory, num_bytes: None)
    with pytest.raises(SimdiffError, match="the disk is full, while model-0000.*make room"):
        write(cut, small_disk / "small")
    assert list(small_disk.iterdir()) == [filler]
    with pytest.raises(SimdiffError, match="figure.svg: cannot be written: No space left"):
        write_bytes(small_disk / "figure.svg", bytes(1_000_000))
    assert list(small_disk.iterdir()) == [filler]


def test_no_permission(cut: CheckpointCut, tmp_path: Path) -> None:
    target = tmp_path / "locked"
    target.mkdir(mode=0o555)

    def work() -> None:
        if os.geteuid() == 0:
            for folder in (tmp_path, *tmp_path.parents):
                if folder.is_relative_to(tempfile.gettempdir()) and folder.stat().st_uid == 0:
                    folder.chmod(folder.stat().st_mode | 0o755)
            os.seteuid(65534)
        with pytest.raises(SimdiffError, match=r"must be writable, .*locked is not.*permissions"):
            write(cut, target / "small")

    assert in_a_child(work) == 0


def test_outputs_that_overlap_the_input(model: PreTrainedModel, tmp_path: Path, capsys) -> None:
    dense, plan = tmp_path / "dense", tmp_path / "plan.json"
    plan_for(model).save(plan)
    plan_for(model).save(dense / "plan.json")  # so that only the overlap speaks against it
    plan_for(model).save(tmp_path.parent / "plan.json")
    (tmp_path / "link").symlink_to(dense)
    (tmp_path / "alias").symlink_to(tmp_path)
    before = content(tmp_path)
    for output, wanted in (
        (dense, "must not be the input itself"),
        (tmp_path / "alias" / "dense", "must not be the input itself"),
        (dense / "small", "must not lie inside the input"),
        (tmp_path / "link" / "small", "must not lie inside the input"),
        (tmp_path, "must not contain the input"),
        (tmp_path / "link", "must not be the input itself"),
        (tmp_path / "none" / "small", "its parent directory must exist"),
        (tmp_path / "plan.json", "must not exist yet"),
    ):
        overwrite = ["--overwrite"] if wanted != "must not exist yet" else []
        assert simdiff("prune", dense, "--plan", plan, "-o", output, *overwrite) == 2
        assert wanted in capsys.readouterr().err
        assert content(tmp_path) == before


def test_an_output_that_holds_what_the_input_links_to(
    model: PreTrainedModel, tmp_path: Path, capsys
) -> None:
    dense, blobs = tmp_path / "dense", tmp_path / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    plan_for(model).save(blobs / "plan.json")
    plan_for(model).save(plan := tmp_path / "plan.json")
    for path in list(dense.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    arguments = ("prune", dense, "--plan", plan, "--overwrite", "-o")
    assert simdiff(*arguments, blobs) == 2
    assert "which" in (message := capsys.readouterr().err)
    assert "links to" in message
    assert simdiff(*arguments, tmp_path / "small") == 0
    assert not any(path.is_symlink() for path in (tmp_path / "small").iterdir())
