"""Write pruned checkpoints that stock `from_pretrained` loads, whole or not at all.

The files of a safetensors directory are cut without loading them: headers are read, kept tensors
are streamed under their new names, and no weight is ever in memory. `from_memory` saves a model
that exists only in memory. Both ways give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from simdiff.checkpoints.config_file import (
    CONFIG_FILE,
    Entries,
    carry_quantiser,
    config_bytes,
    cut_file,
    read_entries,
)
from simdiff.checkpoints.layer_numbering import check_layers_stored, has_heads, number_layers
from simdiff.checkpoints.other_files import OtherFiles, copy_other_files, sort_other_files
from simdiff.checkpoints.quantiser import Modules
from simdiff.checkpoints.read_back import Fit, fit, read_back
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
from simdiff.checkpoints.tensor_names import LayerNumbers
from simdiff.checkpoints.weight_index import (
    StoredWeights,
    has_safetensors,
    read_weights,
    weight_files,
)
from simdiff.errors import SimdiffError, SurgeryError
from simdiff.io.kinds import PLAN_FILE
from simdiff.io.outputs import check_apart, write_bytes
from simdiff.io.progress import step
from simdiff.io.safetensors_header import StoredTensor, total_bytes
from simdiff.models.config import layer_count, layer_counts, quantization, text_part
from simdiff.models.identity import check_same_model
from simdiff.models.loading import load_config, meta_model, source_directory
from simdiff.planning.plan import PruningPlan
from simdiff.planning.selection import check_layers
from simdiff.surgery.config import check_cut, cut_config, without_mtp
from simdiff.surgery.config_entries import Depth, depth_of
from simdiff.surgery.config_patch import read_config
from simdiff.surgery.config_search import PER_LAYER


@dataclass(frozen=True)
class CheckpointCut:
    """The changes that a plan makes to the files of a checkpoint; nothing is written yet."""

    source: Path
    plan: PruningPlan
    depth: Depth
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    """The config that the stock class will read from `entries`."""
    entries: Entries
    """The content of the new config.json."""
    known: Fit
    """What does not fit the stock model in the source either."""
    shards: tuple[Shard, ...]
    metadata: dict[str, str]
    modules: Modules
    num_parameters: int
    other_files: OtherFiles
    notes: tuple[str, ...]
    """The changes and the files left behind, in words."""

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all kept tensors."""
        return sum(total_bytes([tensor for _, tensor in shard.tensors]) for shard in self.shards)

    def with_tensors(self, others: Mapping[str, StoredTensor]) -> CheckpointCut:
        """The same with other tensors in the place of those of their names in the source."""
        shards = [
            Shard(
                shard.name,
                tuple((new, others.get(tensor.name, tensor)) for new, tensor in shard.tensors),
            )
            for shard in self.shards
        ]
        return replace(self, shards=tuple(shards))


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
        read_entries(source)  # before a library opens it
        config = load_config(source)
        model = meta_model(config)
        quantised = quantization(config) is not None
        _check_depth(source, config, plan)
        _check_plan(model, plan, quantised)
        cut = cut_config(config, plan.kept, model_class=type(model))
        depth = depth_of(config, plan.kept)
        entries = cut_file(source, config, cut.config, depth, type(model).__name__)
        read = read_config(type(config), entries)
        _check_cut(type(model), config, read, plan)
        smaller = meta_model(read)
        fit_before = fit(weights.tensors, model)
        record_conversions(smaller, weights.tensors)
        wanted, kept_groups = saved_groups(model), saved_groups(smaller)
        layers = number_layers(weights, plan, config, wanted, kept_groups)
        check_layers_stored(weights, layers, layer_count(config), wanted, quantised)
        if not has_heads(weights, layers, plan.num_layers):
            without_mtp(cut.config)
            entries = cut_file(source, config, cut.config, depth, type(model).__name__)
        names = [*weights.tensors, *(name for group in wanted for name in group)]
        modules = Modules.of(names, layers)
        renumbered = carry_quantiser(entries, config, modules, str(source / CONFIG_FILE))
    named = {}
    for name, tensor in weights.tensors.items():
        new = layers.rename(name)
        if new is not None:
            named[new] = tensor
    order = in_saving_order(kept_groups, named)
    groups = [[(name, named[name]) for name in group] for group in order]
    other_files = sort_other_files(source, weight_files(source))
    notes = [f"config.json: {change}" for change in cut.changes]
    notes += [f"config.json: {entry} renumbered" for entry in renumbered]
    notes += [
        f"layer {old}, a head behind the last layer, is layer {new} now"
        for old, new in layers.new.items()
        if old >= plan.num_layers
    ]
    notes += [f"left behind: {name} ({reason})" for name, reason in other_files.left_behind.items()]
    return CheckpointCut(
        source=source,
        plan=plan,
        depth=depth,
        model_class=type(model),
        config=read_config(type(config), entries),
        entries=entries,
        known=fit_before.renamed(layers.rename_any),
        shards=tuple(split_shards(groups, parse_size(max_shard_size))),
        metadata=_metadata(weights, layers),
        modules=modules,
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
    copy_other_files(cut.other_files, cut.source, directory, cut.modules)
    cut.plan.save(directory / PLAN_FILE)
    _check_written(cut, directory)
    write_bytes(directory / CONFIG_FILE, config_bytes(cut.entries, cut.source))
    read_back(directory, cut.model_class, type(cut.config), cut.depth, cut.known)


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
    path = source / CONFIG_FILE
    written = read_entries(source)
    listed = any(  # Nemotron-H says it by the length of a list
        isinstance(value, (list, str)) and len(value) == layer_count(config)
        for name, value in written.items()
        if PER_LAYER.search(name)
    )
    if names and not listed and not written.keys() & (names.keys() | aliases):
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
            "copied as they are: prune the model in memory, by giving the dtype that it is "
            "stored in, such as dtype='bfloat16'"
        ) from None


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
