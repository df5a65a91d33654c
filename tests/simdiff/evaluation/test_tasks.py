"""Tasks through lm_eval on files of this machine: its own figures, an own computation, refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from collections.abc import Iterator
from operator import add, floordiv, mul, sub
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from simdiff.data.demo import demo_model
from simdiff.errors import SimdiffError
from simdiff.evaluation import lm_eval_harness, task_files
from simdiff.evaluation.demo_tasks import CHOOSING, DEMO_TASKS, WRITING
from simdiff.evaluation.quality import Subject, TextChoice, evaluate_models
from simdiff.evaluation.task_files import stock_file, write_task_files
from simdiff.evaluation.tasks import TaskOptions, load_tasks, run_tasks
from simdiff.io import ranks
from simdiff.surgery.layers import layers_removed
from support.processes import Processes

pytest.importorskip("lm_eval")

ITEMS = [
    {
        "goal": f"w{n} w{n + 1}",
        "sol1": f"w{3 * n} w{5 * n}",
        "sol2": f"w{7 * n} w2 w{n}",
        "label": n % 2,
    }
    for n in range(1, 13)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    if not request.node.get_closest_marker("model"):
        monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "piqa").mkdir(parents=True)
    lines = "\n".join(json.dumps(item) for item in ITEMS)
    (folder / "piqa" / "validation.jsonl").write_text(lines)
    (folder / "notes.txt").write_text("not data")
    return folder


def log_likelihood(model: PreTrainedModel, tokenizer: Any, context: str, choice: str) -> float:
    before = tokenizer(context).input_ids
    after = tokenizer(choice).input_ids
    with torch.no_grad():
        log_p = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[len(before) + n - 1, token]) for n, token in enumerate(after))


def test_items_are_judged_as_computed_by_hand(
    tiny_checkpoint: Path, data: Path, capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tiny_checkpoint)
    monkeypatch.setenv("GIT_DIR", str(tiny_checkpoint / "none"))  # git would complain
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    loaded = load_tasks(TaskOptions(("piqa",), data=str(data), limit=10, batch_size=4))
    got = run_tasks(model, tokenizer, loaded)["piqa"]
    assert "git" not in capfd.readouterr().err
    wanted: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    drawn = loaded.drawn()
    assert drawn is not None
    for number in drawn["piqa"]:
        item = ITEMS[number]
        context, choices = f"Question: {item['goal']}\nAnswer:", [item["sol1"], item["sol2"]]
        sums = [log_likelihood(model, tokenizer, context, choice) for choice in choices]
        norms = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        wanted["acc"].append(float(sums[item["label"]] == max(sums)))
        wanted["acc_norm"].append(float(norms[item["label"]] == max(norms)))
    assert got.metric == "acc_norm"
    assert list(got.values) == wanted["acc_norm"]
    for name, values in wanted.items():
        assert got.metrics[name]["value"] == pytest.approx(sum(values) / 10)
    assert 0 < sum(wanted["acc_norm"]) < 10, "the items must be able to tell right from wrong"
    assert got.chance == 0.5
    assert tokenizer.pad_token is None, "the caller's tokenizer is left alone"
    files = loaded.identity()["tasks"]["piqa"]["files"]
    assert [entry["file"] for entry in files] == ["piqa/validation.jsonl"]


def test_one_run_for_dense_and_pruned(tiny_checkpoint: Path, tiny_text: Path, data: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    small = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with layers_removed(small, (2, 3)):
        quality = evaluate_models(
            [
                Subject.given(dense.train(), tokenizer, "dense"),
                Subject.given(small, tokenizer, "small"),
            ],
            text=TextChoice(str(tiny_text), 8, 16, stride=8),
            tasks=TaskOptions(("piqa",), data=str(data)),
        )
    assert dense.training, "the model is left in the mode it was in"
    content = quality.to_dict()
    json.dumps(content, allow_nan=False)
    first, second = content["models"]["dense"], content["models"]["small"]
    assert first["num_parameters"] > second["num_parameters"]
    assert first["tasks"]["piqa"]["items_sha256"] == second["tasks"]["piqa"]["items_sha256"]
    assert first["tasks"]["piqa"]["difference"] == {"value": 0.0, "standard_error": 0.0}
    assert first["averages"]["classification"]["all_tasks"]["retained"] == 1.0
    ratio = second["perplexity"] / first["perplexity"]
    assert second["against_dense"]["ratio"] == pytest.approx(ratio)
    assert second["evaluation"] == first["evaluation"]
    gap = second["tasks"]["piqa"]["value"] - first["tasks"]["piqa"]["value"]
    assert second["tasks"]["piqa"]["difference"]["value"] == pytest.approx(gap)
    assert content["tasks"]["versions"]["lm_eval"] == "0.4.13"
    assert set(content["versions"]) >= {"torch", "transformers"}
    out = [note for note in content["notes"] if note.startswith("left out")]
    at_chance = quality.dense.tasks["piqa"].at_chance
    assert bool(out) is at_chance
    averages = second["averages"]["classification"]
    assert averages["above_chance"]["tasks"] == (() if at_chance else ("piqa",))


def test_other_formats_and_few_shot_examples(tmp_path: Path, tiny_checkpoint: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ITEMS)
    folder = tmp_path / "d"
    (folder / "piqa").mkdir(parents=True)
    rows.to_parquet(folder / "piqa" / "validation.parquet")
    rows.select(range(4)).to_parquet(folder / "piqa" / "train.parquet")
    rows.rename_columns({"goal": "question_stem"}).to_json(folder / "unused.json")
    loaded = load_tasks(TaskOptions(("piqa",), data=str(folder), num_fewshot=2))
    assert loaded.identity()["tasks"]["piqa"]["few_shot_split"] == "train"
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    shots = run_tasks(model, tokenizer, loaded)["piqa"]
    (folder / "piqa" / "train.parquet").unlink()
    (folder / "piqa" / "validation.parquet").rename(folder / "piqa.parquet")
    (folder / "piqa").rmdir()
    none = load_tasks(TaskOptions(("piqa",), data=str(folder)))
    assert len(none.tasks["piqa"].eval_docs) == 12
    assert run_tasks(model, tokenizer, none)["piqa"].items != shots.items


def test_own_task_files(tmp_path: Path, data: Path, tiny_checkpoint: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {data / 'piqa' / 'validation.jsonl'}}}}}\n"
        'doc_to_text: "{{goal}}"\ndoc_to_choice: ["w1", "w2", "w3"]\ndoc_to_target: label\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    options = TaskOptions(("mine", "piqa"), data=str(data), path=own, limit=6)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    loaded = load_tasks(options)
    got = run_tasks(model, AutoTokenizer.from_pretrained(tiny_checkpoint), loaded)
    assert list(got) == ["mine", "piqa"]
    assert got["mine"].chance == pytest.approx(1 / 3)
    drawn = loaded.drawn()
    assert drawn is not None
    ones = sum(ITEMS[number]["label"] for number in drawn["mine"])
    assert got["mine"].constant == max(ones, 6 - ones) / 6
    assert len(got["mine"].values) == 6
    assert drawn["mine"] != drawn["piqa"], "each task has a draw of its own"
    whole = load_tasks(dataclasses.replace(options, limit=10_000)).drawn()
    assert whole == {name: [*range(len(ITEMS))] for name in ("mine", "piqa")}


def test_tasks_by_name_use_the_stock_file() -> None:
    for name, task in DEMO_TASKS.items():
        if task.yaml is not None:
            assert stock_file(name) == task_files.lm_eval_tasks() / task.yaml
    with pytest.raises(SimdiffError, match="'piqa' to be|its data must be at hand"):
        load_tasks(TaskOptions(("piqa",)))  # no hub in the tests


def test_refusals(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*names: str, **options: Any) -> None:
        load_tasks(TaskOptions(names, **{"data": str(data), **options}))

    with pytest.raises(SimdiffError, match=r"'pica' must be one with data .* did you mean piqa\?"):
        load("pica")
    with pytest.raises(SimdiffError, match="there are piqa"):
        load("zzz")
    with pytest.raises(SimdiffError, match="did you mean arc_easy or"):
        load("arc_esy", data="demo")
    with pytest.raises(SimdiffError, match="did you mean hellaswag"):
        load("hellaswagg", data=None)
    with pytest.raises(SimdiffError, match="none.* must be 'demo' or a directory"):
        load("piqa", data=str(tmp_path / "none"))
    with pytest.raises(SimdiffError, match="task path .* must be a directory"):
        load("piqa", path=tmp_path / "none")
    with pytest.raises(SimdiffError, match="at least one name, got none"):
        load()
    with pytest.raises(SimdiffError, match="must be named once"):
        load("piqa", "piqa")
    with pytest.raises(SimdiffError, match="limit must be at least 1, got 0"):
        load("piqa", limit=0)
    (data / "piqa" / "validation.jsonl").rename(data / "piqa" / "train.jsonl")
    with pytest.raises(SimdiffError, match="must have the split validation, got train"):
        load("piqa")
    (data / "piqa" / "validation.parquet").write_bytes(b"not parquet")
    with pytest.raises(SimdiffError, match=r"of one format, got \['json', 'parquet'\]"):
        load("piqa")
    (data / "piqa" / "train.jsonl").unlink()
    with pytest.raises(SimdiffError, match="task 'piqa': its data must be at hand"):
        load("piqa")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name)
    )
    with pytest.raises(SimdiffError, match=r"need the package lm_eval.*simdiff-kernels\[eval\]"):
        load("piqa")


@pytest.mark.model
def test_every_demo_task_has_its_answers() -> None:
    names = (*CHOOSING, "mmlu_virology", *WRITING)
    loaded = load_tasks(TaskOptions(names, data="demo"))
    sizes = {name: len(task.eval_docs) for name, task in loaded.tasks.items()}
    assert sizes["arc_easy"] == 570
    assert sizes["boolq"] == 3270
    assert sizes["winogrande"] == 1267
    assert {name: sizes[name] for name in WRITING} == {
        "arithmetic_easy": 1000,
        "arithmetic_medium": 1000,
        "arithmetic_hard": 1000,
        "common_knowledge": 1037,
        "gsm8k": 1319,
        "jeopardy": 2116,
        "lambada_openai": 5153,
        "nq_open": 3610,
        "squad": 1000,
        "triviaqa": 7993,
    }
    for name in WRITING:
        _check_written_answers(name, loaded.tasks[name])
    for name, task in loaded.tasks.items():
        if name in WRITING:
            continue
        answers = set()
        for doc in list(task.eval_docs)[:60]:
            target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            choices = task.doc_to_choice(doc)
            answer = choices.index(target) if isinstance(target, str) else int(target)
            assert 0 <= answer < len(choices), name
            answers.add(answer)
        assert len(answers) > 1 or name == "sciq", name  # sciq lists the right answer last


def _check_written_answers(name: str, task: Any) -> None:
    """Questions with answers; no item is among its own examples, as lm_eval sees to."""
    assert task.fewshot_cfg.split == task.config.test_split is not None
    for doc in list(task.eval_docs)[:60]:
        question, answer = task.doc_to_text(doc), task.doc_to_target(doc)
        if name not in ("common_knowledge", "lambada_openai"):  # whose text goes on
            assert question.endswith(("Answer:", "A:", "=")), name
        assert answer
        assert isinstance(answer, list) == (name in ("nq_open", "squad", "triviaqa"))
        if name.startswith("arithmetic"):
            one, sign, other, _ = question.removeprefix("Calculate ").split()
            found = {"+": add, "-": sub, "*": mul, "/": floordiv}[sign](int(one), int(other))
            assert int(answer) == found, question


@pytest.mark.model
def test_equals_lm_eval_on_the_demo_model(
    tmp_path: Path, demo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Tasks of docs/figures.md: lm_eval loads the checkpoint and the written task files itself."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    written = ("arithmetic_easy", "triviaqa")
    names = ("arc_easy", "piqa", "sciq", "hellaswag", "winogrande", "openbookqa", *written)
    write_task_files(names, "demo", tmp_path)
    caplog.set_level(logging.ERROR, "lm_eval")
    loaded = load_tasks(TaskOptions(names, data="demo", limit=5, batch_size=4, max_new_tokens=8))
    drawn = loaded.drawn()
    assert drawn is not None
    assert all(len({*items}) == 5 and items == sorted(items) for items in drawn.values())
    assert drawn["hellaswag"][-1] > 5000  # of 10042: not from its start alone
    wanted = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(demo_model()), "dtype": "float32"},
        tasks=list(names),
        batch_size=4,
        device=str(demo[0].device),
        samples=drawn,
        gen_kwargs={"max_gen_toks": 8},
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    got = run_tasks(*demo, loaded)
    assert wanted is not None
    filters = {"arithmetic_easy": "stripped", "triviaqa": "remove_whitespace"}
    for name in names:
        which = filters.get(name, "none")
        one = {"exact_match"} if name in written else {"acc"}
        assert one <= {*got[name].metrics} <= one | {"acc_norm"}
        for metric, value in got[name].metrics.items():
            assert value["value"] == wanted["results"][name][f"{metric},{which}"]
            assert value["standard_error"] == wanted["results"][name][f"{metric}_stderr,{which}"]
        samples = sorted(wanted["samples"][name], key=lambda sample: sample["doc_id"])
        assert list(got[name].values) == [sample[got[name].metric] for sample in samples]


def test_standard_output_is_left_to_results(capsys: pytest.CaptureFixture[str]) -> None:
    with lm_eval_harness.quiet(offline=True):
        print("bootstrapping for stddev: perplexity")
    assert capsys.readouterr().out == ""


def test_a_bar_shows_before_the_first_request_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def track(items: range, description: str) -> Iterator[int]:
        seen.append(description)
        for item in items:
            yield item
            seen.append(f"{item + 1} done")

    monkeypatch.setattr(lm_eval_harness, "track", track)
    hooks: list[Any] = []
    harness = SimpleNamespace(cache_hook=None, set_cache_hook=hooks.append)
    with lm_eval_harness.counted(harness, 3, "answers"):
        assert seen == ["answers"]
        for _ in range(2):
            hooks[-1].add_partial("generate_until", None, None)
        assert seen == ["answers", "1 done", "2 done"]
    assert seen[-1] == "3 done"  # lm_eval did not report it
    assert hooks[-1] is None


def test_processes_share_the_items(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """10 items for three processes, and one item, which one of them takes."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    loaded = [load_tasks(TaskOptions(("piqa",), data=str(data), limit=n)) for n in (10, 1)]

    def body(rank: int) -> int:
        with ranks.processes():
            found = [run_tasks(model, tokenizer, tasks)["piqa"].to_dict() for tasks in loaded]
        print(json.dumps(found))
        return 0

    ended = Processes(3, body, tmp_path / "processes").wait()
    assert [end.code for end in ended] == [0, 0, 0], ended
    wanted = [run_tasks(model, tokenizer, tasks)["piqa"].to_dict() for tasks in loaded]
    for end in ended:
        assert json.loads(end.output) == json.loads(json.dumps(wanted))
