"""Recovery without training: solve for linear maps at both sides of a cut, one by one.

The layer before a cut and a few behind it are corrected so that the pruned model's states approach
the dense model's. A map W that writes to the residual stream (the down projection of the MLP at the
end of a layer; behind the cut the output projection of attention too) gets, with its input z, the
stream y that it writes to, the dense state h there (before a cut that which enters the next kept
layer), and tokens t:

    V = argmin Σ w_t ‖h_t − y_t − Vᵀ z_t‖² + λ ‖V‖²,   w_t = ‖h_t‖^−p,   W ← W + Vᵀ

Behind the cut the maps U that read one tensor x (queries, keys and values; gate and up) read what
comes closest to the dense model's tensor x* in their place:

    V = argmin Σ w_t ‖x*_t − x_t − Vᵀ x_t‖² + λ ‖V‖²,   w_t = ‖x*_t‖^−p,   U ← U (I + Vᵀ)

All are corrected in the order in which they run, each on the states of the model corrected so far,
so that later ones see the remaining error of earlier ones. λ has the lowest error on windows that
were not fitted; making no correction is a candidate. Of the models with the first n corrected
layers, at the edges of the cuts, the one of lowest loss on these windows is taken; the plain cut,
n = 0, is a candidate. Further behind a cut there is nothing to gain: the errors become those of the
states' noise, and fitting it raises the loss.

Related: ReplaceMe (arXiv 2505.02819) folds one linear map of the hidden state into the projection
before the cut; Ghosted Layers (arXiv 2605.15491) puts a linear map of the stream at the cut. Here
the projection is solved for in its own, more numerous inputs, and the map of the stream lies in the
weights that read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.data.batches import model_inputs, token_mask
from simdiff.errors import SimdiffError
from simdiff.evaluation.losses import token_losses
from simdiff.io.progress import track
from simdiff.models.partial_forward import Course, PartialForward
from simdiff.planning.plan import PruningPlan
from simdiff.recovery.closed_form.correction import BatchStates, Correction
from simdiff.recovery.closed_form.precision import autocasts, precision
from simdiff.recovery.closed_form.settings import FEATURES, Settings
from simdiff.recovery.methods import RecoveryContext, RecoveryOutcome

# These choose between a few strengths and a few numbers of layers: more would only take time.
UNSEEN_TOKENS = 4096

Batches = Sequence[Tensor | Mapping[str, Tensor]]


def recover(
    model: PreTrainedModel,
    plan: PruningPlan,
    windows: Tensor,
    *,
    pruned: PreTrainedModel,
    options: Mapping[str, Any],
    batch_size: int,
    context: RecoveryContext | None = None,
) -> RecoveryOutcome:
    """Correct the pruned model in closed form; see `simdiff.recovery.methods.Recover`."""
    settings = checked_settings(options)
    count = unseen_windows(windows, settings.unseen_share)
    return correct(
        model,
        pruned,
        plan.kept,
        windows[:-count].split(batch_size),
        windows[-count:].split(batch_size),
        settings=settings,
    )


def checked_settings(options: Mapping[str, Any]) -> Settings:
    """The settings of options by name.

    Raises:
        SimdiffError: an option that cannot be used.
    """
    settings = Settings(**options)
    if settings.after_cut < 0:
        raise SimdiffError(f"after_cut must be at least 0, got {settings.after_cut}")
    if settings.features not in FEATURES:
        raise SimdiffError(
            f"features must be one of {', '.join(FEATURES)}, got {settings.features!r}"
        )
    return settings


def unseen_windows(windows: Tensor, share: float) -> int:
    """The number of windows that are not fitted, no more than `UNSEEN_TOKENS` need.

    Raises:
        SimdiffError: there are fewer than two windows.
    """
    num_windows = len(windows)
    if num_windows < 2:
        raise SimdiffError(
            "closed-form recovery needs at least 2 windows of text, one to fit and one to choose "
            f"by, got {num_windows}"
        )
    most = math.ceil(UNSEEN_TOKENS / windows.shape[1])
    return min(num_windows - 1, most, max(1, round(share * num_windows)))


@torch.no_grad()
def correct(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    kept: Sequence[int],
    fitted: Batches,
    unseen: Batches,
    *,
    settings: Settings | None = None,
    progress: bool = True,
) -> RecoveryOutcome:
    """Correct the layers of a pruned model at both sides of its cuts, in place.

    The states of both models at one depth and the inputs of a projection are stored for all tokens,
    tokens × (3 · hidden_size + in_features) values in the model's dtype, and the features
    of unseen tokens in float32. Three matrices take 4 · in_features² bytes each: 28 MB together for
    1536 inputs of a projection, 2.5 GB for 14336. From 26755 inputs on a weaker correction is used,
    which takes 4 · hidden_size² bytes each. Sums are float32 (float64 for a model in float64): the
    choice of λ measures what a correction leaves, whatever it was computed with.

    Args:
        model: the dense model, which is not changed.
        pruned: the model with only the layers in `kept`; see `simdiff.surgery.copies.sharing_copy`.
        kept: layers of the dense model that `pruned` has, in order.
        fitted, unseen: disjoint text to fit and to choose by: token ids `(batch, sequence)`, or
            mappings with `input_ids` and, where padded, `attention_mask`.
        settings: None takes the defaults.
        progress: show a progress bar.

    Raises:
        SimdiffError: no layer can be corrected, there is too little text, or a value is NaN or Inf.
    """
    settings = settings or Settings()
    texts = model_inputs(fitted, "recovery"), model_inputs(unseen, "recovery")
    run = Correction(model, pruned, list(kept), *texts, settings)
    run.check()
    autocast = autocasts(model)
    with (
        PartialForward(model, autocast=autocast) as dense,
        PartialForward(pruned, autocast=autocast) as student,
    ):
        steps = steps_of(run, dense, student)
        for _ in track(steps, "correct layers", run.num_steps) if progress else steps:
            pass
        run.finish(student)
        outcome = outcome_of(run, losses_of(run, student))
    run.keep(outcome.details["corrected"])
    return outcome


def steps_of(run: Correction, dense: PartialForward, student: PartialForward) -> Iterator[None]:
    """All of the correction before `finish`."""
    yield from run.begin(dense, student)
    for position in run.course:
        yield from run.layer(position, dense, student)


def losses_of(run: Correction, student: PartialForward) -> dict[int, float]:
    """Mean loss per token of the unseen windows, by number of corrections; may be Inf.

    Candidates are the plain cut (0), the corrections up to the last layer before each cut, and all
    of them: their states are known, so each costs no more than a few layers and the head.

    Args:
        run: all its layers are corrected.
        student: runs the head of the pruned model.
    """
    candidates = run.branches | {len(run.positions): run.states}
    return {count: _loss(run, student, states) for count, states in sorted(candidates.items())}


def _loss(run: Correction, student: PartialForward, states: BatchStates) -> float:
    total, tokens = 0.0, 0
    for number in run.unseen_numbers:
        batch, left = run.batches[number], states[number]
        for ids, rows, own in zip(batch["input_ids"], token_mask(batch), left, strict=True):
            window = ids[rows]  # padding is on one side, so the other tokens are contiguous
            if len(window) < 2:
                continue
            course = Course(len(student.layers), own[rows.to(own.device)][None])
            with student.following(course), precision(run.pruned):
                losses = token_losses(run.pruned, window)
            total += float(losses.double().mean()) * len(losses)
            tokens += len(losses)
    return total / tokens if tokens and math.isfinite(total) else math.inf


def outcome_of(run: Correction, losses: Mapping[int, float]) -> RecoveryOutcome:
    """What was found; `corrected` of its details is how many of the corrections are to be kept.

    These are the first ones, as many as give the lowest loss on unseen windows.

    Args:
        run: all its layers are corrected.
        losses: see `losses_of`.
    """
    if not any(fit.projection or fit.parts for fit in run.fits):
        raise SimdiffError(
            f"closed-form recovery needs a linear map of {type(run.model).__name__}, at a cut, "
            "that reads from the residual stream or writes to it, got none; another method may do"
        )
    if not math.isfinite(losses[0]):
        raise SimdiffError(
            "correct: unseen must hold tokens that the plain cut predicts with a finite loss, got "
            f"{losses[0]}"
        )
    best = min(losses, key=lambda count: losses[count])
    return RecoveryOutcome(
        formula="before a cut and a few layers behind it, map by map: W + Vᵀ where it writes to "
        "the residual stream, V = argmin Σ w ‖h − y − Vᵀz‖² + λ‖V‖²; W (I + Vᵀ) where it reads, "
        "V = argmin Σ w ‖x* − x − Vᵀx‖² + λ‖V‖²",
        settings=asdict(run.settings),
        details={
            "layers": [asdict(fit) for fit in run.fits],
            "losses": [
                {"corrected": n, "nll": nll if math.isfinite(nll) else None}
                for n, nll in losses.items()
            ],
            "corrected": best,
        },
        notes=_notes(run, best),
    )


def _notes(run: Correction, best: int) -> tuple[str, ...]:
    notes = []
    left = [str(fit.layer) for fit in run.fits if fit.projection is None]
    if left:
        notes.append(
            f"layers {', '.join(left)} have no linear map of their own that is the last to write "
            "to the residual stream: with a mixture of experts each token takes its own. What they "
            "read, and their attention, are corrected behind a cut"
        )
    if any(fit.features == "outputs" for fit in run.fits):
        notes.append("corrections are linear in the projections' outputs, not in their inputs")
    tokens = sum(int(token_mask(batch).sum()) for batch in run.fitted)
    if tokens < run.most_features:
        notes.append(
            f"{tokens} tokens were fitted, fewer than the {run.most_features} features of a "
            "projection: more text would help"
        )
    if best == 0:
        notes.append(
            "no correction lowered the loss on unseen calibration windows: the weights are those "
            "of the plain cut"
        )
    return tuple(notes)
