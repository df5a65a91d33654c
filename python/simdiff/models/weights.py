"""What tells models of equal shapes apart: digests of samples of their weights.

A record of weights has two digests, each a SHA-256 over names, shapes and 256 values of every
tensor: sixteen runs of sixteen neighbours that lie evenly over it, rounded to bfloat16 (integers,
as packed weights are, as they are). `files` is of safetensors files, whatever they are loaded as,
streamed or quantised too. `memory` is of the parameters in memory, by their names there; there is
none where values were rounded or packed on the way to bfloat16, as in float16.
`simdiff.models.files.same_weights` compares.

What they promise: copies have the same digests, in other dtypes and other files too, as far as
those hold the same bfloat16 values. A tensor that changes as a whole, by a repair or a fine-tuning,
changes them. So does a change of neighbouring rows, from an eleventh of their tensor on; smaller
changes may be missed.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.io.json_text import json_text
from simdiff.io.safetensors_header import StoredTensor, read_header
from simdiff.models.files import weight_files
from simdiff.models.streamed import stream_of
from simdiff.models.structure import text_config
from simdiff.models.tensor_reader import DTYPES

_ATTRIBUTE = "_simdiff_loaded_from"
_RUNS = 16
_RUN = 16
# Multiples of this modulo 1 lie evenly in [0, 1): of sixteen no two neighbours are 1/11 apart.
_GOLDEN = (math.sqrt(5) - 1) / 2
_EXACT = (torch.float64, torch.float32, torch.bfloat16)
# Number of entries of every parameter by which a model in memory is told from what it was.
_SAMPLED_VALUES = 64


@dataclass(frozen=True)
class _Loaded:
    """Where a model came from, and how it was when it did."""

    directory: Path
    state: str


def remember_files(model: PreTrainedModel, directory: Path) -> None:
    """Note on a model that its weights are those of a directory, as long as they stay as they are.

    Args:
        model: as it was just loaded.
        directory: with its config.json.
    """
    setattr(model, _ATTRIBUTE, _Loaded(directory, _state(model)))


def weights_of(model: PreTrainedModel) -> dict[str, str]:
    """The digests of a model's weights as they are now, see above; those that there are."""
    found = {}
    loaded: _Loaded | None = getattr(model, _ATTRIBUTE, None)
    if loaded is not None and loaded.state == _state(model):
        found = stored_weights(loaded.directory)
    memory = None if is_packed(model) or stream_of(model) is not None else _memory_digest(model)
    return found if memory is None else found | {"memory": memory}


def stored_weights(directory: Path) -> dict[str, str]:
    """The digest of a checkpoint's files; empty where they are no whole safetensors files."""
    digests = {}
    with contextlib.suppress(SimdiffError, OSError):
        for path in weight_files(directory):
            if path.suffix != ".safetensors":
                return {}
            with path.open("rb") as file:
                for tensor in read_header(path)[1]:
                    digests[tensor.name] = _stored_digest(tensor, file.fileno())
        return {"files": _digest(digests)}
    return {}


def is_packed(model: PreTrainedModel) -> bool:
    """Whether a quantiser holds a model's parameters in a form of its own."""
    return bool(getattr(model, "is_quantized", False)) or (
        getattr(model, "hf_quantizer", None) is not None
    )


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over a few values of every parameter as it is in memory, and the names of all.

    Unlike the digests above it tells dtypes apart, and is for one machine: what is streamed is told
    by the size and the time of its files.
    """
    digest = hashlib.sha256()
    stream = stream_of(model)
    if stream is not None:
        return hashlib.sha256(json_text(dict(sorted(stream.files.items()))).encode()).hexdigest()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            digest.update(name.encode())
            if parameter.is_meta:
                continue
            flat = parameter.reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)]
            digest.update(sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _state(model: PreTrainedModel) -> str:
    """What changes when the model in memory is no longer what its files hold."""
    if is_packed(model):  # packed anew by kernels at any time, and never trained
        return str(getattr(text_config(model), "num_hidden_layers", None))
    stream = stream_of(model)
    names = [name for name, _ in model.named_parameters()]
    replaced = [] if stream is None else sorted(stream.replaced)
    return _digest({"": weights_digest(model), "names": "\n".join([*names, "", *replaced])})


def _runs(count: int) -> list[tuple[int, int]]:
    """First and end of the runs of entries that are sampled of so many."""
    if count <= _RUNS * _RUN:
        return [(0, count)]
    places = [int((number * _GOLDEN % 1) * (count - _RUN + 1)) for number in range(_RUNS)]
    return [(place, place + _RUN) for place in places]


def _memory_digest(model: PreTrainedModel) -> str | None:
    parameters = dict(model.named_parameters())
    if any(one.is_meta or one.dtype not in _EXACT for one in parameters.values()):
        return None
    return _digest({name: _parameter_digest(one) for name, one in parameters.items()})


@torch.no_grad()
def _parameter_digest(parameter: Tensor) -> str:
    flat = parameter.reshape(-1)
    sample = torch.cat([flat[first:end] for first, end in _runs(flat.numel())])
    return _tensor_digest(parameter.shape, _rounded(sample))


def _stored_digest(tensor: StoredTensor, descriptor: int) -> str:
    dtype = DTYPES.get(tensor.dtype)
    count = tensor.num_bytes if dtype is None else math.prod(tensor.shape)
    size = 1 if dtype is None else dtype.itemsize
    content = b"".join(
        os.pread(descriptor, (end - first) * size, tensor.start + first * size)
        for first, end in _runs(count)
    )
    if dtype is not None and dtype.is_floating_point and content:
        content = _rounded(torch.frombuffer(bytearray(content), dtype=dtype))
    return _tensor_digest(tensor.shape, content)


def _rounded(values: Tensor) -> bytes:
    return values.to(torch.bfloat16).cpu().view(torch.uint8).numpy().tobytes()


def _tensor_digest(shape: Iterable[int], content: bytes) -> str:
    return hashlib.sha256(f"{tuple(shape)}".encode() + content).hexdigest()


def _digest(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json_text(dict(sorted(parts.items()))).encode()).hexdigest()
