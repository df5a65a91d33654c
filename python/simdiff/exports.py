"""A PruningPlan in the words of other tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from simdiff.errors import SimdiffError
from simdiff.selection import PruningPlan


def layer_runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open runs [start, end) of consecutive layers, in order: 0, 1, 2, 5 is [0, 3), [5, 6)."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs


def run_words(layers: Sequence[int]) -> str:
    """The runs for people: `[0, 3), [5, 6)`."""
    return ", ".join(f"[{start}, {end})" for start, end in layer_runs(layers))


def yaml_string(text: str) -> str:
    """A double-quoted string, on one line, that every YAML parser reads back as it is."""
    return '"' + "".join(map(_yaml_character, text)) + '"'


def _yaml_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)  # JSON's escapes would not do: it writes two for U+10000 and above
    return f"\\x{code:02x}" if code < 256 else f"\\U{code:08x}"


def comment(text: str) -> str:
    """Text that cannot leave a comment."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def to_mergekit(plan: PruningPlan, model: str | None = None) -> str:
    """A mergekit configuration: `mergekit-yaml FILE OUTPUT` copies the layers that stay.

    Args:
        plan: what goes.
        model: directory or hub name of the model; None takes the plan's.

    Raises:
        SimdiffError: the model is the demo, or has no name.

    Source: mergekit 0.1.5, `mergekit.config.MergeConfiguration` and `passthrough`; a layer range
    there is [start, end), counted from 0.
    """
    name = _model_name(plan, model)
    lines = [
        "# mergekit: layers are counted from 0; layer_range is [start, end), the end not included.",
        f"# {comment(name)}: {len(plan.kept)} of {plan.num_layers} layers stay.",
        f"# stay: {run_words(plan.kept)}",
        f"# go:   {run_words(plan.removed)}",
        "# No dtype is given: the tensors keep theirs.",
        "merge_method: passthrough",
        "slices:",
    ]
    reference = yaml_string(name)
    # A string is split at "+" (a LoRA follows) and "@" (a revision): not what a path means.
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
    from simdiff.demo import DEMO

    name = model or plan.model.get("name")
    if not name or name == DEMO:
        raise SimdiffError(
            f"the mergekit format names the model, and the plan's is {name!r}: give --model, a "
            "directory or a hub name that mergekit can read"
        )
    return str(name)


def to_llama_cpp(plan: PruningPlan, model: str | None = None) -> str:
    """The list that llama.cpp's `llama-quantize --prune-layers` reads.

    Blocks are counted from 0 and separated by commas without spaces; duplicates and order do not
    matter there. It removes `blk.N` and writes the block count, but cuts no per-block array:
    `simdiff prune FILE.gguf` does.

    Source: llama.cpp, tools/quantize/quantize.cpp, `parse_layer_prune`; src/llama-quant.cpp,
    `remap_layer`.
    """
    return ",".join(map(str, sorted(plan.removed))) + "\n"


def to_list(plan: PruningPlan, model: str | None = None) -> str:
    """The removed layers, counted from 0, in order, one a line."""
    return "".join(f"{layer}\n" for layer in sorted(plan.removed))


FORMATS: dict[str, Callable[[PruningPlan, str | None], str]] = {
    "mergekit": to_mergekit,
    "llama.cpp": to_llama_cpp,
    "list": to_list,
}


def export_plan(plan: PruningPlan, name: str, model: str | None = None) -> str:
    """The plan as text in one of `FORMATS`.

    Raises:
        SimdiffError: unknown format; what the format refuses.
    """
    if name not in FORMATS:
        raise SimdiffError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name](plan, model)
