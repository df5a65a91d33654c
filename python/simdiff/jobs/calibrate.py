"""The calibration pass of a job, and its windows read again from the record of the scores."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.data.documents import Text, cannot_be_read_again, check_text
from simdiff.data.records import source_of_record
from simdiff.data.text import TokenWindows, token_windows
from simdiff.data.text_options import TextOptions
from simdiff.errors import SimdiffError
from simdiff.evaluation.known_text import tell_of_text
from simdiff.jobs.stability import ScoringOptions, score_windows
from simdiff.models.identity import check_same_model, model_identity
from simdiff.models.loading import load_model
from simdiff.models.streamed import StreamOptions
from simdiff.planning.names import NUM_RESAMPLES, SEARCHED
from simdiff.planning.options import PlanOptions
from simdiff.scoring.scores import LayerScores


def calibrated(
    name: str, scores: LayerScores, stream: StreamOptions | None = None
) -> tuple[PreTrainedModel, Tensor]:
    """The model that scores were made for, and the token windows they were made on.

    Args:
        name: of the model.
        scores: that were made for it.
        stream: see `load_model`.

    Raises:
        SimdiffError: another model, or a text that has changed or gone.
    """
    check_text(_source(scores))  # before the model is loaded
    model, tokenizer = load_model(name, dtype=str(scores.model["dtype"]), stream=stream)
    check_same_model(model, scores.model, "file of scores")
    windows = calibration_windows(scores, tokenizer)
    tell_of_text(model, tokenizer, windows, name)
    return model, windows


def calibration_windows(scores: LayerScores, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The token windows that scores were made on, read again.

    Raises:
        SimdiffError: no text in their record, or one that has changed or gone.
    """
    text = scores.calibration
    windows = token_windows(
        _source(scores),
        tokenizer,
        part=text["part"],
        num_windows=text["num_windows"],
        window_length=text["window_length"],
        seed=text["seed"],
    )
    differing = [
        key.replace("_", " ")
        for key, value in windows.identity.to_dict().items()
        if key in text and text[key] != value  # files of earlier versions have no digest
    ]
    if differing:
        raise SimdiffError(
            f"text {text['source']}: must be as it was when the scores were made, and has changed "
            f"(other {', '.join(differing)}): score the model again, or plan without model=..."
        )
    return windows.tokens


def _source(scores: LayerScores) -> Text:
    """The text that scores were made on, if it can be read again."""
    text = scores.calibration
    if "source" not in text:
        raise SimdiffError("the scores must name their calibration text, got none in their record")
    if cannot_be_read_again(text["source"]):
        raise SimdiffError(
            f"the scores were made on {text['source']}, which cannot be read again: give their "
            "token windows (windows=), or score a text file"
        )
    return source_of_record(text)


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    text: TextOptions,
    plan: PlanOptions,
    scoring: ScoringOptions | None = None,
    batch_size: int = 8,
) -> tuple[LayerScores, TokenWindows]:
    """The calibration pass of a model, and the windows that it read.

    Args:
        model, tokenizer, name: of the dense model.
        text: how many windows; those of the first check where more are read until `plan` is stable.
        plan: what has to be stable.
        scoring: what is skipped, and whether more text is read.
        batch_size: windows per forward.
    """
    scoring = scoring or ScoringOptions()
    scoring.check(text.num_windows, text.window_length)
    if scoring.until_stable:
        if plan.criterion in SEARCHED:
            raise SimdiffError(
                f"calibration until the plan is stable needs a criterion of scores, got "
                f"{plan.criterion}, which searches"
            )
        plan.count(model_identity(model, name))
    most = replace(text, num_windows=scoring.num_windows(text.num_windows))
    windows = most.windows(tokenizer, "calibration")
    tell_of_text(model, tokenizer, windows.tokens, name)
    return score_windows(
        model,
        windows,
        scoring,
        plan.of_scores,
        first=text.num_windows,
        name=name,
        batch_size=batch_size,
        num_resamples=plan.bootstrap or NUM_RESAMPLES,
    )
