"""Export a PruningPlan to the formats of other tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from simdiff.errors import SimdiffError
from simdiff.io.kinds import MERGEKIT_HEAD
from simdiff.models.layer_indices import layer_runs, spans
from simdiff.planning.plan import PruningPlan


def yaml_string(text: str) -> str:
    """Quote a string on one line so that every YAML parser reads it back unchanged."""
    return '"' + "".join(map(_yaml_character, text)) + '"'


def _yaml_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)  # not JSON's escapes: JSON writes U+10000 and above as two of them
    return f"\\x{code:02x}" if code < 256 else f"\\U{code:08x}"


def comment(text: str) -> str:
    """Make text safe for a one-line comment: no line breaks or other unprintable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def to_mergekit(plan: PruningPlan, model: str | None = None) -> str:
    """A mergekit configuration with which `mergekit-yaml FILE OUTPUT` copies the kept layers.

    Args:
        plan: the plan.
        model: directory or hub name of the model; None takes the name in the plan.

    Raises:
        SimdiffError: the model is the demo model, or has no name.

    Source: mergekit 0.1.5, `mergekit.config.MergeConfiguration` and `passthrough`; a layer range
    there is [start, end), counted from 0.
    """
    name = _model_name(plan, model)
    lines = [
        f"{MERGEKIT_HEAD}; the end of a layer_range is not included.",
        f"# {comment(name)}: {len(plan.kept)} of {plan.num_layers} layers stay.",
        f"# stay: {spans(plan.kept)}",
        f"# go:   {spans(plan.removed)}",
        "# No dtype is given: the tensors keep theirs.",
        "merge_method: passthrough",
        "slices:",
    ]
    reference = yaml_string(name)
    # mergekit splits a string at "+" (a LoRA follows) and "@" (a revision), also in a path.
    if Path(name).exists() and set(name) & set("+@"):
        reference = f"{{model: {{path: {reference}}}}}"
    for start, end in layer_runs(plan.kept):
        lines += [
            "- sources:",
            f"  - model: {reference}",
            f"    layer_range: [{start}, {end}]  # layers {start} to {end - 1}",
        ]
    return "\n".join(lines) + "\n"


def _model_name(plan: PruningPlan, model: str | None) -> str:
    from simdiff.data.demo import DEMO

    name = model or plan.model.get("name")
    if not name or name == DEMO:
        raise SimdiffError(
            f"the mergekit format names the model, and the plan's is {name!r}: give model=..., a "
            "directory or a hub name that mergekit can read"
        )
    return str(name)


def to_llama_cpp(plan: PruningPlan, model: str | None = None) -> str:
    """The list of layers that llama.cpp's `llama-quantize --prune-layers` reads.

    Layers are counted from 0 and separated by commas without spaces; order and duplicates do not
    matter. `llama-quantize` removes the tensors `blk.N` and writes the new block_count, but cuts no
    array with one element per layer; `simdiff prune FILE.gguf` does.

    Source: llama.cpp, tools/quantize/quantize.cpp, `parse_layer_prune`; src/llama-quant.cpp,
    `remap_layer`.
    """
    return ",".join(map(str, sorted(plan.removed))) + "\n"


def to_list(plan: PruningPlan, model: str | None = None) -> str:
    """The removed layers in order, counted from 0, one per line."""
    return "".join(f"{layer}\n" for layer in sorted(plan.removed))


FORMATS: dict[str, Callable[[PruningPlan, str | None], str]] = {
    "mergekit": to_mergekit,
    "llama.cpp": to_llama_cpp,
    "list": to_list,
}


def export_plan(plan: PruningPlan, name: str, model: str | None = None) -> str:
    """Write a plan as text in one of `FORMATS`.

    Raises:
        SimdiffError: the format is unknown, or cannot express the plan.
    """
    if name not in FORMATS:
        raise SimdiffError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name](plan, model)
