"""Measure several models on the same text and tasks, and compare them with the first, dense one."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.data.documents import Text, check_text
from simdiff.data.text_options import tell_fewer
from simdiff.errors import SimdiffError
from simdiff.evaluation.answers import check_chat_template
from simdiff.evaluation.intervals import paired_mean_loss
from simdiff.evaluation.known_text import unknown_text
from simdiff.evaluation.quality_notes import quality_notes
from simdiff.evaluation.streamed_tasks import check_tasks
from simdiff.evaluation.task_scores import (
    KindAverages,
    TaskDifference,
    TaskScore,
    averages,
    paired_difference,
)
from simdiff.evaluation.tasks import TaskOptions, load_tasks, run_tasks
from simdiff.evaluation.text_perplexity import (
    TextPerplexity,
    TokenizedText,
    read_text,
    text_perplexity,
    window_sums,
)
from simdiff.io.json_files import header
from simdiff.io.machine import describe_machine
from simdiff.models.identity import stored_cut, told_by
from simdiff.models.loading import find_model, load_model
from simdiff.models.running import evaluating
from simdiff.models.streamed import StreamOptions
from simdiff.models.sweep import remove_states

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, which is loaded when its turn comes."""

    name: str
    opened: Callable[[], AbstractContextManager[Loaded]]
    """Makes a context manager that yields model and tokenizer and at its end undoes all changes."""
    cut: dict[str, Any] = field(default_factory=dict)
    """What is known of its cut, see `simdiff.models.identity.stored_cut`."""
    sums: Callable[..., list[tuple[float, int]]] = window_sums
    """Measures the losses of windows, see `window_sums`."""
    tasks: Callable[..., dict[str, TaskScore]] | None = None
    """Runs tasks in the place of `run_tasks`."""

    @classmethod
    def stored(
        cls,
        name: str,
        dtype: str = "auto",
        device: str | None = None,
        stream: StreamOptions | None = None,
    ) -> Subject:
        """A model given by its directory or hub name, or "demo"; see `load_model`."""

        @contextlib.contextmanager
        def opened() -> Iterator[Loaded]:
            loaded = load_model(name, dtype=dtype, device=device, stream=stream)
            yield loaded
            remove_states(loaded[0])
            del loaded
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

        return cls(name, opened, stored_cut(name))

    @classmethod
    def given(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
    ) -> Subject:
        """A model in memory; it is not changed.

        Raises:
            SimdiffError: there is no tokenizer.
        """
        if tokenizer is None:
            raise SimdiffError(f"Subject.given: tokenizer of {name!r} must be given, got None")

        @contextlib.contextmanager
        def opened() -> Iterator[Loaded]:
            with evaluating(model):
                yield model, tokenizer

        return cls(name, opened)


@dataclass(frozen=True)
class TextChoice:
    """The text on which perplexity is measured, and how it is divided; see `read_text`."""

    source: Text
    num_windows: int = 32
    window_length: int = 512
    stride: int | None = None
    part: str = "held-out"
    seed: int = 0

    def read(self, tokenizer: PreTrainedTokenizerBase, *, tell: bool = True) -> TokenizedText:
        """Read the tokens and windows of the text; says so where it fills fewer than are wanted."""
        found = read_text(
            self.source,
            tokenizer,
            part=self.part,
            num_windows=self.num_windows,
            window_length=self.window_length,
            stride=self.stride,
            seed=self.seed,
        )
        if tell:
            tell_fewer(self.source, self.part, len(found.windows), self.num_windows)
        return found


@dataclass(frozen=True)
class ModelQuality:
    """The measurements of one model."""

    name: str
    num_parameters: int
    dtype: str
    text: dict[str, Any] | None
    """Source and windows of the text, see `TokenizedText.identity`."""
    perplexity: TextPerplexity | None
    tasks: dict[str, TaskScore]
    cut: dict[str, Any] = field(default_factory=dict)
    """What is known of its cut, see `simdiff.models.identity.stored_cut`."""
    told_by: dict[str, Any] = field(default_factory=dict)
    """Fingerprint and weights, see `simdiff.models.identity.told_by`."""
    unknown: str | None = None
    """See `simdiff.evaluation.known_text.unknown_text`."""


@dataclass(frozen=True)
class PerplexityRatio:
    """A model's perplexity over the dense model's, with a 95% interval if there is one."""

    ratio: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ModelComparison:
    """The comparison of one model with the dense one."""

    perplexity: PerplexityRatio | None
    """Ratio of the perplexities; None without a text, or if the models read different tokens."""
    differences: dict[str, TaskDifference]
    averages: dict[str, KindAverages]
    """Of classification and of generation, see `averages`."""


@dataclass(frozen=True)
class Quality:
    """The measurements of several models on the same text and tasks; the first is the dense one."""

    models: list[ModelQuality]
    tasks: dict[str, Any] | None
    """The tasks that were run and their settings, see `LoadedTasks.identity`."""

    @property
    def dense(self) -> ModelQuality:
        """The dense model, with which the others are compared."""
        return self.models[0]

    def against_dense(self, model: ModelQuality) -> ModelComparison:
        """Compare a model with the dense one."""
        dense = self.dense
        names = list(dense.tasks)
        return ModelComparison(
            _perplexity_ratio(model, dense),
            {name: paired_difference(model.tasks[name], dense.tasks[name]) for name in names},
            averages(model.tasks, dense.tasks),
        )

    def notes(self) -> list[str]:
        """Notes that readers of the figures must know."""
        return list(quality_notes(self))

    def to_dict(self) -> dict[str, Any]:
        """The content of a result file of schema simdiff.evaluation."""
        return {
            **header("simdiff.evaluation"),
            "machine": describe_machine(),
            "threads": torch.get_num_threads(),
            "dense": self.dense.name,
            "tasks": self.tasks,
            "models": {model.name: self._model(model) for model in self.models},
            "notes": self.notes(),
        }

    def _model(self, model: ModelQuality) -> dict[str, Any]:
        found = self.against_dense(model)
        result: dict[str, Any] = {
            "num_parameters": model.num_parameters,
            "dtype": model.dtype,
            **model.told_by,
            **model.cut,
        }
        if model.perplexity is not None:
            ratio = None if found.perplexity is None else asdict(found.perplexity)
            result |= model.perplexity.to_dict()
            result |= {"evaluation": model.text, "against_dense": ratio}
        if model.tasks:
            result["tasks"] = {
                name: score.to_dict() | {"difference": asdict(found.differences[name])}
                for name, score in model.tasks.items()
            }
            result["averages"] = {kind: asdict(of) for kind, of in found.averages.items()}
        return result


def evaluate_models(
    models: Sequence[str | Path | Subject],
    *,
    text: TextChoice | None = None,
    tasks: TaskOptions | None = None,
    dtype: str = "auto",
    device: str | None = None,
    stream: StreamOptions | None = None,
) -> Quality:
    """Measure models one after the other on the same text and the same items of the same tasks.

    Args:
        models: the dense model first; names as for `load_model`, or subjects in memory.
        text: the text for perplexity; None measures none.
        tasks: the tasks for accuracy, through lm_eval; None runs none.
        dtype, device, stream: of the models given by name, see `load_model`.

    Raises:
        SimdiffError: there is no model, two have one name, or there is neither text nor task; see
            also `load_tasks`, `read_text`, `load_model`.
    """
    subjects = [
        model
        if isinstance(model, Subject)
        else Subject.stored(str(model), dtype, device, stream and stream.beside(index))
        for index, model in enumerate(models)
    ]
    names = [subject.name for subject in subjects]
    if not names or len(set(names)) != len(names):
        raise SimdiffError(f"models must be at least one, each of its own name, got {names}")
    if text is None and tasks is None:
        raise SimdiffError("there must be a text, tasks or both, got neither")
    for model in models:
        if not isinstance(model, Subject):
            find_model(str(model))  # a slip in the last name is told before the first is evaluated
    if text is not None:
        check_text(text.source)
    loaded = None if tasks is None else load_tasks(tasks)
    measured: list[ModelQuality] = []
    for subject in subjects:
        with subject.opened() as (model, tokenizer):
            if tasks is not None and tasks.chat_template:
                check_chat_template(tokenizer, subject.name)
            part = quality = unknown = None
            if loaded is not None:
                check_tasks(model, loaded)
            if text is not None:
                part = text.read(tokenizer, tell=not measured)
                description = f"perplexity, {subject.name}"
                quality = text_perplexity(model, part, description=description, sums=subject.sums)
                length = part.identity["window_length"]
                unknown = unknown_text(quality.nll, part.tokens, length, tokenizer, subject.name)
            scores: dict[str, TaskScore] = {}
            if loaded is not None:
                run, description = subject.tasks or run_tasks, f"tasks, {subject.name}"
                scores = run(model, tokenizer, loaded, description=description)
            measured.append(
                ModelQuality(
                    subject.name,
                    sum(p.numel() for p in model.parameters()),
                    str(model.dtype).removeprefix("torch."),
                    None if part is None else part.identity,
                    quality,
                    scores,
                    subject.cut,
                    told_by(model),
                    unknown,
                )
            )
            del model
    return Quality(measured, None if loaded is None else loaded.identity())


def _perplexity_ratio(model: ModelQuality, dense: ModelQuality) -> PerplexityRatio | None:
    if model.perplexity is None or dense.perplexity is None or model.text != dense.text:
        return None
    found = paired_mean_loss(model.perplexity.losses, dense.perplexity.losses)
    return PerplexityRatio(found.perplexity, found.low, found.high)
