"""Checks of a directory for vLLM's no-op blocks, which `simdiff export --format vllm` writes.

Stock classes have no layer without its attention or its MLP, so nothing is loaded: config and
tensors are held against the plan that lies beside them, and against the original's files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaConfig

from simdiff.checkpoints.config_file import CONFIG_FILE, read_entries
from simdiff.checkpoints.no_op_blocks import CLASS, CODE, CODE_FILE, removed_prefixes, with_blocks
from simdiff.checkpoints.weight_index import read_weights
from simdiff.errors import SimdiffError
from simdiff.io.kinds import PLAN_FILE
from simdiff.models.loading import meta_model, source_directory
from simdiff.provenance.subject import Fault, Skip, Subject, UnusableError
from simdiff.sublayers.plan import SublayerPlan


def is_one(directory: Path) -> bool:
    """Whether a directory's config.json names vLLM's class for no-op blocks."""
    try:
        return read_entries(directory).get("architectures") == [CLASS]
    except SimdiffError:
        return False


def not_stock(_: Subject) -> str:
    """Say why no stock class loads it."""
    raise Skip(f"no stock class has no-op blocks; vLLM's {CLASS} reads them")


def config(subject: Subject) -> str:
    """Check that the code beside config.json is what was written, since vLLM will run it."""
    entries = subject.config = read_entries(subject.directory)
    named = entries.get("auto_map")
    wanted = {"AutoConfig": f"{CODE_FILE.removesuffix('.py')}.NoOpBlocksConfig"}
    if named != wanted:
        raise Fault(f"auto_map must be {wanted}, got {named}")
    path = subject.directory / CODE_FILE
    if not path.is_file() or path.read_text(encoding="utf-8") != CODE:
        raise Fault(f"{CODE_FILE} must be what simdiff writes, which vLLM runs, and is not")
    return f"{CLASS}, whose code beside it is as it was written and was not run"


def plan(subject: Subject) -> str:
    """Check that the blocks are those of the plan."""
    entries, found = subject.config, _plan(subject)
    held = entries.get("block_configs")
    blocks = held if isinstance(held, list) else []
    wanted = with_blocks(entries, found)["block_configs"]
    count = len(blocks)
    if count != entries.get("num_hidden_layers"):
        raise Fault(f"block_configs has {count} entries for {entries['num_hidden_layers']} layers")
    wrong = [index for index, block in enumerate(wanted) if blocks[index] != block]
    if wrong or count != len(wanted):
        raise Fault(f"the plan and block_configs differ, first in layer {[*wrong, count][0]}")
    return f"{len(found.removed)} sub-layers of {count} layers are no-ops, as in the plan"


def weights(subject: Subject) -> str:
    """Check names and shapes of the tensors against LLaMA's, less the sub-layers of the plan."""
    gone = removed_prefixes(_plan(subject))
    entries = {k: v for k, v in subject.config.items() if k not in ("auto_map", "model_type")}
    model = meta_model(LlamaConfig.from_dict(entries | {"architectures": ["LlamaForCausalLM"]}))
    whole = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {n: t.shape for n, t in read_weights(subject.directory).tensors.items()}
    tied = set(model.all_tied_weights_keys) - stored.keys()
    wanted = {n: s for n, s in whole.items() if not n.startswith(gone) and n not in tied}
    wrong = sorted(n for n in wanted.keys() | stored.keys() if wanted.get(n) != stored.get(n))
    if wrong:
        name = wrong[0]
        raise Fault(
            f"{len(wrong)} tensors are not those of the blocks, first {name}: shape "
            f"{stored.get(name, 'none')} against {wanted.get(name, 'none')}"
        )
    return f"{len(stored)} tensors, those of the blocks and nothing else"


def finite(subject: Subject) -> str:
    """Check every number of every tensor, one tensor at a time."""
    found = read_weights(subject.directory).tensors
    bad = [n for n, t in found.items() if not bool(torch.isfinite(_read(t.path, n)).all())]
    if bad:
        raise Fault(f"NaN or Inf in {len(bad)} tensors, first in {bad[0]}")
    return "all tensors"


def against(subject: Subject) -> str:
    """Check that every tensor is the original's, bit for bit."""
    try:
        original = read_weights(source_directory(str(subject.against))).tensors
    except SimdiffError as error:
        raise UnusableError(
            f"verify: against={subject.against} must be a safetensors checkpoint: {error}"
        ) from None
    found = read_weights(subject.directory).tensors
    unequal = [
        name
        for name, tensor in found.items()
        if name not in original or not _equal(_read(tensor.path, name), original[name].path, name)
    ]
    if unequal:
        raise Fault(f"{len(unequal)} tensors differ, first {unequal[0]}")
    return f"all {len(found)} tensors, exactly"


def _plan(subject: Subject) -> SublayerPlan:
    if not subject.config:
        raise Skip(f"needs {CONFIG_FILE} as it was written")
    if not (subject.directory / PLAN_FILE).exists():
        raise Skip(f"no {PLAN_FILE}: simdiff did not write this directory")
    return SublayerPlan.load(subject.directory / PLAN_FILE)


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _equal(tensor: torch.Tensor, path: Path, name: str) -> bool:
    other = _read(path, name)
    return tensor.dtype == other.dtype and torch.equal(tensor, other)
