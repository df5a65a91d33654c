"""What readers of an evaluation must know: how it was asked, and what its averages leave out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from simdiff.errors import number_of
from simdiff.evaluation.task_scores import CHANCE_ERRORS, CLASSIFICATION, GENERATION, TaskScore
from simdiff.evaluation.text_perplexity import TextPerplexity
from simdiff.models.files import same_weights

if TYPE_CHECKING:
    from simdiff.evaluation.quality import Quality


def quality_notes(quality: Quality) -> Iterator[str]:
    """Sentences without a full stop on the text, the items, and what the averages leave out."""
    dense = quality.dense
    text = dense.text
    if text is not None:
        yield _text_note(text, dense.perplexity)
    if dense.unknown is not None:
        yield dense.unknown
    for model in quality.models[1:]:
        if model.text != text:
            yield (
                f"{model.name} reads the text as other tokens than {dense.name}: perplexities per "
                "token cannot be compared"
            )
        if same_weights({"weights": model.cut.get("cut_from_weights")}, dense.told_by) is False:
            yield (
                f"{model.name} was cut from a model of other weights than {dense.name}, such as "
                "a fine-tuned version: what it lost is not the cut's alone"
            )
    if quality.tasks is None:
        return
    yield _items_note(quality.tasks, dense.tasks)
    yield from _chance_notes(dense.tasks)
    if "boolq" in quality.tasks["tasks"]:
        yield (
            "boolq: its passages are the demo text, so that a model calibrated or repaired on "
            "the text 'demo' has seen half of them"
        )
    ran = quality.tasks["tasks"]
    own = [name for name, task in ran.items() if task["few_shot_split"] == task["split"]]
    if own:
        names = ", ".join(own)
        yield f"{names}: few-shot examples are other items of the split that is evaluated"
    if len(quality.models) > 1 and {s.kind for s in dense.tasks.values()} == {CLASSIFICATION}:
        yield (
            "every task gives its choices, of which a cut costs less than of answers that a model "
            "writes: add a generation task, such as triviaqa"
        )


def _text_note(text: Mapping[str, Any], perplexity: TextPerplexity | None) -> str:
    runs = 0 if perplexity is None else perplexity.num_runs
    part = "" if text["part"] == "all" else f"the {text['part']} part of "
    return (
        f"perplexity: {number_of(text['num_windows'], 'window')} of {text['window_length']} "
        f"tokens, stride {text['stride']}, "
        f"{'a BOS token before each' if text['bos'] else 'no BOS'}, "
        f"{'all' if text['whole'] else 'the start'} of {part}{text['source']}; "
        + (
            f"95% interval by Student's t over {runs} runs of windows"
            if runs > 1
            else "no interval from a single run of windows"
        )
    )


def _items_note(run: Mapping[str, Any], scores: Mapping[str, TaskScore]) -> str:
    drawn = f"{run['limit']} items of each, drawn at random"
    limit = "all items" if run["limit"] is None else drawn
    metrics = "; ".join(
        f"{metric} for {', '.join(n for n, s in scores.items() if s.metric == metric)}"
        for metric in dict.fromkeys(score.metric for score in scores.values())
    )
    template = ", asked by the model's chat template" if run.get("chat_template") else ""
    lengths = _each(run["tasks"], "max_new_tokens", None)
    written = "".join(f"; answers of {names} of at most {n} tokens" for n, names in lengths.items())
    return (
        f"tasks: lm_eval {run['versions']['lm_eval']}, {_shots(run['tasks'])}{template}, {limit}, "
        f"the same for every model; {metrics}{written}; ± is one standard error"
    )


def _shots(ran: Mapping[str, Any]) -> str:
    """Such as `0-shot`, or `0-shot (5-shot: gsm8k, squad)`."""
    others = _each(ran, "num_fewshot", 0)
    listed = "; ".join(f"{count}-shot: {names}" for count, names in others.items())
    if len(others) == 1 and all(task["num_fewshot"] for task in ran.values()):
        return f"{next(iter(others))}-shot"
    return f"0-shot ({listed})" if listed else "0-shot"


def _each(ran: Mapping[str, Any], setting: str, usual: object) -> dict[Any, str]:
    """The names of tasks by a setting of theirs, those with the usual one left out."""
    found: dict[Any, list[str]] = {}
    for name, task in ran.items():
        if task[setting] != usual:
            found.setdefault(task[setting], []).append(name)
    return {value: ", ".join(names) for value, names in found.items()}


def _chance_notes(dense: Mapping[str, TaskScore]) -> Iterator[str]:
    out = [score for score in dense.values() if score.at_chance]
    chosen = [score for score in out if score.kind == CLASSIFICATION]
    written = [score for score in out if score.kind == GENERATION]
    if chosen:
        details = ", ".join(
            f"{score.name} ({100 * score.value:.1f}, chance {100 * score.chance:.1f})"
            for score in chosen
        )
        yield (
            f"left out of the average without tasks at chance: {details}: the dense model is not "
            f"more than {CHANCE_ERRORS:g} standard errors above chance, which is the mean of 1 / "
            "number of choices over the items"
        )
    if written:
        details = ", ".join(f"{score.name} ({100 * score.value:.1f})" for score in written)
        yield (
            f"nothing to retain in {details}: what the dense model writes is right in not more "
            f"than {CHANCE_ERRORS:g} standard errors above 0, and the task is left out of the "
            "average without such tasks"
        )
    if not out:
        yield "the dense model is above chance on every task: none is left out"
    for name, score in dense.items():
        error = score.standard_error or 0.0
        constant = score.constant
        if constant is None or score.at_chance:
            continue
        if score.value - constant <= CHANCE_ERRORS * error:
            yield (
                f"{name}: one and the same answer to every item would give {100 * constant:.1f}; "
                f"the dense model's {100 * score.value:.1f} does not clearly exceed it"
            )
