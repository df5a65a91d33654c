"""Loading models, finding their decoder layers, and telling one model from another."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from simdiff.demo import DEMO, demo_model
from simdiff.errors import SimdiffError
from simdiff.layer_entries import layer_counts, text_part
from simdiff.progress import step

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_NOT_FETCHED = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx*", "original/*",
                "consolidated*")  # fmt: skip


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None, description: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model with stock classes, ready for inference.

    Args:
        name: a local directory, a hub name, or "demo".
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "cuda:1", or "auto" to spread over all GPUs; None takes the GPU
            if there is one.
        description: what the progress line says.

    Raises:
        SimdiffError: no such model, or no such device.
    """
    transformers_logging.disable_progress_bar()
    path = str(demo_model()) if name == DEMO else name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    try:
        with step(description or f"load {name}"):
            tokenizer = AutoTokenizer.from_pretrained(path)
            placement = {"device_map": "auto"} if device == "auto" else {}
            model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], **placement)
            if device != "auto":
                model = model.to(device)
    except (OSError, ValueError, KeyError) as error:
        if _lacks_tokenizer(Path(path)):
            raise SimdiffError(
                f"model {name!r} must have a tokenizer, and its directory holds no file of one "
                "(tokenizer.json, tokenizer.model or vocab.*): copy those of the original"
            ) from None
        kind = "a directory with a model" if Path(path).exists() else "a directory or a hub name"
        raise SimdiffError(
            f"model {name!r} must be {kind} that transformers loads: {error}"
        ) from None
    return model.eval(), tokenizer


def _lacks_tokenizer(directory: Path) -> bool:
    """Whether a directory has a model and nothing that a tokenizer could be made from."""
    if not (directory / "config.json").is_file():
        return False
    patterns = ("tokenizer.*", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
    return not any(any(directory.glob(pattern)) for pattern in patterns)


def source_directory(name: str) -> Path:
    """The directory that holds a model's files: itself, the demo's, or the hub's snapshot.

    A snapshot is completed if parts of it are missing; weights in other formats are not fetched.

    Raises:
        SimdiffError: no such directory, and no such model on the hub or none that can be reached.
    """
    if name == DEMO:
        return demo_model()
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with step(f"find {name}"):
            return Path(snapshot_download(name, ignore_patterns=list(_NOT_FETCHED)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as err:
        raise SimdiffError(f"model {name!r} must be a directory or a hub name: {err}") from None


def load_config(directory: Path) -> PreTrainedConfig:
    """The config of a checkpoint, read by the stock class; no code of the checkpoint is run.

    Raises:
        SimdiffError: no config.json, damaged, or of a model that stock transformers does not know.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise SimdiffError(f"{directory}: must hold config.json, and does not")
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SimdiffError(f"{path}: must be JSON, but is not: {error}") from None
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SimdiffError(
            f"{path}: must be the config of a model that stock transformers knows: {error}"
        ) from None


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The stock model of a config on the meta device: all names and shapes, no weights.

    Raises:
        SimdiffError: the config has no causal language model, or an inconsistent one.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SimdiffError(
            f"the config ({type(config).__name__}) must describe a causal language model of stock "
            f"transformers: {error}"
        ) from None


def _check_device(device: str) -> None:
    try:
        wanted = torch.device("cuda" if device == "auto" else device)
    except RuntimeError:
        raise SimdiffError(f"device must be cpu, cuda, cuda:N or auto, got {device!r}") from None
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise SimdiffError(f"device must be one that torch can use, got {device!r} without a GPU")


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of a model and where they hang in it."""

    path: str
    modules: nn.ModuleList

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.modules)


def text_config(model: PreTrainedModel) -> Any:
    """The part of the config that describes the decoder; never a copy."""
    return text_part(model.config)


def find_decoder_layers(model: PreTrainedModel) -> DecoderLayers:
    """The list of decoder layers, found by structure.

    It is the outermost `nn.ModuleList` as long as the config's number of layers; if a vision or
    audio tower has a list of that length too, the one of the module with the text config.

    Raises:
        SimdiffError: the config has no number of layers, there is no such list, or more than one.
    """
    text = text_config(model)
    counts = layer_counts(text)
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    candidates = [path for path, module in lists.items() if len(module) in counts.values()]
    # A list inside a layer (of experts, say) may happen to have the same length.
    outermost = [
        path
        for path in candidates
        if not any(path.startswith(other + ".") for other in lists if other != path)
    ]
    if len(outermost) > 1:
        outermost = [path for path in outermost if _owner_config(model, path) is text]
    if len(outermost) != 1:
        found = ", ".join(f"{path} ({len(module)})" for path, module in lists.items()) or "none"
        wanted = " or ".join(f"{count} decoder layers ({name})" for name, count in counts.items())
        raise SimdiffError(
            f"{type(model).__name__} must have one list of {wanted} like its config; "
            f"lists found: {found}"
        )
    return DecoderLayers(outermost[0], lists[outermost[0]])


def _owner_config(model: PreTrainedModel, path: str) -> Any:
    """The config of the innermost module around a path that has one."""
    names = path.split(".")
    for length in range(len(names) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(names[:length])), "config", None)
        if config is not None:
            return config
    return None


def decoder_body(model: PreTrainedModel) -> nn.Module:
    """The model without its language-model head, so that no logits are computed."""
    path = find_decoder_layers(model).path
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    inside = any(module is model.get_submodule(path) for module in body.modules())
    return body if inside else model.base_model


def model_identity(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What a file remembers of the model it was made for.

    `fingerprint` is a SHA-256 over the names and shapes of all parameters: the same for copies,
    other dtypes and fine-tuned versions, another for any other model.
    """
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode())
    return {
        "name": name,
        "architecture": type(model).__name__,
        "num_layers": len(find_decoder_layers(model)),
        "hidden_size": text_config(model).hidden_size,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "layer_parameters": [
            sum(p.numel() for p in layer.parameters())
            for layer in find_decoder_layers(model).modules
        ],
        "embedding_parameters": _lookup_parameters(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": digest.hexdigest(),
    }


def _lookup_parameters(model: PreTrainedModel) -> int:
    """Parameters of an input embedding of its own, of which decoding reads one row per token."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        return 0
    return int(embedding.weight.numel())


def check_same_model(model: PreTrainedModel, made_for: dict[str, Any], what: str) -> None:
    """Refuse scores or a plan that were made for another model.

    Raises:
        SimdiffError: the fingerprints differ.
    """
    identity = model_identity(model, "")
    if identity["fingerprint"] != made_for.get("fingerprint"):
        differing = ", ".join(
            f"{key} {made_for.get(key)} against {identity[key]}"
            for key in ("architecture", "num_layers", "hidden_size", "num_parameters")
            if made_for.get(key) != identity[key]
        )
        raise SimdiffError(
            f"the {what} was made for another model, {made_for.get('name')!r}: "
            f"{differing or 'parameters have other names or shapes'}"
        )
