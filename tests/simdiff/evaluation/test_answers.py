"""Answers that a model writes, against a greedy loop of our own: lengths, examples, template."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.answers import answer_length, bounded
from simdiff.evaluation.quality import Subject, evaluate_models
from simdiff.evaluation.task_scores import GENERATION
from simdiff.evaluation.tasks import TaskOptions, load_tasks, run_tasks

STOP = "w50"
# The last word, on which the answer of a tiny model depends, tells the number of messages.
TEMPLATE = "{{ messages[-1].content }} w{{ messages|length }}"
QUESTIONS = [" ".join(f"w{3 * n + k}" for k in range(1 + n % 4)) for n in range(1, 13)]


def greedy(model: PreTrainedModel, tokenizer: Any, prompt: str, most: int) -> str:
    """One item at a time, without padding and without a cache."""
    read, written = tokenizer(prompt).input_ids, list[int]()
    while len(written) < most and tokenizer.eos_token_id not in written:
        with torch.no_grad():
            written.append(int(model(torch.tensor([read + written])).logits[0, -1].argmax()))
    text = tokenizer.decode(written, skip_special_tokens=True)
    return str(text.partition(STOP)[0].strip())


def write_task(folder: Path, name: str, answers: list[str], shots: int = 0) -> None:
    """A task of which the model must get every other item right."""
    items = [
        {"question": question, "answer": answer if n % 2 else f"not {answer}"}
        for n, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]
    data = folder / f"{name}.json"
    data.write_text("\n".join(map(json.dumps, items)))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\noutput_type: generate_until\n"
        f"test_split: test\nfewshot_split: test\nnum_fewshot: {shots}\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        f"generation_kwargs: {{until: [{STOP}], max_new_tokens: 9}}\n"
        "filter_list: [{name: a, filter: "
        "[{function: remove_whitespace}, {function: take_first}]}]\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )


def test_answers_are_those_of_a_greedy_loop(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    asked = {  # the words behind a question, and the most tokens of its answer
        "plain": ("", 9),
        "alone": (" w1", 4),  # one message
        "shown": (" w5", 4),  # two examples as turns of the conversation, and the question
    }
    answers = {
        name: [greedy(model, tokenizer, question + words, most) for question in QUESTIONS]
        for name, (words, most) in asked.items()
    }
    assert len({*map(tuple, answers.values())}) == 3, "the answers must tell how it was asked"
    for name, of in answers.items():
        write_task(tmp_path, name, of, shots=2 if name == "shown" else 0)
    every_other = [float(n % 2) for n in range(len(QUESTIONS))]

    plain = load_tasks(TaskOptions(("plain",), path=tmp_path, batch_size=5))
    found = run_tasks(model, tokenizer, plain)["plain"]
    assert (found.kind, found.metric, found.chance) == (GENERATION, "exact_match", 0)
    assert list(found.values) == every_other
    assert plain.identity()["chat_template"] is False
    assert plain.identity()["tasks"]["plain"]["max_new_tokens"] == 9

    chat = TaskOptions(
        ("alone", "shown"), path=tmp_path, batch_size=5, chat_template=True, max_new_tokens=4
    )
    with pytest.raises(SimdiffError, match=r"^tiny: the model's tokenizer has no chat template"):
        evaluate_models([Subject.given(model, tokenizer, "tiny")], tasks=chat)
    tokenizer.chat_template = TEMPLATE
    loaded = load_tasks(chat)
    by_name = run_tasks(model, tokenizer, loaded)
    assert {name: list(of.values) for name, of in by_name.items()} == dict.fromkeys(
        ("alone", "shown"), every_other
    )
    told = loaded.identity()
    assert (told["chat_template"], told["max_new_tokens"]) == (True, 4)
    assert {
        name: (of["num_fewshot"], of["few_shot_split"], of["max_new_tokens"])
        for name, of in told["tasks"].items()
    } == {"alone": (0, None, 4), "shown": (2, "test", 4)}


def test_lengths_of_answers() -> None:
    def task(output_type: str, **settings: Any) -> Any:
        config = SimpleNamespace(generation_kwargs=settings or None)
        return SimpleNamespace(OUTPUT_TYPE=output_type, config=config)

    assert answer_length(task("multiple_choice"), 7) is None
    assert answer_length(task("generate_until"), None) == 256  # lm_eval's own
    assert answer_length(task("generate_until", max_gen_toks=5, max_tokens=9), 7) == 5
    assert answer_length(task("generate_until", max_tokens=9), 7) == 7
    request = SimpleNamespace(args=("question", {"max_new_tokens": 300, "until": ["x"]}))
    bounded([request], 30)
    assert request.arguments[0] == "question"
    assert request.arguments[1]["max_gen_toks"] == 30  # goes before the others
    assert request.arguments[1]["until"] == ["x"]
