"""Pruned checkpoints on disk: what stock `from_pretrained` loads, complete or absent.

From a safetensors directory the files themselves are cut: headers are read, tensors that stay are
streamed under their new names, and no weight is ever in memory. A model that exists in memory only
is saved from there. Where both are possible they give the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from simdiff.companions import Companions, copy_companions, sort_companions
from simdiff.errors import SimdiffError, SurgeryError
from simdiff.files import MARKER, check_apart, write_bytes
from simdiff.layer_config import check_cut, cut_config, without_mtp
from simdiff.layer_entries import layer_count, layer_counts, text_part
from simdiff.layer_names import LayerNumbers, renumber_names
from simdiff.models import check_same_model, load_config, meta_model, source_directory
from simdiff.progress import step
from simdiff.safetensors_files import total_bytes
from simdiff.selection import PruningPlan, check_layers
from simdiff.stock_layout import in_saving_order, saved_groups, use_conversions
from simdiff.stored_layers import check_layers_stored, has_heads, number_layers
from simdiff.stored_weights import INDEX, SINGLE, StoredWeights, has_safetensors, read_weights
from simdiff.streaming import (
    DEFAULT_SHARD_SIZE,
    Shard,
    check_space,
    parse_size,
    split_shards,
    write_index,
    write_shards,
)
from simdiff.surgery import removed_layers


def write_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: PruningPlan,
    directory: Path,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> None:
    """Save the model without the plan's layers, its tokenizer and the plan into a directory.

    The model itself is as it was afterwards. Write into `files.new_directory` to have the
    checkpoint appear whole or not at all.

    Raises:
        SimdiffError: the plan was made for another model.
        SurgeryError: stock classes cannot express the cut.
    """
    check_same_model(model, plan.model, "plan")
    with removed_layers(model, plan.removed), step("write the pruned checkpoint"):
        model.save_pretrained(directory, max_shard_size=parse_size(max_shard_size))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    plan.save(directory / MARKER)


@dataclass(frozen=True)
class CheckpointCut:
    """A plan worked out for the files of a checkpoint; nothing is written yet."""

    source: Path
    plan: PruningPlan
    config: PreTrainedConfig
    shards: tuple[Shard, ...]
    metadata: dict[str, str]
    layers: LayerNumbers
    num_parameters: int
    companions: Companions
    notes: tuple[str, ...]
    """What was changed or left behind, for people."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors that stay."""
        return sum(total_bytes([tensor for _, tensor in shard.tensors]) for shard in self.shards)


def cut_checkpoint(
    source: Path, plan: PruningPlan, *, max_shard_size: int | str = DEFAULT_SHARD_SIZE
) -> CheckpointCut:
    """Work out what a plan means for a safetensors directory; reads headers and JSON only.

    Args:
        source: directory with config.json and model.safetensors, or shards and their index.
        plan: made for this model.
        max_shard_size: bytes of tensors in one file, or such as "5GB".

    Raises:
        SimdiffError: a damaged or incomplete checkpoint, or a plan for another model.
        SurgeryError: stock classes cannot express the cut.
    """
    with step("read the checkpoint's headers"):
        weights = read_weights(source)
    with step("check the cut against the stock model"):
        config = load_config(source)
        model = meta_model(config)
        quantised = quantization(config) is not None
        _check_depth(source, config, plan)
        _check_plan(model, plan, quantised)
        cut = cut_config(config, plan.kept, model_class=type(model))
        _check_cut(type(model), config, cut.config, plan)
        smaller = meta_model(cut.config)
        use_conversions(model, weights.tensors)
        smaller._weight_conversions = model._weight_conversions
        wanted = saved_groups(model)
        kept_groups = saved_groups(smaller)
        layers = number_layers(weights, plan, config, wanted, kept_groups)
        check_layers_stored(weights, layers, layer_count(config), wanted, quantised)
        if not has_heads(weights, layers, plan.num_layers):
            without_mtp(cut.config)
        renumbered = _renumber_quantiser(config, cut.config, layers, source)
    named = {}
    for name, tensor in weights.tensors.items():
        new = layers.rename(name)
        if new is not None:
            named[new] = tensor
    order = in_saving_order(kept_groups, named)
    groups = [[(name, named[name]) for name in group] for group in order]
    companions = sort_companions(source, [file.name for file in weights.files] + [INDEX, SINGLE])
    vars(cut.config).pop("transformers_weights", None)  # a file name that is not used here
    if not cut.config.architectures:
        cut.config.architectures = [type(model).__name__]
    notes = [f"config.json: {change}" for change in (*cut.changes, *renumbered)]
    notes += [
        f"layer {old}, a head behind the last layer, is layer {new} now"
        for old, new in layers.new.items()
        if old >= plan.num_layers
    ]
    notes += [f"left behind: {name} ({reason})" for name, reason in companions.left.items()]
    return CheckpointCut(
        source=source,
        plan=plan,
        config=cut.config,
        shards=tuple(split_shards(groups, parse_size(max_shard_size))),
        metadata=_metadata(weights, layers),
        layers=layers,
        num_parameters=smaller.num_parameters(),
        companions=companions,
        notes=tuple(notes),
    )


def write_cut(cut: CheckpointCut, directory: Path) -> None:
    """Write a pruned checkpoint into an empty directory, config.json last, and check it.

    Write into `files.new_directory` to have it appear whole or not at all. Until config.json is
    there no loader takes the directory for a model.

    Raises:
        SimdiffError: not enough room on the disk, or what was written is not what was meant.
    """
    beside = sum((cut.source / path).stat().st_size for path in cut.companions.taken)
    check_space(directory, cut.num_bytes + beside)
    write_shards(cut.shards, directory, cut.metadata)
    write_index(cut.shards, directory, cut.num_parameters)
    copy_companions(cut.companions, cut.source, directory, cut.layers)
    cut.plan.save(directory / MARKER)
    _check_written(cut, directory)
    # As config.save_pretrained writes it, but in one go: a config.json is never half there.
    write_bytes(directory / "config.json", cut.config.to_json_string(use_diff=True).encode())


def files_of(name: str, dtype: str) -> Path | None:
    """The directory whose files can be cut for this model, or None where only memory has it.

    Args:
        name: a local directory, a hub name, or "demo".
        dtype: of the weights in memory; another than "auto" is not what the files hold.
    """
    if dtype != "auto":
        return None
    try:
        source = source_directory(name)
    except SimdiffError:
        return None
    return source if has_safetensors(source) else None


def check_output(source: Path, output: Path) -> None:
    """Refuse an output that overlaps the input, also where the input is made of links.

    Raises:
        SimdiffError: see `files.check_apart`.
    """
    check_apart(source, output)
    for file in sorted(source.glob("*")):
        if file.resolve().is_relative_to(output.resolve()):
            raise SimdiffError(
                f"output {output} must not contain {file.resolve()}, which {file} links to: give "
                "another path"
            )


def quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The quantisation that a config describes, if any."""
    for part in (config, text_part(config)):
        found = getattr(part, "quantization_config", None)
        if found:
            return dict(found)
    return None


def _check_depth(source: Path, config: PreTrainedConfig, plan: PruningPlan) -> None:
    """The config must say how many layers there are, and the plan name some of them once each."""
    names = layer_counts(config) if text_part(config) is config else {}
    aliases = {alias for alias, name in config.attribute_map.items() if name in names}
    path = source / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if names and not written.keys() & (names.keys() | aliases):
        # Stock classes would silently take their default.
        raise SimdiffError(
            f"{path}: must say how many layers there are, as {' or '.join(names)}, and does not: "
            "take it from the original checkpoint"
        )
    check_layers(plan.removed, plan.num_layers, f"layers to remove from {source}")
    if not 0 < len(plan.removed) < plan.num_layers:
        raise SimdiffError(
            f"the layers to remove must be 1 to {plan.num_layers - 1} of {plan.num_layers}, got "
            f"{len(plan.removed)}"
        )


def _check_plan(model: PreTrainedModel, plan: PruningPlan, quantised: bool) -> None:
    """The plan must be for this model, told from its config alone."""
    try:
        check_same_model(model, plan.model, "plan")
    except SimdiffError:
        # Packed parameters exist only where the format's own kernels are installed: of a plan made
        # with them the fingerprint cannot be told from the config.
        same = (
            plan.model.get("architecture") == type(model).__name__
            and plan.model.get("num_layers") == layer_count(model.config)
            and plan.model.get("hidden_size") == text_part(model.config).hidden_size
        )
        if not (quantised and same):
            raise


def _check_cut(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    cut: PreTrainedConfig,
    plan: PruningPlan,
) -> None:
    """Stock classes must express the cut, and no tensor hold parts of several layers."""
    try:
        check_cut(model_class, config, cut, plan.kept)
    except SurgeryError:
        check_cut(model_class, config, cut, plan.kept, allow_packed=True)
        raise SurgeryError(
            f"{model_class.__name__} has tensors that hold parts of every layer, which cannot be "
            "copied as they are: prune the model in memory, by giving the --dtype that it is "
            "stored in, such as --dtype bfloat16"
        ) from None


def _renumber_quantiser(
    dense: PreTrainedConfig, cut: PreTrainedConfig, layers: LayerNumbers, source: Path
) -> list[str]:
    """Renumber the layers that a quantisation config names; returns what changed."""
    changes = []
    for part in (lambda config: config, text_part):
        found = getattr(part(dense), "quantization_config", None)
        if isinstance(found, dict) and found:
            new = renumber_names(found, layers, f"{source / 'config.json'}: quantization_config")
            part(cut).quantization_config = new
            changes += [key for key in found if new.get(key) != found[key]]
    return [f"quantization_config.{key} renumbered" for key in dict.fromkeys(changes)]


def _metadata(weights: StoredWeights, layers: LayerNumbers) -> dict[str, str]:
    """Of the files' headers; what describes tensors by name would be wrong after the cut."""
    metadata = {"format": "pt"} | weights.metadata
    for key, value in metadata.items():
        if f"{layers.prefix}." in key or f"{layers.prefix}." in value:
            raise SimdiffError(
                f"{weights.files[0]}: the header's metadata describes single layers ({key!r}), as "
                "torchao's formats do: such a checkpoint cannot be cut as files; prune the "
                "unquantised model and quantise the result"
            )
    return metadata


def _check_written(cut: CheckpointCut, directory: Path) -> None:
    """Read back what was written, by the same rules as any other checkpoint."""
    written = read_weights(directory).tensors
    wanted = {name: tensor for shard in cut.shards for name, tensor in shard.tensors}
    for name in sorted(set(written) | set(wanted)):
        ours, theirs = wanted.get(name), written.get(name)
        if (
            ours is None
            or theirs is None
            or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape)
        ):
            raise SimdiffError(
                f"{directory}: tensor {name!r} must be there as it was in {cut.source}, and is "
                "not: the file system lost it; nothing was kept"
            )
