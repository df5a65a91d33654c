"""Load models, configs and checkpoint directories with the stock classes of transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from simdiff.data.demo import DEMO, demo_model
from simdiff.errors import SimdiffError
from simdiff.io.progress import step

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_NOT_FETCHED = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx*",
    "original/*",
    "consolidated*",
)


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None, description: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model with stock classes, ready for inference.

    Args:
        name: a local directory, a hub name, or "demo".
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "cuda:1", or "auto" to spread over all GPUs; None takes the GPU
            if there is one.
        description: text of the progress line.

    Raises:
        SimdiffError: the model or the device does not exist.
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
    """Whether a directory holds a model but no file from which a tokenizer could be made."""
    if not (directory / "config.json").is_file():
        return False
    patterns = ("tokenizer.*", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
    return not any(any(directory.glob(pattern)) for pattern in patterns)


def source_directory(name: str) -> Path:
    """The directory of a model's files: `name` itself, the demo model's, or a hub snapshot.

    Missing files of a snapshot are downloaded, but not weights in other formats.

    Raises:
        SimdiffError: there is no such directory, and the hub lacks the model or cannot be reached.
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
    """Read the config of a checkpoint with the stock class; code in the checkpoint is not run.

    Raises:
        SimdiffError: config.json is missing or damaged, or transformers does not know the model.
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
    """Build the stock model of a config on the meta device: all names and shapes, no weights.

    Raises:
        SimdiffError: the config has no causal language model, or is inconsistent.
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
