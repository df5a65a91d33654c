"""A table of the paper on a tiny model: its rows, its files, and going on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from simdiff.data.text_options import TextOptions
from simdiff.errors import SimdiffError
from simdiff.evaluation.tasks import TaskOptions
from simdiff.io.kinds import Kind, kind_of
from simdiff.jobs import reproduce as job
from simdiff.jobs.published import TABLES
from simdiff.jobs.reproduce import ReproductionOptions, reproduce
from simdiff.planning.plan import PruningPlan

TABLE = "paper-table-1"


def test_rows_files_and_going_on(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "cache"))
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    items = [
        {"goal": f"w{n}", "sol1": f"w{2 * n}", "sol2": f"w{n + 40} w1", "label": n % 2}
        for n in range(1, 9)
    ]
    (data / "piqa.jsonl").write_text("\n".join(map(json.dumps, items)))
    name = str(tiny_checkpoint)

    def options(windows: int = 2, seconds: float = 0) -> ReproductionOptions:
        tasks = TaskOptions(("piqa",), data=str(data), limit=6)
        text = TextOptions(str(tiny_text), 6, 16)
        return ReproductionOptions(TABLE, text, tasks, None, windows, seconds)

    with pytest.raises(SimdiffError, match=r"names that differ .* got .*tiny, .*, whose results"):
        reproduce([name, f"{name}/"], out, options())
    with monkeypatch.context() as broken:
        broken.setattr(job, "bench", lambda *of, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reproduce([name], out, options(seconds=0.001))
    assert not out.exists()
    with pytest.raises(SimdiffError, match=r"differs in options\.evaluation_windows"):
        reproduce([name], out, options(3))
    for step in ("run_comparison", "evaluate_models"):  # they were finished
        monkeypatch.setattr(job, step, lambda *of, **more: 1 / 0)
    content = reproduce([name], out, options())

    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    assert kind_of(out) is Kind.REPRODUCTION
    assert json.loads((out / "reproduction.json").read_text())["models"] == json.loads(
        json.dumps(content["models"])
    )
    (part,) = (out / "models").iterdir()
    compared = json.loads((part / "comparison" / "compare.json").read_text())
    evaluated = json.loads((part / "evaluation.json").read_text())["models"]
    assert "<h2>Quality</h2>" in (part / "report.html").read_text()
    found = content["models"][name]
    assert (found["num_layers"], found["num_removed"], found["speed"]) == (6, 1, None)
    assert list(found["rows"]) == list(TABLES[TABLE].criteria)
    assert found["dense"]["perplexity"] == compared["dense"]["perplexity"]
    assert found["dense"]["averages"] == evaluated[name]["averages"]
    for cell in compared["cells"]:
        row = found["rows"][cell["criterion"]]
        assert (row["removed"], row["quality"]) == (cell["removed"], cell["quality"])
        cut = evaluated[f"{name} without {cell['removed'][0]}"]
        assert row["averages"] == cut["averages"]
        assert cut["num_parameters"] < evaluated[name]["num_parameters"]
    written = (out / "reproduction.md").read_text()
    retained = found["rows"]["block-influence"]["averages"]["classification"]["all_tasks"]
    line = next(row for row in written.splitlines() if "| block-influence |" in row)
    assert f"| {100 * retained['retained']:.1f} ± " in line
    assert "| 88.5 | 87.7 |" in line
    assert "lm_eval does not have CMNLI" in written


def test_speed_is_measured_by_the_protocol_of_the_paper(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def bench(dense: Any, pruned: Any, protocol: Any, **told: Any) -> dict[str, Any]:
        seen.update(told, protocol=protocol, layers=pruned.config.num_hidden_layers)
        return seen

    monkeypatch.setattr(job, "bench", bench)
    llama.config.max_position_embeddings = 300
    job._speed("tiny", llama, PruningPlan((1, 3)), 5.0)
    used = seen["protocol"]
    assert (used.batch_sizes, used.prompt_lengths, used.new_tokens) == ((16,), (4,), 296)
    assert used.max_seconds == 5
    assert (seen["layers"], seen["names"]) == (4, ("tiny", "tiny without 1, 3"))
