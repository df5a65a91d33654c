"""Apply a PruningPlan to a GGUF file: drop and renumber layers without dequantising anything.

GGUF calls a decoder layer a block (`block_count`, `blk.N`). The layer count, every array with one
element per layer, and the names of tensors change. All other metadata and the data of every kept
tensor are copied bit for bit, 8 MB at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simdiff.checkpoints.gguf.container import MAGIC, GgufFile, text_entry
from simdiff.checkpoints.gguf.position_rules import (
    check_architecture,
    check_positions,
    check_tensors,
    is_per_layer,
    is_unrelated,
)
from simdiff.checkpoints.gguf.writer import Piece, write_gguf
from simdiff.errors import SimdiffError
from simdiff.io.kinds import GGUF_MARK, Kind
from simdiff.io.outputs import check_new_file
from simdiff.planning.plan import PruningPlan

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(.+)")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True)
class GgufCut:
    """The result of cutting a GGUF file."""

    output: Path
    kept: tuple[int, ...]
    """Layers of the source that were kept, counted from 0, without those for multi-token
    prediction, which are always kept."""
    changes: tuple[str, ...]
    """Changes of the metadata, in words."""
    num_bytes: int
    """Size of the output."""


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    path = Path(name)
    if path.is_file():
        with path.open("rb") as file:
            return file.read(4) == MAGIC or path.suffix == ".gguf"
    return path.suffix == ".gguf" and not path.is_dir()


def prune_gguf(
    source: Path, plan: PruningPlan, output: Path, *, overwrite: bool = False
) -> GgufCut:
    """Write a GGUF file without the layers of a plan; it appears whole or not at all.

    Args:
        source: a GGUF file, or the first file of a split model (the output is one file).
        plan: a plan made for this model in any format; layers count from 0.
        output: the file to write; it must not exist, unless `overwrite`.

    Raises:
        SimdiffError: the input is damaged, the plan is for another model, the position of a kept
            layer matters to the architecture, the output exists, or the disk lacks space.
    """
    output = output.absolute()
    files = _open_parts(source)
    try:
        if overwrite and output.exists() and any(output.samefile(file.path) for file in files):
            raise SimdiffError(f"output {output} must not be the input itself; give another path")
        check_new_file(output, overwrite, Kind.GGUF)
        return _prune(files, plan, output, overwrite)
    finally:
        for file in files:
            file.close()


def _prune(files: Sequence[GgufFile], plan: PruningPlan, output: Path, overwrite: bool) -> GgufCut:
    first = files[0]
    architecture = first.get("general.architecture")
    if not isinstance(architecture, str):
        raise SimdiffError(f"{first.path}: must have general.architecture, got none")
    check_architecture(first, architecture)
    total, predicting = _layer_counts(files, architecture)
    check_plan_matches(first, architecture, total - predicting, plan)
    check_tensors(first, [tensor.name for file in files for tensor in file.tensors])
    check_positions(first, architecture, total - predicting, plan.removed)
    kept = [layer for layer in range(total) if layer not in plan.removed]
    _check_first_layer(files, first, architecture, kept)
    entries, changes = _cut_entries(first, architecture, total, predicting, kept)
    entries.insert(1, text_entry(GGUF_MARK, ",".join(map(str, sorted(plan.removed))).encode()))
    numbers = {layer: new for new, layer in enumerate(kept)}
    pieces = [
        Piece(file, tensor, name)
        for file in files
        for tensor in file.tensors
        if (name := _new_name(tensor.name, numbers)) is not None
    ]
    num_bytes = write_gguf(output, first, entries, pieces, overwrite)
    return GgufCut(output, tuple(kept[: len(kept) - predicting]), tuple(changes), num_bytes)


def examine_gguf(source: Path) -> tuple[str, int, dict[int, str]]:
    """What a GGUF file is, and which of its layers cannot be removed alone.

    Returns:
        Its architecture, its number of layers, and for layers that must stay the reason.

    Raises:
        SimdiffError: the file is damaged, or of an architecture of which no layer can be removed.
    """
    files = _open_parts(source)
    try:
        first = files[0]
        architecture = str(first.get("general.architecture"))
        check_architecture(first, architecture)
        total, predicting = _layer_counts(files, architecture)
        check_tensors(first, [tensor.name for file in files for tensor in file.tensors])
        reasons = {}
        for layer in range(total - predicting):
            try:
                check_positions(first, architecture, total - predicting, (layer,))
                kept = [other for other in range(total) if other != layer]
                _check_first_layer(files, first, architecture, kept)
            except SimdiffError as error:
                reasons[layer] = str(error)
        return architecture, total - predicting, reasons
    finally:
        for file in files:
            file.close()


def _open_parts(source: Path) -> list[GgufFile]:
    """Open the file, or all files of a split model in order."""
    first = GgufFile(source)
    files = [first]
    try:
        count = first.whole("split.count", 1)
        if count <= 1:
            return files
        match = _SHARD.fullmatch(source.name)
        if first.get("split.no", 0) != 0 or match is None or int(match[3]) != count:
            raise SimdiffError(
                f"{source}: is one of {count} files of a split model; name the first one, "
                f"*-00001-of-{count:05d}.gguf, with the others beside it"
            )
        for number in range(2, count + 1):
            path = source.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
            if not path.is_file():
                raise SimdiffError(f"{path}: must lie beside {source.name}, but is missing")
            files.append(GgufFile(path))
            if files[-1].get("split.no") != number - 1:
                raise SimdiffError(
                    f"{path}: must have split.no {number - 1}, got {files[-1].get('split.no')}"
                )
        wanted, found = first.get("split.tensors.count"), sum(len(f.tensors) for f in files)
        if wanted is not None and wanted != found:
            raise SimdiffError(f"{source}: the split model must have {wanted} tensors, got {found}")
    except BaseException:
        for file in files:
            file.close()
        raise
    return files


def _layer_counts(files: Sequence[GgufFile], architecture: str) -> tuple[int, int]:
    """The number of all layers, and of those at the end that predict further tokens."""
    first = files[0]
    total = first.whole(f"{architecture}.block_count", 0)
    if total < 1:
        raise SimdiffError(f"{first.path}: must have {architecture}.block_count, got {total!r}")
    predicting = first.whole(f"{architecture}.nextn_predict_layers", 0)
    if not 0 <= predicting < total:
        raise SimdiffError(
            f"{first.path}: {architecture}.nextn_predict_layers must be below the {total} layers, "
            f"got {predicting}"
        )
    present = set(_suffixes(files))
    # One by one: a damaged count may be any number.
    missing = next((layer for layer in range(total - predicting) if layer not in present), None)
    if missing is not None or max(present) >= total:
        stray = min(layer for layer in present if layer >= total) if missing is None else missing
        raise SimdiffError(
            f"{first.path}: must have tensors for the layers 0 to {total - 1} of "
            f"{architecture}.block_count; layer {stray} "
            + ("is beyond them" if missing is None else "has none")
        )
    return total, predicting


def gguf_depth(source: Path) -> int:
    """The number of layers of a GGUF file that can be removed.

    Raises:
        SimdiffError: the file is damaged or does not tell.
    """
    files = _open_parts(source)
    try:
        total, predicting = _layer_counts(files, str(files[0].get("general.architecture")))
        return total - predicting
    finally:
        for file in files:
            file.close()


def _suffixes(files: Iterable[GgufFile]) -> dict[int, frozenset[str]]:
    """The names of the tensors of each layer, without the layer's prefix."""
    found: dict[int, set[str]] = {}
    for file in files:
        for tensor in file.tensors:
            match = _LAYER_TENSOR.fullmatch(tensor.name)
            if match:
                found.setdefault(int(match[1]), set()).add(match[2])
    return {layer: frozenset(names) for layer, names in found.items()}


def check_plan_matches(
    gguf: GgufFile, architecture: str, num_layers: int, plan: PruningPlan
) -> None:
    """Refuse a plan for another model, as far as the metadata of a GGUF file can show.

    Raises:
        SimdiffError: depth, hidden size or architecture differ.
    """
    from gguf.constants import MODEL_ARCH_NAMES

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    differing = []
    if plan.num_layers != num_layers:
        differing.append(f"num_layers {plan.num_layers} against {num_layers}")
    width, hidden_size = gguf.get(f"{architecture}.embedding_length"), plan.model.get("hidden_size")
    if hidden_size is not None and width is not None and hidden_size != width:
        differing.append(f"hidden_size {hidden_size} against {width}")
    family = plain(
        re.sub(r"(For\w+|LMHeadModel|Model)$", "", str(plan.model.get("architecture", "")))
    )
    # One GGUF architecture serves several classes (llama: Mistral, Mixtral), so only a class that
    # has an architecture of its own is compared.
    known = {plain(name) for name in MODEL_ARCH_NAMES.values()}
    if family in known and family != plain(architecture):
        differing.append(f"architecture {plan.model['architecture']} against {architecture}")
    if differing:
        raise SimdiffError(
            f"{gguf.path}: the plan was made for another model, {plan.model.get('name')!r}: "
            + ", ".join(differing)
        )


def _check_first_layer(
    files: Sequence[GgufFile], first: GgufFile, architecture: str, kept: Sequence[int]
) -> None:
    """Refuse to remove a first layer whose tensors differ from those of all others (RWKV 7)."""
    suffixes = _suffixes(files)
    others = [names for layer, names in suffixes.items() if layer != 0]
    dense = first.whole(f"{architecture}.leading_dense_block_count", 0)
    alone = len(set(others)) == 1 and others[0] != suffixes[0]
    if kept[0] != 0 and alone and not dense:
        raise SimdiffError(
            f"{first.path}: layer 0 has other tensors than all the others and a runtime expects "
            "them there: it must stay; protect layer 0 in the plan"
        )


def _new_name(name: str, numbers: dict[int, int]) -> str | None:
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None:
        return name
    new = numbers.get(int(match[1]))
    return None if new is None else f"blk.{new}.{match[2]}"


def _cut_entries(
    gguf: GgufFile, architecture: str, total: int, predicting: int, kept: Sequence[int]
) -> tuple[list[bytes], list[str]]:
    """The metadata of the output as bytes, and its changes in words."""
    leading = gguf.whole(f"{architecture}.leading_dense_block_count", 0)
    dense = sum(layer < leading for layer in kept)
    numbers = {"block_count": len(kept), "leading_dense_block_count": dense}
    lengths = (total, total - predicting)
    entries, changes = [], []
    for key, entry in gguf.entries.items():
        name = key.removeprefix(f"{architecture}.")
        if key == GGUF_MARK.decode():
            continue  # of an earlier cut, whose layers had other numbers
        if key in _SPLIT_KEYS:
            if gguf.whole("split.count", 1) > 1:
                changes.append(f"{key}: dropped, the output is one file")
                continue
            entries.append(gguf.raw(entry))
        elif name == key:
            entries.append(gguf.raw(entry))
        elif gguf.is_array(key) and is_per_layer(name, entry.count, lengths):
            stay = [layer for layer in kept if layer < entry.count]
            entries.append(gguf.with_elements(entry, stay))
            changes.append(f"{key}: {entry.count} to {len(stay)} elements")
        elif gguf.is_array(key) and not is_unrelated(name):
            raise SimdiffError(
                f"{gguf.path}: {key} is an array of {entry.count} for {total} layers, whose "
                "meaning is unknown here: nothing was cut"
            )
        elif name in numbers and gguf.get(key) != numbers[name]:
            entries.append(gguf.with_value(entry, numbers[name]))
            changes.append(f"{key}: {gguf.get(key)} to {numbers[name]}")
        else:
            entries.append(gguf.raw(entry))
    return entries, changes
