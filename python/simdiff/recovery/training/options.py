"""How a pruned model is trained, and the recipes that have a name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from simdiff.errors import SimdiffError
from simdiff.recovery.training.head_loss import Distillation
from simdiff.recovery.training.lora import LoraOptions
from simdiff.recovery.training.option_table import COMPUTE_DTYPES, SCHEDULES, parts_of


@dataclass(frozen=True)
class FineTuningOptions:
    """Every number that training depends on besides model and text."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    last_layers: int | None = None
    """So many of the last layers are trained themselves, with norm and head; None trains adapters
    on all layers."""
    distillation: Distillation | None = field(default_factory=Distillation)
    """None learns from the text alone."""
    length: int = 256
    """Tokens in an example."""
    batch_size: int = 8
    """Examples in a step."""
    micro_batch_size: int = 4
    """Examples in a forward; gradients of a step are added up."""
    epochs: float = 4.0
    steps: int | None = None
    """Exactly so many, instead of epochs."""
    max_minutes: float | None = None
    """Steps are reduced to what fits, by the measured time of one; training ends there anyway."""
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    """From the peak down to zero: "cosine", "linear", or "constant"."""
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    set_apart: int = 24
    """Examples that are not trained on: their loss chooses the weights and ends the training."""
    evaluations: int = 8
    """On the examples set apart, spread evenly over the training."""
    patience: int = 3
    """Evaluations without a new best after which training ends; 0 never ends it."""
    checkpoint_minutes: float = 2.0
    """Between states that an interrupted run goes on from; 0 writes one after every step."""
    few_logits: int | None = None
    """Tokens of the vocabulary on which a step computes its loss, see `few_logits`; None takes
    all. Evaluations take all."""
    gradient_checkpointing: bool = False
    compute_dtype: str = "auto"
    """Of the products: "float32", "bfloat16", or "auto", which is bfloat16 where it is fast."""
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            SimdiffError: the first option that is out of its range.
        """
        self.lora.check()
        least = (
            ("length", self.length, 2),
            ("batch_size", self.batch_size, 1),
            ("micro_batch_size", self.micro_batch_size, 1),
            ("set_apart", self.set_apart, 1),
            ("evaluations", self.evaluations, 1),
            ("warmup_steps", self.warmup_steps, 0),
            ("patience", self.patience, 0),
            ("weight_decay", self.weight_decay, 0),
            ("checkpoint_minutes", self.checkpoint_minutes, 0),
            ("steps", 1 if self.steps is None else self.steps, 1),
            ("few_logits", 4 if self.few_logits is None else self.few_logits, 4),
            ("last_layers", 1 if self.last_layers is None else self.last_layers, 1),
        )
        for name, value, lowest in least:
            if not lowest <= value < math.inf:
                raise SimdiffError(f"fine-tuning: {name} must be at least {lowest}, got {value}")
        above = (
            ("epochs", self.epochs),
            ("learning_rate", self.learning_rate),
            ("max_gradient_norm", self.max_gradient_norm),
            ("max_minutes", self.max_minutes),
        )
        for name, number in above:
            if number is not None and not 0 < number < math.inf:
                raise SimdiffError(f"fine-tuning: {name} must be above 0 and finite, got {number}")
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        if self.distillation is not None:
            self.distillation.check()

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Of step `step`, counted from 0: linear warm-up to the peak, then the schedule."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        done = min(1.0, max(0, step - self.warmup_steps) / max(1, num_steps - self.warmup_steps))
        shape = {
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - done,
            "constant": 1.0,
        }[self.schedule]
        return self.learning_rate * warm * shape


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SimdiffError(
            f"fine-tuning: {name} must be one of {', '.join(choices)}, got {value!r}"
        )


PRESETS = {
    "distillation": FineTuningOptions(),
    # Of 40 steps on the demo model, 1.5e-4 learns faster than 5e-4, and that faster than 1e-3.
    "partial": FineTuningOptions(
        learning_rate=1.5e-4, batch_size=4, few_logits=8192, evaluations=6
    ),
    "text": FineTuningOptions(distillation=None),
    # The paper fine-tunes like Shortened LLaMA and LLM-Pruner, whose post_training.py says: rank 8,
    # alpha 16, dropout 0.05 on all seven projections, 1e-4 after 100 steps of warm-up, linear
    # decay, batches of 64 in portions of 4, 256 tokens, answers alone; one epoch is the paper's.
    "paper": FineTuningOptions(
        lora=LoraOptions(rank=8, alpha=16.0, dropout=0.05),
        distillation=None,
        length=256,
        batch_size=64,
        micro_batch_size=4,
        epochs=1.0,
        learning_rate=1e-4,
        schedule="linear",
        warmup_steps=100,
        set_apart=2000,
        patience=0,
    ),
}
"""Recipes by name: ours, measured on the demo model, and the paper's."""


def preset(name: str, **changes: object) -> FineTuningOptions:
    """A recipe with some of its options changed.

    Args:
        name: in `PRESETS`.
        changes: fields of `FineTuningOptions`, and by their names in `TRAINING_OPTIONS` those of
            `LoraOptions` (rank, lora_alpha, dropout, targets) and of `Distillation`
            (distillation_weight, temperature).

    Raises:
        SimdiffError: no such recipe or option, or a value out of its range.
    """
    _check_choice("preset", name, tuple(PRESETS))
    options = PRESETS[name]
    lora = {
        field_name: changes.pop(name)
        for name, field_name in parts_of("lora").items()
        if name in changes
    }
    if "rank" in lora and "alpha" not in lora:  # the update keeps its scale
        lora["alpha"] = options.lora.alpha * float(str(lora["rank"])) / options.lora.rank
    options = replace(options, lora=replace(options.lora, **lora))  # type: ignore[arg-type]
    distilled = {
        field_name: changes.pop(name)
        for name, field_name in parts_of("distillation").items()
        if name in changes
    }
    if distilled:
        distillation = replace(options.distillation or Distillation(), **distilled)  # type: ignore[arg-type]
        options = replace(options, distillation=distillation if distillation.weight else None)
    unknown = [key for key in changes if key not in FineTuningOptions.__dataclass_fields__]
    if unknown:
        raise SimdiffError(f"fine-tuning: no option is called {', '.join(unknown)}")
    options = replace(options, **changes)  # type: ignore[arg-type]
    options.check()
    return options
