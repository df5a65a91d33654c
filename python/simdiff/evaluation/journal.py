"""EvaluationJournal: stores evaluations in a file, so that an interruption repeats none."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from simdiff.evaluation.losses import exponential
from simdiff.io import ranks
from simdiff.io.journal_file import JournalFile
from simdiff.models.identity import shapes_of
from simdiff.models.weights import weights_digest

SCHEMA = "simdiff.evaluations"


@dataclass(frozen=True)
class Evaluation:
    """The losses on all windows of the model without some layers."""

    losses: tuple[float, ...]
    """Mean negative log-likelihood of each window; NaN if it was NaN or Inf."""
    seconds: float

    @property
    def nll(self) -> float:
        """Mean loss over windows; NaN if that of any window is."""
        return math.fsum(self.losses) / len(self.losses)

    @property
    def perplexity(self) -> float:
        """exp of `nll`; may be NaN or Inf."""
        return exponential(self.nll)


def evaluation_key(
    model: PreTrainedModel, windows: Tensor, text: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything an evaluation depends on: model and weights, dtype, device, tokens.

    Args:
        model: the model that is evaluated.
        windows: the token ids that it reads.
        text: identity of the text, `TextIdentity.to_dict()`.
    """
    identity = shapes_of(model, "")
    device = model.get_input_embeddings().weight.device
    return {
        "model": {key: identity[key] for key in ("architecture", "num_layers", "fingerprint")},
        "weights": weights_digest(model),
        "dtype": identity["dtype"],
        "device": device.type,
        "text": dict(text),
        "tokens": hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest(),
    }


class EvaluationJournal:
    """Evaluations by set of removed layers, each computed once and stored in a file.

    Inside a with block, new evaluations are written at most once a second, and at the end of the
    block even after an error.

    Args:
        key: everything that the evaluations depend on, see `evaluation_key`.
        path: path of the file; None stores evaluations in memory only.
        compute: returns the losses of each window without some layers; None if they are not known
            yet, see `simdiff.evaluation.streamed_losses.in_few_passes`.
        seconds: what an evaluation took before `compute` was called; None takes nothing.

    Raises:
        SimdiffError: the file was made with another key, or is damaged.
    """

    def __init__(
        self,
        key: Mapping[str, Any],
        path: Path | None,
        compute: Callable[[frozenset[int]], list[float] | None],
        seconds: Callable[[frozenset[int]], float] | None = None,
    ) -> None:
        """Read the evaluations in the file."""
        ranks.agree("what is evaluated", key)
        self._compute, self._before = compute, seconds or (lambda layers: 0.0)
        self._file = JournalFile(SCHEMA, path, key, "evaluations", _to_json, _from_json)
        self._known = self._file.entries
        self.computed = 0
        """Number of evaluations computed, not read from the file."""

    def ahead(self, sets: Iterable[Collection[int]]) -> None:
        """Evaluate sets of layers that will be asked for, shared among processes.

        A single process does nothing: it evaluates them when they are asked for. Nor is it for a
        streamed model, whose windows are shared, see
        `simdiff.evaluation.streamed_losses.losses_in_one_pass`.
        """
        wanted = dict.fromkeys(map(frozenset, sets))
        missing = [layers for layers in wanted if layers not in self._known]
        if ranks.size() > 1 and missing:
            found = zip(missing, ranks.shared(self._evaluated, missing), strict=True)
            self._keep({layers: entry for layers, entry in found if entry is not None})

    def __call__(self, removed: Collection[int]) -> Evaluation:
        """Evaluate the model without these layers, or return the stored evaluation.

        What is not known yet has a loss of NaN and is not stored.
        """
        layers = frozenset(removed)
        if layers not in self._known:
            found = self._evaluated(layers)
            if found is None:
                return Evaluation((math.nan,), 0.0)
            self._keep({layers: found})
        return self._known[layers]

    def _evaluated(self, layers: frozenset[int]) -> Evaluation | None:
        start = time.perf_counter()
        losses = self._compute(layers)
        seconds = time.perf_counter() - start + self._before(layers)
        if losses is None:
            return None
        finite = tuple(loss if math.isfinite(loss) else math.nan for loss in losses)
        return Evaluation(finite, seconds)

    def _keep(self, found: Mapping[frozenset[int], Evaluation]) -> None:
        self.computed += len(found)
        self._file.keep(found)

    def __enter__(self) -> EvaluationJournal:
        """Return the journal; no file is opened, since it is written as a whole."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write new evaluations to the file."""
        self.flush()

    def flush(self) -> None:
        """Write the file if there are new evaluations."""
        self._file.flush()


def _to_json(layers: frozenset[int], found: Evaluation) -> dict[str, Any]:
    losses = [None if math.isnan(loss) else loss for loss in found.losses]
    return {"removed": sorted(layers), "losses": losses, "seconds": found.seconds}


def _from_json(entry: dict[str, Any]) -> tuple[frozenset[int], Evaluation]:
    losses = tuple(math.nan if x is None else float(x) for x in entry["losses"])
    if not losses:
        raise ValueError("an evaluation has no losses")
    return frozenset(map(int, entry["removed"])), Evaluation(losses, float(entry["seconds"]))
