"""The methods of recovery by name, and what each of them takes and gives. No torch here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from simdiff.errors import SimdiffError, nearest
from simdiff.recovery.training.option_table import option_names

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from simdiff.planning.plan import PruningPlan
    from simdiff.recovery.training.losses import LossLog


@dataclass(frozen=True)
class RecoveryOutcome:
    """What a method tells of its work; the weights are in the model it was given."""

    formula: str
    """What was done, in a sentence."""
    settings: dict[str, Any]
    """Every number that it depends on, seeds included; plain JSON values."""
    details: dict[str, Any] = field(default_factory=dict)
    """What it saw on its way: errors of every layer, losses of every step; plain JSON values."""
    notes: tuple[str, ...] = ()
    """What a user must know, a sentence each without its full stop."""
    trained: bool = False
    """Whether weights were trained by gradients, not solved for."""


@dataclass(frozen=True)
class RecoveryContext:
    """What a method may use besides models and token windows."""

    tokenizer: PreTrainedTokenizerBase | None = None
    text: Mapping[str, Any] = field(default_factory=dict)
    """Where the windows came from, `TextIdentity.to_dict()`; empty for bare tokens."""
    directory: Path | None = None
    """A place of its own for what must survive an interruption; made by who needs it."""
    losses: LossLog | None = None
    """What takes the losses of a training as it goes."""


class Recover(Protocol):
    """The function `recover` of a method's module."""

    def __call__(
        self,
        model: PreTrainedModel,
        plan: PruningPlan,
        windows: Tensor,
        *,
        pruned: PreTrainedModel,
        options: Mapping[str, Any],
        batch_size: int,
        context: RecoveryContext | None = None,
    ) -> RecoveryOutcome:
        """Change the weights of `pruned`, in place.

        Args:
            model: the dense model; it must be as it was afterwards.
            plan: made for it.
            windows: calibration token ids `(num_windows, window_length)`; what a method holds out
                to choose by is a part of these.
            pruned: the model without the plan's layers. Its parameters are those of `model`, not
                copies: whoever changes one puts a new one in its place, or calls
                `copies.own_parameters` first. Layers, names and shapes stay.
            options: by the names in `Method.options`; those not given are absent.
            batch_size: windows per forward.
            context: see `RecoveryContext`.

        Raises:
            SimdiffError: options or a model that the method cannot use; NaN.
        """


@dataclass(frozen=True)
class Method:
    """A method of recovery."""

    text: str
    module: str
    """Imported when the method runs; has a function `recover`, see `Recover`."""
    options: tuple[str, ...]
    """Names of the options of `simdiff recover` that it reads, with underscores."""
    name: str = "recover"
    """Of the function, where a module has several."""
    check: str | None = None
    """Of a function of the module that is given method and options, to refuse before any work."""

    def function(self) -> Recover:
        """The method itself."""
        function: Recover = getattr(importlib.import_module(self.module), self.name)
        return function


_TRAINED = "simdiff.recovery.training.method"

METHODS = {
    "closed-form": Method(
        "linear maps of the layers before and behind a cut, corrected by ridge regression towards "
        "the dense model's hidden states; nothing is trained",
        "simdiff.recovery.closed_form.method",
        ("features", "norm_power", "after_cut"),
    ),
    "lora": Method(
        "low-rank adapters trained on the text, or on instructions, and merged; the preset 'paper' "
        "is the paper's recipe",
        _TRAINED,
        option_names("lora"),
        "train_on_text",
        "check",
    ),
    "distillation": Method(
        "low-rank adapters trained on the dense model's predictions, and merged",
        _TRAINED,
        option_names("distillation"),
        "distill",
        "check",
    ),
    "partial": Method(
        "the layers from the cut on themselves, the norm behind them and a head that is not the "
        "embedding too, trained on the dense model's predictions; what lies before is run once",
        _TRAINED,
        option_names("partial"),
        "train_last_layers",
        "check",
    ),
}


def check_options(method: str, options: Mapping[str, Any]) -> Method:
    """The method of a name, if it reads all of these options.

    Raises:
        SimdiffError: see `check_option_names`; or an option that the method refuses.
    """
    chosen = check_option_names(method, options)
    if chosen.check is not None:
        getattr(importlib.import_module(chosen.module), chosen.check)(method, options)
    return chosen


def check_option_names(method: str, options: Mapping[str, Any]) -> Method:
    """The method of a name, if all of these are names of its options; torch is not loaded.

    Raises:
        SimdiffError: no such method, an option of none or of another one.
    """
    if method not in METHODS:
        raise SimdiffError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    every = {name for entry in METHODS.values() for name in entry.options}
    for name in options:
        if name not in every:
            raise SimdiffError(f"no method has an option {name!r}{nearest(name, sorted(every))}")
    unread = sorted(set(options) - set(METHODS[method].options))
    if unread:
        known = ", ".join(METHODS[method].options) or "none"
        raise SimdiffError(
            f"options of method {method} are {known}, got {', '.join(unread)} of another method"
        )
    return METHODS[method]
