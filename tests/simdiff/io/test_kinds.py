"""What an earlier output is: known by its content, replaced by its own kind alone."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from simdiff.errors import SimdiffError
from simdiff.io.json_files import header, write_json
from simdiff.io.kinds import FIGURE_MARK, GENERATOR, Kind, check_replaceable, kind_of
from simdiff.io.outputs import check_not_input, new_directory, new_file, write_new
from simdiff.planning.export import export_plan
from simdiff.planning.plan import PruningPlan
from support.gguf_models import write_gguf
from support.plans import plan_for


def outputs(folder: Path) -> dict[Kind, Path]:
    """One of every kind."""
    files = {kind: folder / kind.name for kind in Kind}
    for kind, schema in (
        (Kind.SCORES, "simdiff.scores"),
        (Kind.EVALUATION, "simdiff.evaluation"),
        (Kind.BENCH, "simdiff.bench"),
    ):
        write_json(files[kind], header(schema))
    plan = plan_for(6, (1, 2))
    plan.save(files[Kind.PLAN])
    files[Kind.PAGE].write_text(f"<!doctype html><head>{GENERATOR}</head>")
    files[Kind.MERGEKIT].write_text(export_plan(plan, "mergekit", "org/model"))
    files[Kind.LAYERS].write_text(export_plan(plan, "llama.cpp"))
    files[Kind.TRACE] = folder / "trace.json.gz"
    files[Kind.TRACE].write_bytes(gzip.compress(b'{"schema": "simdiff.trace", "traceEvents": []}'))
    files[Kind.FIGURE].write_text(f"<?xml version='1.0'?>\n<svg data-generator='{FIGURE_MARK}'/>\n")
    source = write_gguf(folder / "dense.gguf")
    from simdiff.checkpoints.gguf.cut import prune_gguf

    prune_gguf(source, plan, files[Kind.GGUF])
    for kind, name, schema in (
        (Kind.MODEL, "config.json", None),
        (Kind.RUN, "results.json", "simdiff.results"),
        (Kind.COMPARISON, "compare.json", "simdiff.comparison"),
        (Kind.REPRODUCTION, "reproduction.json", "simdiff.reproduction"),
    ):
        files[kind].mkdir()
        if kind in (Kind.MODEL, Kind.RUN):
            plan.save(files[kind] / "plan.json")
        write_json(files[kind] / name, {} if schema is None else header(schema))
    return files


def test_each_kind_replaces_itself_alone(tmp_path: Path) -> None:
    files = outputs(tmp_path)
    for kind, path in files.items():
        assert kind_of(path) is kind
        for wanted in Kind:
            if wanted is kind:
                check_replaceable(path, wanted)
            else:
                with pytest.raises(SimdiffError, match="is not overwritten"):
                    check_replaceable(path, wanted)


@pytest.mark.parametrize(
    "content",
    [
        b"precious words",
        b'{"removed": [2, 3]}',
        b'{"my": 1, "schema": "simdiff.plan"}',
        b"2,3,8-10\n",
        b"GGUF\x03\x00\x00\x00",
        b"<!doctype html><title>mine</title>",
    ],
)
def test_what_is_a_users_own_is_not_replaced(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_bytes(content)
    for kind in Kind:
        with pytest.raises(SimdiffError, match="is nothing that simdiff wrote"):
            check_replaceable(path, kind)
    path.write_bytes(b"")
    check_replaceable(path, Kind.SCORES)  # nothing is lost


def test_a_file_in_a_run_that_no_command_writes_there_is_not_lost(tmp_path: Path) -> None:
    files = outputs(tmp_path)
    for kind in (Kind.RUN, Kind.COMPARISON):
        (files[kind] / "notes.md").write_text("precious")
        with pytest.raises(SimdiffError, match=r"did not write there \(notes\.md\)"):
            check_replaceable(files[kind], kind)


def test_a_users_own_file_in_a_directory_is_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record of a directory lists what was written into it."""
    plan = plan_for(6, (1, 2))

    def write(path: Path, kind: Kind, record: str, overwrite: bool = True) -> None:
        with new_directory(path, overwrite, kind) as scratch:
            (scratch / "model").mkdir()
            (scratch / "model" / "weights").touch()
            if record == "plan.json":
                plan.save(scratch / record)
            if kind is Kind.RUN:
                write_json(scratch / "results.json", header("simdiff.results"))
            if kind is Kind.COMPARISON:
                write_json(scratch / record, header("simdiff.comparison"))

    for kind, record in (
        (Kind.MODEL, "plan.json"),
        (Kind.RUN, "plan.json"),
        (Kind.COMPARISON, "compare.json"),
    ):
        path = tmp_path / kind.name
        write(path, kind, record, overwrite=False)
        write(path, kind, record)
        assert {record, "model/weights"} <= set(json.loads((path / record).read_text())["files"])
        for own in ("notes.md", "model/a thought.txt", "model/deep/down"):
            (path / own).parent.mkdir(exist_ok=True)
            (path / own).write_text("precious")
            with pytest.raises(SimdiffError, match=rf"did not write there \({own}\).*elsewhere"):
                write(path, kind, record)
            (path / own).unlink()
        write(path, kind, record)
    assert PruningPlan.load(tmp_path / "MODEL" / "plan.json") == plan
    assert "no list" not in capsys.readouterr().err
    older = tmp_path / "MODEL"
    plan.save(older / "plan.json")  # as earlier versions did
    (older / "notes.md").write_text("lost")
    write(older, Kind.MODEL, "plan.json")
    told = " ".join(capsys.readouterr().err.split())
    assert told.count(f"{older} holds no list of its files") == 1
    assert not (older / "notes.md").exists()


def test_the_second_to_finish_does_not_replace_the_first(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"

    def second() -> None:
        with new_file(path) as scratch:
            scratch.write_text("second")
            path.write_text("first")

    with pytest.raises(SimdiffError, match=r"must not exist yet.*is kept as .*scores-2\.json"):
        second()
    assert path.read_text() == "first"
    assert (tmp_path / "scores-2.json").read_text() == "second"

    def over_a_users_own(path: Path) -> None:
        with new_file(path, True, Kind.PLAN) as scratch:
            scratch.write_text("second")
            path.write_text("precious")

    with pytest.raises(SimdiffError, match=r"is nothing that simdiff wrote.* kept as .*a-2\.json"):
        over_a_users_own(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "precious"
    with pytest.raises(SimdiffError, match=r"is kept as .*out-2"):
        directory_of_two(tmp_path / "out")
    assert (tmp_path / "out-2" / "second").exists()
    with pytest.raises(SimdiffError, match=r"is nothing that simdiff wrote.* kept as .*-3\.json"):
        write_new(path, b"third", True, Kind.PLAN)  # finished, so as good as the second
    assert (tmp_path / "scores-3.json").read_bytes() == b"third"
    with (
        pytest.raises(SimdiffError, match=r"must not exist yet.* kept as .*out-3"),
        new_directory(tmp_path / "out", finished=True) as scratch,
    ):
        (scratch / "third").write_text("third")
    assert (tmp_path / "out-3" / "third").exists()
    found = sorted(entry.name for entry in tmp_path.iterdir())
    scores = ["scores-2.json", "scores-3.json", "scores.json"]
    assert found == ["a-2.json", "a.json", "out", "out-2", "out-3", *scores]


def directory_of_two(path: Path) -> None:
    with new_directory(path) as scratch:
        (scratch / "second").touch()
        path.mkdir()


def test_inputs_are_not_replaced(tmp_path: Path) -> None:
    inside = tmp_path / "out" / "plan.json"
    inside.parent.mkdir()
    inside.write_text("{}")
    (tmp_path / "link").symlink_to(inside)
    check_not_input(tmp_path / "new", [inside])
    check_not_input(inside, [tmp_path / "other", inside.parent])
    with pytest.raises(SimdiffError, match="must not be the input itself"):
        check_not_input(inside, [tmp_path / "link"])
    with pytest.raises(SimdiffError, match=r"must not contain the input .*link"):
        check_not_input(inside.parent, [tmp_path / "link"])


def test_modes_are_the_usual_ones(tmp_path: Path) -> None:
    """Whatever a library makes private, by the umask of the process."""
    before = os.umask(0o027)
    try:
        with new_directory(tmp_path / "model") as scratch:
            (scratch / "inner").mkdir(mode=0o700)
            for name in ("weights", "inner/more"):
                (scratch / name).touch(mode=0o600)
        write_new(tmp_path / "plan.json", json.dumps({}).encode(), False, Kind.PLAN)
    finally:
        os.umask(before)
    found = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert found == {
        "model": "0o750",
        "inner": "0o750",
        "weights": "0o640",
        "more": "0o640",
        "plan.json": "0o640",
    }
