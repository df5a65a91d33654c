"""Write pruned checkpoints that stock `from_pretrained` loads, whole or not at all.

The files of a safetensors directory are cut without loading them: headers are read, kept tensors
are streamed under their new names, and no weight is ever in memory. A model that exists only in
memory is saved from there. Both ways give the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from simdiff.checkpoints.layer_numbering import check_layers_stored, has_heads, number_layers
from simdiff.checkpoints.other_files import OtherFiles, copy_other_files, sort_other_files
from simdiff.checkpoints.safetensors_header import total_bytes
from simdiff.checkpoints.save_order import in_saving_order, record_conversions, saved_groups
from simdiff.checkpoints.shards import (
    DEFAULT_SHARD_SIZE,
    Shard,
    check_space,
    parse_size,
    split_shards,
    write_index,
    write_shards,
)
from simdiff.checkpoints.tensor_names import LayerNumbers, renumber_names
from simdiff.checkpoints.weight_index import (
    INDEX,
    SINGLE,
    StoredWeights,
    has_safetensors,
    read_weights,
)
from simdiff.errors import SimdiffError, SurgeryError
from simdiff.io.outputs import PLAN_FILE, check_apart, write_bytes
from simdiff.io.progress import step
from simdiff.models.config import layer_count, layer_counts, quantization, text_part
from simdiff.models.identity import check_same_model
from simdiff.models.loading import load_config, meta_model, source_directory
from simdiff.planning.plan import PruningPlan
from simdiff.planning.selection import check_layers
from simdiff.surgery.config import check_cut, cut_config, without_mtp
from simdiff.surgery.layers import layers_removed


def write_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: PruningPlan,
    directory: Path,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> None:
    """Save the model without the plan's layers, its tokenizer and the plan into a directory.

    The model itself is unchanged afterwards. With a directory of `simdiff.io.outputs.new_directory`
    the checkpoint appears whole or not at all.

    Raises:
        SimdiffError: the plan was made for another model.
        SurgeryError: stock classes cannot express the cut.
    """
    check_same_model(model, plan.model, "plan")
    with layers_removed(model, plan.removed), step("write the pruned checkpoint"):
        model.save_pretrained(directory, max_shard_size=parse_size(max_shard_size))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    plan.save(directory / PLAN_FILE)


@dataclass(frozen=True)
class CheckpointCut:
    """The changes that a plan makes to the files of a checkpoint; nothing is written yet."""

    source: Path
    plan: PruningPlan
    config: PreTrainedConfig
    shards: tuple[Shard, ...]
    metadata: dict[str, str]
    layers: LayerNumbers
    num_parameters: int
    other_files: OtherFiles
    notes: tuple[str, ...]
    """The changes and the files left behind, in words."""

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all kept tensors."""
        return sum(total_bytes([tensor for _, tensor in shard.tensors]) for shard in self.shards)


def cut_checkpoint(
    source: Path, plan: PruningPlan, *, max_shard_size: int | str = DEFAULT_SHARD_SIZE
) -> CheckpointCut:
    """Work out the changes of a plan to a safetensors directory; reads only headers and JSON.

    Args:
        source: directory with config.json and model.safetensors, or shards and their index.
        plan: a plan made for this model.
        max_shard_size: limit of the tensors' bytes in one file, as a number or as in "5GB".

    Raises:
        SimdiffError: the checkpoint is damaged or incomplete, or the plan is for another model.
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
        record_conversions(model, weights.tensors)
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
    other_files = sort_other_files(source, [file.name for file in weights.files] + [INDEX, SINGLE])
    vars(cut.config).pop("transformers_weights", None)  # the name of a file that is not copied
    if not cut.config.architectures:
        cut.config.architectures = [type(model).__name__]
    notes = [f"config.json: {change}" for change in (*cut.changes, *renumbered)]
    notes += [
        f"layer {old}, a head behind the last layer, is layer {new} now"
        for old, new in layers.new.items()
        if old >= plan.num_layers
    ]
    notes += [f"left behind: {name} ({reason})" for name, reason in other_files.left_behind.items()]
    return CheckpointCut(
        source=source,
        plan=plan,
        config=cut.config,
        shards=tuple(split_shards(groups, parse_size(max_shard_size))),
        metadata=_metadata(weights, layers),
        layers=layers,
        num_parameters=smaller.num_parameters(),
        other_files=other_files,
        notes=tuple(notes),
    )


def write_cut(cut: CheckpointCut, directory: Path) -> None:
    """Write a pruned checkpoint into an empty directory, config.json last, and check it.

    With a directory of `simdiff.io.outputs.new_directory` it appears whole or not at all. No loader
    takes the directory for a model before config.json is there.

    Raises:
        SimdiffError: the disk lacks space, or the written files are not as intended.
    """
    size_of_others = sum((cut.source / path).stat().st_size for path in cut.other_files.copied)
    check_space(directory, cut.num_bytes + size_of_others)
    write_shards(cut.shards, directory, cut.metadata)
    write_index(cut.shards, directory, cut.num_parameters)
    copy_other_files(cut.other_files, cut.source, directory, cut.layers)
    cut.plan.save(directory / PLAN_FILE)
    _check_written(cut, directory)
    # The text is that of config.save_pretrained, but written at once: config.json is never partial.
    write_bytes(directory / "config.json", cut.config.to_json_string(use_diff=True).encode())


def files_of(name: str, dtype: str) -> Path | None:
    """The directory whose files can be cut for a model; None if it has to be saved from memory.

    Args:
        name: a local directory, a hub name, or "demo".
        dtype: dtype of the weights in memory; any other than "auto" differs from the files.
    """
    if dtype != "auto":
        return None
    try:
        source = source_directory(name)
    except SimdiffError:
        return None
    return source if has_safetensors(source) else None


def check_output(source: Path, output: Path) -> None:
    """Refuse an output that overlaps the input, also if the input consists of links.

    Raises:
        SimdiffError: see `simdiff.io.outputs.check_apart`.
    """
    check_apart(source, output)
    for file in sorted(source.glob("*")):
        if file.resolve().is_relative_to(output.resolve()):
            raise SimdiffError(
                f"output {output} must not contain {file.resolve()}, which {file} links to: give "
                "another path"
            )


def _check_depth(source: Path, config: PreTrainedConfig, plan: PruningPlan) -> None:
    """Check that the config states its number of layers and that the plan fits it."""
    names = layer_counts(config) if text_part(config) is config else {}
    aliases = {alias for alias, name in config.attribute_map.items() if name in names}
    path = source / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if names and not written.keys() & (names.keys() | aliases):
        # Stock classes would silently use their default.
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
    """Check from the config alone that the plan is for this model."""
    try:
        check_same_model(model, plan.model, "plan")
    except SimdiffError:
        # Packed parameters exist only where the kernels of their format are installed. If a plan
        # was made with them, its fingerprint cannot be computed from the config.
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
    """Check that stock classes express the cut and no tensor holds parts of several layers."""
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
    """Renumber the layers that a quantisation config names; return the changes in words."""
    changes = []
    for part in (lambda config: config, text_part):
        found = getattr(part(dense), "quantization_config", None)
        if isinstance(found, dict) and found:
            new = renumber_names(found, layers, f"{source / 'config.json'}: quantization_config")
            part(cut).quantization_config = new
            changes += [key for key in found if new.get(key) != found[key]]
    return [f"quantization_config.{key} renumbered" for key in dict.fromkeys(changes)]


def _metadata(weights: StoredWeights, layers: LayerNumbers) -> dict[str, str]:
    """The metadata of the files' headers without entries that describe tensors by name."""
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
    """Read the written files back and check them as any other checkpoint."""
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
