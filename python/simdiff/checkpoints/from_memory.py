"""Write a model that is in memory: its weights anew, all else as its source directory has it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from simdiff.checkpoints.config_file import (
    CONFIG_FILE,
    carry_quantiser,
    config_bytes,
    cut_file,
    drop_quantiser,
)
from simdiff.checkpoints.other_files import (
    QUANTISERS,
    copy_other_files,
    sort_other_files,
    tokenizer_files,
)
from simdiff.checkpoints.quantiser import QUANTISER_ENTRIES, Modules
from simdiff.checkpoints.read_back import read_back
from simdiff.checkpoints.save_order import plain_conversions
from simdiff.checkpoints.shards import DEFAULT_SHARD_SIZE, check_space, parse_size
from simdiff.checkpoints.tensor_names import LayerNumbers, new_numbers
from simdiff.checkpoints.weight_index import weight_files
from simdiff.data.demo import DEMO, demo_model
from simdiff.errors import SimdiffError
from simdiff.io.json_files import load_json
from simdiff.io.kinds import PLAN_FILE
from simdiff.io.outputs import write_bytes
from simdiff.io.progress import step
from simdiff.models.identity import check_same_model
from simdiff.models.loading import load_config, source_directory
from simdiff.models.structure import find_decoder_layers
from simdiff.planning.plan import PruningPlan
from simdiff.surgery.config_entries import Depth, depth_of
from simdiff.surgery.config_patch import set_dtype
from simdiff.surgery.layers import layers_removed

GENERATION = "generation_config.json"


def write_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: PruningPlan,
    directory: Path,
    *,
    source: Path | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> None:
    """Save the model without the plan's layers, its tokenizer and the plan into a directory.

    The model itself is unchanged afterwards. With a directory of `simdiff.io.outputs.new_directory`
    the checkpoint appears whole or not at all. See `write_model`.

    Raises:
        SimdiffError: the plan was made for another model, or what was written is not whole.
        SurgeryError: stock classes cannot express the cut.
    """
    check_same_model(model, plan.model, "plan")
    check_saveable(model)
    source = source or origin(model.name_or_path)
    with layers_removed(model, plan.removed), step("write the pruned checkpoint"):
        write_model(model, tokenizer, plan, directory, source, max_shard_size=max_shard_size)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: PruningPlan,
    directory: Path,
    source: Path | None,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> None:
    """Write a model whose layers are cut already, read it back, and write the plan.

    Config, tokenizer, templates and processors are those of the source directory: what the cut, a
    new dtype or unpacked weights change in config.json is changed there, everything else is copied.
    Without a source they are written as today's transformers writes them.

    Args:
        model: the cut model.
        tokenizer: its tokenizer; copied where it is the one of the source.
        plan: the plan that cut the model.
        directory: an empty directory.
        source: where the dense model lies; None if there is no such directory.
        max_shard_size: limit of the tensors' bytes in one file.

    Raises:
        SimdiffError: the weights cannot be saved, or what was written is not whole.
    """
    depth = Depth(plan.num_layers, tuple(plan.kept))
    check_space(directory, sum(p.numel() * p.element_size() for p in model.parameters()))
    _save_weights(model, directory, parse_size(max_shard_size))
    if source is None:
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    else:
        _write_beside(model, tokenizer, directory, source, plan)
    read_back(directory, type(model), type(model.config), depth)
    plan.save(directory / PLAN_FILE)


def check_saveable(model: PreTrainedModel) -> None:
    """Refuse packed weights that their quantiser cannot save, before anything is done.

    Raises:
        SimdiffError: names the quantiser.
    """
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is None:
        return
    try:
        saveable = bool(quantiser.is_serializable())
    except Exception:  # a quantiser of another package
        saveable = False
    if not saveable:
        raise _packed(model)


def _packed(model: PreTrainedModel) -> SimdiffError:
    kind = getattr(model, "quantization_method", None) or type(model.hf_quantizer).__name__
    return SimdiffError(
        f"weights packed by {getattr(kind, 'value', kind)} cannot be saved from memory: prune the "
        "unquantised model and quantise the result, or give the directory without dtype=..., "
        "whose files are cut"
    )


def origin(name: str, *, fetch: bool = False) -> Path | None:
    """The directory that a model was loaded from; None if it is not on this machine.

    Args:
        name: a directory, a hub name, "demo", or the `name_or_path` of a model.
        fetch: download missing files, such as the licence, of a model of the hub.
    """
    if not name:
        return None
    if name == DEMO:
        return demo_model()
    found: Path | None = Path(name)
    if not Path(name).is_dir():
        found = None
        with contextlib.suppress(Exception):  # neither a hub name nor in the hub's cache
            found = source_directory(name) if fetch else _cached(name)
    return found if found is not None and (found / "config.json").is_file() else None


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, local_files_only=True))


def _save_weights(model: PreTrainedModel, directory: Path, max_shard_size: int) -> None:
    try:
        with _as_it_is_stored(model):
            model.save_pretrained(directory, max_shard_size=max_shard_size)
    except SimdiffError:
        raise
    except Exception as error:  # quantisers and conversions of transformers raise anything
        if getattr(model, "hf_quantizer", None) is not None:
            raise _packed(model) from error
        why = " ".join(str(error).split())[:300]
        raise SimdiffError(
            f"this {type(model).__name__} cannot be saved: {type(error).__name__}: {why}"
        ) from error


@contextlib.contextmanager
def _as_it_is_stored(model: PreTrainedModel) -> Iterator[None]:
    """Let the weights be saved plain if they are plain; undo what saving changes in the model."""
    before = {name: vars(model)[name] for name in ("_weight_conversions",) if name in vars(model)}
    words = {name: vars(model.config).get(name) for name in ("dtype", "architectures")}
    model._weight_conversions = plain_conversions(model)
    try:
        yield
    finally:
        del model._weight_conversions
        vars(model).update(before)
        vars(model.config).update(words)


def _write_beside(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    source: Path,
    plan: PruningPlan,
) -> None:
    """Put config, tokenizer and all other files of the source beside the weights."""
    dense, packed = load_config(source), getattr(model, "hf_quantizer", None) is not None
    depth, found = depth_of(dense, plan.kept), find_decoder_layers(model)
    new = new_numbers(depth.kept, depth.num_layers, ())
    modules = Modules({}, LayerNumbers(found.path, new, found.path))
    others = sort_other_files(source, weight_files(source))
    left = {path for path in others.copied if path.name in QUANTISERS and not packed}
    if tokenizer is not None and not _unchanged(tokenizer, source):
        left |= set(tokenizer_files(others.copied))
        tokenizer.save_pretrained(directory)
    if _same_generation(model, source, dense):
        (directory / GENERATION).unlink(missing_ok=True)
    else:
        left.add(Path(GENERATION))
    copied = tuple(path for path in others.copied if path not in left)
    copy_other_files(replace(others, copied=copied), source, directory, modules)
    if type(dense) is not type(model.config):
        return  # the decoder of a composite checkpoint: its config is another than the source's
    entries = cut_file(source, dense, model.config, depth, type(model).__name__)
    if packed:
        saved = load_json(directory / CONFIG_FILE).get("quantization_config")
        if saved and not any(name in entries for name in QUANTISER_ENTRIES):
            entries["quantization_config"] = saved
        carry_quantiser(entries, dense, modules, str(source / CONFIG_FILE))
    else:
        drop_quantiser(entries, dense)
    dtype = str(model.dtype).removeprefix("torch.")
    if {"dtype", "torch_dtype"}.isdisjoint(entries) or model.dtype != dense.dtype:
        set_dtype(entries, dtype)
    write_bytes(directory / CONFIG_FILE, config_bytes(entries, source))


def _unchanged(tokenizer: PreTrainedTokenizerBase, source: Path) -> bool:
    """Whether a tokenizer is the one that lies in a directory."""
    try:
        own = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:  # no tokenizer there, or one of another class
        return False
    return bool(
        own.get_vocab() == tokenizer.get_vocab()
        and own.special_tokens_map == tokenizer.special_tokens_map
        and own.chat_template == tokenizer.chat_template
        and own.padding_side == tokenizer.padding_side
    )


def _same_generation(model: PreTrainedModel, source: Path, dense: PreTrainedConfig) -> bool:
    """Whether a model generates as the files of its source say."""
    own = getattr(model, "generation_config", None)
    try:
        if (source / GENERATION).is_file():
            stored = GenerationConfig.from_pretrained(source)
        else:
            stored = GenerationConfig.from_model_config(dense)
    except Exception:  # transformers found no use for it either, and it is copied as it is
        return True
    return own is None or _settings(own) == _settings(stored)


def _settings(config: GenerationConfig) -> dict[str, Any]:
    settings: dict[str, Any] = config.to_dict()
    return {
        name: value
        for name, value in settings.items()
        if not name.startswith("_") and name != "transformers_version"
    }
