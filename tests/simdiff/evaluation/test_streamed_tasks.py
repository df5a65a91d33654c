"""Tasks on a streamed model: lm_eval's own answers of the whole one, all from one reading of it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation import streamed_tasks
from simdiff.evaluation.streamed_tasks import TaskAnswers, check_tasks, streamed_harness
from simdiff.models.layer_by_layer import LayerByLayer
from simdiff.models.streamed import stream_of
from simdiff.models.sweep import WHOLE, Plan
from simdiff.surgery.layers import layers_removed
from support.commands import simdiff
from support.streams import streamed, whole
from support.weights import of_files

pytest.importorskip("lm_eval")

CUT: Plan = frozenset({1, 4})
# One context for several continuations of a word, an empty one, one beyond the longest input.
PAIRS = [
    *(("w1 w2 w3", f" w{word}") for word in (4, 5, 6)),
    ("w9 w8", " w7 w6 w5"),
    ("", "w3 w4"),
    (" ".join(f"w{word}" for word in range(1, 20)), " w20 w21"),
    ("w11 w12 w13 w14", " w1 w1"),
]
TEXTS = [(" ".join(f"w{3 * word % 97}" for word in range(length)),) for length in (30, 7)]
ASKED = {"loglikelihood": PAIRS, "loglikelihood_rolling": TEXTS}


def answers_of(kind: Any, model: PreTrainedModel, tokenizer: Any) -> dict[str, list[Any]]:
    harness = kind(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=12)
    return {
        name: getattr(harness, name)([SimpleNamespace(args=args) for args in asked])
        for name, asked in ASKED.items()
    }


def test_answers_are_those_of_the_whole_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = whole(tiny_checkpoint)
    # A choice that is the model's own, so that not all greedy flags are alike.
    (greedy,) = model(**tokenizer("w1 w2 w3", return_tensors="pt")).logits[0, -1:].argmax(-1)
    PAIRS[0] = ("w1 w2 w3", f" w{greedy}")
    wanted = {WHOLE: answers_of(HFLM, model, tokenizer)}
    with layers_removed(model, CUT):
        wanted[CUT] = answers_of(HFLM, model, tokenizer)
    assert {True, False} == {flag for _, flag in wanted[WHOLE]["loglikelihood"]}

    def found(plan: Plan, answers: TaskAnswers, **options: Any) -> tuple[dict[str, list[Any]], int]:
        model = streamed(tiny_checkpoint, **options)
        stream = stream_of(model)
        assert stream is not None
        before = stream.bytes_read
        got = answers_of(
            lambda **given: streamed_harness(HFLM, model, answers, plan)(**given), model, tokenizer
        )
        return got, stream.bytes_read - before

    stream = stream_of(streamed(tiny_checkpoint))
    assert stream is not None
    once = sum(map(stream.num_bytes, range(stream.head + 1)))
    folder, answers = tmp_path / "states", TaskAnswers([WHOLE, CUT])
    assert found(WHOLE, answers, memory=0, folder=folder) == (wanted[WHOLE], 2 * once)
    assert found(CUT, answers) == (wanted[CUT], 0)  # the pass before answered for both
    # In a new process what the passes left in the folder answers.
    assert found(CUT, TaskAnswers([WHOLE, CUT]), folder=folder) == (wanted[CUT], 0)
    assert not [*folder.glob("*/*-*.states")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    items = [
        {"goal": f"w{n}", "sol1": f"w{3 * n} w{5 * n}", "sol2": f"w{7 * n}", "label": n % 2}
        for n in range(1, 13)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "piqa.jsonl").write_text("\n".join(map(json.dumps, items)))
    return tmp_path / "data"


def test_the_command_goes_on_where_it_was_killed(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    output = tmp_path / "eval.json"
    given = ("eval", tiny_checkpoint, "--remove", "1,4", "--tasks", "piqa", "--task-data", data)
    assert simdiff(*given, "-o", output, "--no-stream") == 0
    wanted = json.loads(output.read_text())
    output.unlink()
    streaming = (*given, "-o", output, "--stream", "--stream-memory", "1KB")
    step, calls = LayerByLayer.step, []

    def interrupted(self: LayerByLayer, *arguments: Any) -> Any:
        calls.append(arguments[2])
        if len(calls) == 14:  # of 3 batches in layer 0, 3 in layer 1, then 6 in each
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(LayerByLayer, "step", interrupted)
    assert simdiff(*streaming) == 130
    assert calls[-1] == 3
    with monkeypatch.context() as patch:  # between the layers and the end
        patch.setattr(streamed_tasks, "track", partial(_raising, KeyboardInterrupt))
        assert simdiff(*streaming) == 130
    assert calls[14:] == [3] * 6 + [4] * 3 + [5] * 6
    assert simdiff(*streaming) == 0
    assert len(calls) == 14 + 15
    found = json.loads(output.read_text())
    assert of_files(found["models"]) == of_files(wanted["models"])
    assert "24 requests (loglikelihood) in 3 batches" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "states" in path.name]


def _raising(error: type[BaseException], *_: object) -> Any:
    raise error


def test_what_generates_is_refused(tiny_checkpoint: Path) -> None:
    def tasks(kind: str) -> Any:
        return SimpleNamespace(tasks={"it": SimpleNamespace(OUTPUT_TYPE=kind)})

    model = streamed(tiny_checkpoint)
    with pytest.raises(SimdiffError, match="task it lets the model generate, got a streamed"):
        check_tasks(model, tasks("generate_until"))
    check_tasks(model, tasks("multiple_choice"))
    check_tasks(whole(tiny_checkpoint), tasks("generate_until"))
