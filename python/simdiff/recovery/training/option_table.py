"""The options of a training by name: kind, help, and where each goes. No torch: `--help` reads it.

The command takes them as `--learning-rate`, Python as `learning_rate=`, and recovery.json remembers
them by these names.
"""

from __future__ import annotations

from dataclasses import dataclass

STARTS = ("closed-form", "cut")
"""What training starts from."""
TRAINING_PRESETS = {
    "lora": ("text", "paper"),
    "distillation": ("distillation",),
    "partial": ("partial",),
}
"""Recipes of the methods that train, the default first."""
SCHEDULES = ("cosine", "linear", "constant")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainingOption:
    """One option; its default is the preset's."""

    kind: type | tuple[str, ...]
    """A type, or the names to choose from."""
    text: str
    """What help says."""
    field: str = ""
    """Of `FineTuningOptions`, or of what it holds ("lora.rank"); empty for what the method reads
    itself."""
    methods: tuple[str, ...] = ("lora", "distillation", "partial")


_ADAPTERS = ("lora", "distillation")
_TAUGHT = ("distillation", "partial")


TRAINING_OPTIONS = {
    "preset": TrainingOption(
        tuple(name for names in TRAINING_PRESETS.values() for name in names),
        "recipe that the other options change: text and paper of lora, distillation, partial",
    ),
    "start": TrainingOption(
        STARTS,
        "train from the closed form's weights, or from the plain cut, as the preset paper does",
    ),
    "training_text": TrainingOption(
        str,
        "other text to train on (its calibration half), or .json or .jsonl of objects with "
        "instruction, input and output",
    ),
    "examples": TrainingOption(int, "train on at most so many examples"),
    "train_on_prompts": TrainingOption(bool, "predict the prompts of instructions too"),
    "train_length": TrainingOption(int, "tokens in an example", "length"),
    "train_batch_size": TrainingOption(int, "examples in a step", "batch_size"),
    "micro_batch_size": TrainingOption(
        int, "examples in a forward; gradients are added up", "micro_batch_size"
    ),
    "train_seed": TrainingOption(
        int, "seed of the training alone: adapters, dropout and the order of examples", "seed"
    ),
    "rank": TrainingOption(int, "rank of the adapters", "lora.rank", _ADAPTERS),
    "lora_alpha": TrainingOption(
        float, "the adapters' output is multiplied by lora-alpha / rank", "lora.alpha", _ADAPTERS
    ),
    "dropout": TrainingOption(float, "dropout of an adapter's input", "lora.dropout", _ADAPTERS),
    "targets": TrainingOption(
        str,
        "last names of the projections, by commas (default: all linear ones)",
        "lora.targets",
        _ADAPTERS,
    ),
    "distillation_weight": TrainingOption(
        float,
        "share of the divergence from the dense model in the loss, 0 to 1; the rest is the "
        "cross-entropy of the text",
        "distillation.weight",
        _TAUGHT,
    ),
    "temperature": TrainingOption(
        float, "temperature of both distributions", "distillation.temperature", _TAUGHT
    ),
    "last_layers": TrainingOption(
        int,
        "train so many of the last layers (default: the one before the first cut "
        "and those behind it, at least 3)",
        "last_layers",
        ("partial",),
    ),
    "epochs": TrainingOption(float, "passes over the examples", "epochs"),
    "steps": TrainingOption(int, "number of updates, instead of epochs", "steps"),
    "max_minutes": TrainingOption(
        float, "train as many steps as fit, by the measured time of one", "max_minutes"
    ),
    "learning_rate": TrainingOption(float, "learning rate at its peak", "learning_rate"),
    "schedule": TrainingOption(
        SCHEDULES, "shape of the learning rate after the warm-up", "schedule"
    ),
    "warmup_steps": TrainingOption(int, "steps until the peak", "warmup_steps"),
    "weight_decay": TrainingOption(float, "weight decay of AdamW", "weight_decay"),
    "max_gradient_norm": TrainingOption(
        float, "longer gradients are shortened to it", "max_gradient_norm"
    ),
    "set_apart": TrainingOption(
        int, "examples that are not trained on, to choose the best weights by", "set_apart"
    ),
    "evaluations": TrainingOption(
        int,
        "number of evaluations on the examples set apart, over the whole training",
        "evaluations",
    ),
    "patience": TrainingOption(
        int, "evaluations without a better one that end training; 0 never", "patience"
    ),
    "checkpoint_minutes": TrainingOption(
        float,
        "minutes between states that an interrupted training goes on from",
        "checkpoint_minutes",
    ),
    "few_logits": TrainingOption(
        int,
        "compute a step's loss on about so many tokens of the vocabulary: frequent ones and some "
        "of the others, drawn anew each time, which stand for the rest",
        "few_logits",
    ),
    "gradient_checkpointing": TrainingOption(
        bool, "compute activations twice instead of keeping them", "gradient_checkpointing"
    ),
    "compute_dtype": TrainingOption(
        COMPUTE_DTYPES, "dtype of the products; auto is bfloat16 where it is fast", "compute_dtype"
    ),
}


def option_names(method: str) -> tuple[str, ...]:
    """The options that a method of training takes."""
    return tuple(name for name, option in TRAINING_OPTIONS.items() if method in option.methods)


def parts_of(part: str) -> dict[str, str]:
    """The options that go into "lora" or "distillation", and the field there; "" is the rest."""
    found = {}
    for name, option in TRAINING_OPTIONS.items():
        where, _, field = option.field.rpartition(".")
        if field and where == part:
            found[name] = field
    return found
