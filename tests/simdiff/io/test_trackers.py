"""What trackers are told; stand-ins take the arguments that the libraries take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simdiff.errors import Note, SimdiffError
from simdiff.io.trackers import TRACKERS, Log, Tracker, tracked

Told = list[tuple[Any, ...]]


def _trackio(told: Told) -> SimpleNamespace:
    """As in trackio 0.43."""

    def init(project: str, name: str | None = None, config: dict | None = None) -> None:
        print("* Trackio project initialized")
        told.append(("start", project, name, config))

    def log(metrics: dict, step: int | None = None) -> None:
        told.append(("log", metrics, step))

    def log_artifact(
        artifact_or_path: str, name: str | None = None, type: str | None = None
    ) -> None:
        told.append(("file", artifact_or_path))

    def table(columns: list | None = None, data: list | None = None) -> list:
        return [columns, *(data or [])]

    return SimpleNamespace(
        init=init,
        log=log,
        log_artifact=log_artifact,
        Table=table,
        finish=lambda: told.append(("end",)) or print("* Run finished"),
    )


def _wandb(told: Told) -> SimpleNamespace:
    """As in wandb 0.31: `init` gives the run."""

    class Run:
        def log(self, data: dict, step: int | None = None, commit: bool | None = None) -> None:
            told.append(("log", data, step))

        def log_artifact(
            self, artifact_or_path: str, name: str | None = None, type: str | None = None
        ) -> None:
            assert name is not None
            assert set(name) <= set("abcdefghijklmnopqrstuvwxyz.-_")
            told.append(("file", artifact_or_path))

        def finish(self, exit_code: int | None = None) -> None:
            told.append(("end", exit_code))

    def init(
        entity: str | None = None,
        project: str | None = None,
        dir: str | None = None,
        name: str | None = None,
        config: dict | None = None,
    ) -> Run:
        told.append(("start", project, name, config))
        return Run()

    def table(columns: list | None = None, data: list | None = None) -> list:
        return [columns, *(data or [])]

    return SimpleNamespace(init=init, Table=table)


def _mlflow(told: Told) -> SimpleNamespace:
    """As in mlflow 3."""

    def start_run(run_id: str | None = None, run_name: str | None = None) -> None:
        told.append(("start", run_name))

    def log_metrics(metrics: dict[str, float], step: int | None = None) -> None:
        told.append(("log", metrics, step))

    def log_text(text: str, artifact_file: str) -> None:
        told.append(("text", text, artifact_file))

    return SimpleNamespace(
        set_experiment=lambda name: told.append(("project", name)),
        start_run=start_run,
        log_params=lambda params: told.append(("params", params)),
        log_metrics=log_metrics,
        log_text=log_text,
        log_artifact=lambda local_path, artifact_path=None: told.append(("file", local_path)),
        end_run=lambda status="FINISHED": told.append(("end", status)),
    )


STAND_INS: dict[str, Callable[[Told], SimpleNamespace]] = {
    "trackio": _trackio,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told: Told = []
    for name, make in STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, make(told))
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return told


def tell_everything(log: Log, page: Path) -> None:
    log.metrics({"loss": 2.5, "bad": float("nan"), "word": "x"}, step=3)
    log.metrics({"nothing": None})
    log.table("plan", ("order", "layer"), [(1, 7)])
    log.file(page)
    log.file(page.with_name("absent"))


@pytest.mark.parametrize("name", STAND_INS)
def test_each_of_them_is_told(
    name: str, told: Told, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    page.write_text("page")
    with tracked([name, name], tmp_path / "out", {"ratio": 0.25}) as log:
        tell_everything(log, page)
    assert next(entry for entry in told if entry[0] == "log") == ("log", {"loss": 2.5}, 3)
    assert ("file", str(page)) in told
    assert capsys.readouterr().out == "", "libraries speak of themselves elsewhere"
    if name == "mlflow":
        assert told[:3] == [("project", "simdiff"), ("start", "out"), ("params", {"ratio": "0.25"})]
        assert ("text", "order,layer\n1,7\n", "plan.csv") in told
        assert told[-1] == ("end", "FINISHED")
    else:
        assert told[0] == ("start", "simdiff", "out", {"ratio": 0.25})
        assert told[2][1] == {"plan": [["order", "layer"], [1, 7]]}
        assert told[-1] == (("end",) if name == "trackio" else ("end", 0))
    assert len(told) == (7 if name == "mlflow" else 5)


def test_files_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    page = tmp_path / "report.html"
    page.write_text("page")
    with tracked(["tensorboard"], tmp_path / "out", {"ratio": 0.25}) as log:
        tell_everything(log, page)
    found = EventAccumulator(str(tmp_path / "out.tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(3, 2.5)]
    (text,) = found.Tensors("plan/text_summary")
    assert text.tensor_proto.string_val[0] == b"| order | layer |\n| --- | --- |\n| 1 | 7 |"


def test_nothing_is_started_unasked(told: Told, tmp_path: Path) -> None:
    with tracked([], tmp_path, {}) as log:
        tell_everything(log, tmp_path)
    assert told == []


def test_a_run_that_failed_ends_as_failed(told: Told, tmp_path: Path) -> None:
    def fail() -> None:
        with tracked(["wandb", "mlflow"], tmp_path, {}):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert told[-2:] == [("end", 1), ("end", "FAILED")]


def test_a_tracker_that_fails_on_its_way_does_not_end_the_run(told: Told, tmp_path: Path) -> None:
    calls: list[object] = []

    def gone(*_: object) -> None:
        calls.append(_)
        raise OSError("no route\nto host.")

    broken = Tracker(metrics=gone, table=gone, file=gone, close=gone)
    whole = Tracker(
        metrics=lambda values, step: told.append((values, step)),
        table=gone,
        file=gone,
        close=lambda failed: told.append(("end", failed)),
    )
    log = Log({"wandb": broken, "mlflow": whole})
    with pytest.warns(Note, match="wandb takes nothing more: no route to host$"):
        log.metrics({"a": 1}, 1)
    log.metrics({"a": 2}, 2)
    log.close(False)
    assert told == [({"a": 1}, 1), ({"a": 2}, 2), ("end", False)]
    assert len(calls) == 1


def test_what_is_missing_is_told(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*names: str) -> None:
        with tracked(names, tmp_path, {}):
            pass

    with pytest.raises(SimdiffError, match="log=... must be of trackio, .*got 'neptune'"):
        start("neptune")

    def no_key(**_: object) -> None:
        raise RuntimeError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_key)
    with pytest.raises(SimdiffError, match="api_key not configured .*`wandb login`"):
        start("mlflow", "wandb")
    assert told[-1] == ("end", "FAILED")
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, "tensorboard" if name == "tensorboard" else name, None)
        if name == "tensorboard":
            monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(SimdiffError, match=rf'pip install "simdiff-kernels\[{name}\]"'):
            start(name)
