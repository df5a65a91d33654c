"""Recovery by training: layers that stay learn from text or from the dense model.

Adapters (`lora`), or the last layers themselves (`last_layers`), are trained on examples of the
calibration half of a text. Other examples of it are set apart; they choose the best weights and end
the training. The result are the merged weights of the best evaluation. The first evaluation is that
of the model before training, so the result is never worse on the examples set apart.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.evaluation.journal import evaluation_key
from simdiff.io.progress import tell
from simdiff.models.windows import check_windows
from simdiff.recovery.training.data import Examples
from simdiff.recovery.training.lora import require_peft
from simdiff.recovery.training.losses import LossLog
from simdiff.recovery.training.options import FineTuningOptions
from simdiff.recovery.training.progress import TrainingProgress
from simdiff.recovery.training.state import TrainingState, set_random_states, training_directory
from simdiff.recovery.training.step import Student

# Share of a time budget that is kept as reserve for errors in the measured time of a step.
_MARGIN = 0.95

FINISHED = "all steps were done"
EARLY = "the loss on what is set apart did not fall any more"
NOT_FINITE = "loss or gradient held NaN or Inf"
OUT_OF_TIME = "the time was up before all steps were done"


@dataclass(frozen=True)
class FineTuning:
    """The course of a training; the model has the weights of `best_step`."""

    num_steps: int
    """Number of steps that were planned."""
    steps: int
    """Number of steps that were done."""
    best_step: int
    """Step with the best evaluation, whose weights were taken; 0 is the model before training."""
    stopped: str
    """Says why training ended."""
    seconds: float
    curve: tuple[dict[str, Any], ...]
    """One entry per evaluation: step, tokens, seconds, learning_rate, train_loss and set_apart_loss
    in nats per token, set_apart_perplexity."""
    num_trained: int
    """Number of parameters that were trained, those of adapters where there are any."""
    targets: tuple[str, ...]
    """Names of the projections that had adapters, or of the parameters that were trained."""
    compute_dtype: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"curve": list(self.curve), "targets": list(self.targets)}


def fine_tune(
    model: PreTrainedModel,
    train: Examples,
    set_apart: Examples,
    options: FineTuningOptions,
    *,
    teacher: PreTrainedModel | None = None,
    directory: Path | None = None,
    progress: bool = True,
    losses: LossLog | None = None,
) -> FineTuning:
    """Train a model in place; its parameters are replaced by new ones, not written to.

    After an interruption the same call with the same `directory` resumes and gives the same
    weights: bitwise on a CPU with the same number of threads, on a GPU if its kernels are
    deterministic. If loss or gradient is NaN or Inf, training stops and the best weights so far are
    taken.

    Args:
        model: causal language model, pruned or not.
        train, set_apart: disjoint examples to train on and to evaluate on.
        options: see `simdiff.recovery.training.options.preset`.
        teacher: the dense model, which distillation needs.
        directory: directory for the state of training; it is made if it does not exist. None stores
            nothing.
        progress: show a progress bar, or lines without a terminal.
        losses: what takes the loss of every step and every evaluation.

    Raises:
        SimdiffError: options, model or a state in `directory` cannot be used, `peft` is missing, or
            the loss is NaN or Inf before the first step.
        KeyboardInterrupt: raised after the state was written.
    """
    options.check()
    if options.last_layers is None:
        require_peft()
    if options.distillation is not None and teacher is None:
        raise SimdiffError("fine-tuning: distillation needs the dense model as teacher, got none")
    check_windows(model, [train.tokens, set_apart.tokens], "recover")
    key = {
        "start": evaluation_key(model, train.tokens, train.identity),
        "examples": [train.digest(), set_apart.digest()],
        "options": asdict(options),
        "teacher": None if teacher is None else evaluation_key(teacher, train.tokens[:0], {}),
    }
    held = contextlib.nullcontext() if directory is None else training_directory(directory)
    cuda = [model.device] if model.device.type == "cuda" else []
    with held, torch.random.fork_rng(cuda):
        torch.manual_seed(options.seed)
        student = Student(model, train, options, teacher)
        try:
            run = _TrainingRun(student, set_apart, options, directory, key, losses or LossLog())
            result = run.train(progress)
        except BaseException:
            student.discard()
            raise
        student.finish(run.state.best_weights)
    return result


class _TrainingRun:
    """A training run, from its beginning or from the state of an earlier call."""

    def __init__(
        self,
        student: Student,
        set_apart: Examples,
        options: FineTuningOptions,
        directory: Path | None,
        key: dict[str, Any],
        losses: LossLog,
    ) -> None:
        self.student, self.options = student, options
        self._set_apart, self._directory, self._key = set_apart, directory, key
        self._losses = losses
        self._saved = time.monotonic()
        found = None if directory is None else TrainingState.load(directory, key)
        self.state = found or TrainingState(num_steps=0, evaluate_every=0)
        self._fresh = found is None
        if found is not None:
            student.trained.load(found.weights)
            student.optimizer.load_state_dict(found.optimizer)
            set_random_states(found.random, student.device)

    def train(self, progress: bool) -> FineTuning:
        self._losses.begin(None if self._fresh else self.state.step)
        if self._fresh:
            self._begin()
        state = self.state
        with (
            TrainingProgress(
                state.num_steps, state.step, set_apart=self._last_loss(), shown=progress
            ) as shown,
            _interruption() as interrupted,
        ):
            if self._fresh:
                shown.evaluated(0, state.best_loss, True)
            while state.stopped is None:
                self._advance(shown)
                minutes = (time.monotonic() - self._saved) / 60
                if state.stopped or interrupted or minutes >= self.options.checkpoint_minutes:
                    self._save()
                if interrupted:  # after the last step too: the same call then has the result
                    raise KeyboardInterrupt
        return self._result()

    def _last_loss(self) -> float:
        """The last loss on what is set apart; NaN before the first."""
        return self.state.curve[-1]["set_apart_loss"] if self.state.curve else math.nan

    def _begin(self) -> None:
        """Evaluate the model before training, and fix the number of steps."""
        state, options = self.state, self.options
        start = time.perf_counter()
        self.student.read(self._set_apart)
        begun = time.perf_counter()
        loss = self.student.evaluate(self._set_apart)
        evaluation = time.perf_counter() - begun
        if not math.isfinite(loss):
            raise SimdiffError(
                f"fine-tuning: the loss must be finite before training, got {loss} on the examples "
                "set apart"
            )
        epochs = math.ceil(options.epochs * len(self.student.train) / options.batch_size)
        state.num_steps = options.steps or epochs
        if options.max_minutes is not None:
            budget = 60 * options.max_minutes * _MARGIN - (begun - start)
            budget -= (1 + options.evaluations) * evaluation
            fits = self.student.steps_within(budget, state.num_steps)
            if fits < 1:
                raise SimdiffError(
                    f"fine-tuning: max_minutes must allow a step, which takes about "
                    f"{self.student.step_seconds:.3g} s, and {1 + options.evaluations} evaluations "
                    f"of {evaluation:.3g} s, got {options.max_minutes:g}"
                )
            state.num_steps = fits
        state.evaluate_every = math.ceil(state.num_steps / options.evaluations)
        state.seconds = time.perf_counter() - start
        self._keep(loss, None, 0.0)
        self._save()

    def _advance(self, shown: TrainingProgress) -> None:
        """Run one step, and the evaluation and saving that are due after it."""
        state, options = self.state, self.options
        start = time.perf_counter()
        rate = options.learning_rate_at(state.step, state.num_steps)
        loss, tokens = self.student.step(state.step, rate)
        if loss is None:
            state.stopped = NOT_FINITE
        else:
            state.step += 1
            state.tokens += tokens
            state.losses.append(loss)
            self._losses.add(state.step, loss=loss, learning_rate=rate, tokens=state.tokens)
            shown.stepped(state.step, loss, tokens / (time.perf_counter() - start))
            if state.step >= state.num_steps:
                state.stopped = FINISHED
            elif options.max_minutes is not None and state.seconds >= 60 * options.max_minutes:
                state.stopped = OUT_OF_TIME
        unseen = bool(state.losses) and (
            state.stopped is not None or state.step % state.evaluate_every == 0
        )
        value = self.student.evaluate(self._set_apart) if unseen else math.nan
        state.seconds += time.perf_counter() - start
        if not unseen:
            return
        if not math.isfinite(value):
            state.stopped = NOT_FINITE
            return
        mean = math.fsum(state.losses) / len(state.losses)
        shown.evaluated(state.step, value, value < state.best_loss)
        self._keep(value, mean, rate)
        if state.stopped is None and options.patience and state.waited >= options.patience:
            state.stopped = EARLY

    def _keep(self, loss: float, train_loss: float | None, rate: float) -> None:
        """Add a point to the curve, and store the weights if they are the best so far."""
        state = self.state
        self._losses.add(state.step, set_apart_loss=loss)
        state.losses = []
        state.waited += 1
        if loss < state.best_loss:
            state.best_loss, state.best_step, state.waited = loss, state.step, 0
            state.best_weights = self.student.trained.state()
        state.curve.append(
            {
                "step": state.step,
                "tokens": state.tokens,
                "seconds": round(state.seconds, 3),
                "learning_rate": rate,
                "train_loss": train_loss,
                "set_apart_loss": loss,
                "set_apart_perplexity": math.exp(min(loss, 700)),
            }
        )

    def _save(self) -> None:
        self.student.remember(self.state)
        if self._directory is not None:
            self.state.save(self._directory, self._key)
        self._saved = time.monotonic()

    def _result(self) -> FineTuning:
        state = self.state
        assert state.stopped is not None
        notes: tuple[str, ...] = ()
        if state.stopped == NOT_FINITE:
            notes = (
                f"training stopped after {state.step} of {state.num_steps} steps, because "
                f"{state.stopped}: the weights are those of step {state.best_step}, the best "
                "before; a lower learning rate may do",
            )
        elif state.stopped == OUT_OF_TIME:
            notes = (f"{state.stopped}, {state.step} of {state.num_steps}",)
        if state.best_step == 0:
            notes += (
                "no step of training lowered the loss on what was set apart: the weights are as "
                "they were before it",
            )
        return FineTuning(
            num_steps=state.num_steps,
            steps=state.step,
            best_step=state.best_step,
            stopped=state.stopped,
            seconds=state.seconds,
            curve=tuple(state.curve),
            num_trained=sum(p.numel() for p in self.student.trained.parameters().values()),
            targets=self.student.trained.targets,
            compute_dtype=str(self.student.dtype).removeprefix("torch."),
            notes=notes,
        )


@contextlib.contextmanager
def _interruption() -> Iterator[list[int]]:
    """Defer the first Ctrl-C or termination to the end of a step, and say so; the second acts."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, frame: object) -> None:
        received.append(number)
        tell("train: interrupted, finishing this step to keep it; again stops at once")
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
