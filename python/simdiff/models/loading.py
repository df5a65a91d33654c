"""The one way in: load models, tokenizers, configs with the stock classes of transformers.

What a model's files are is asked before anything is loaded (`files`), its class is the one that its
config names (`classes`), every weight must have come from the files (`loaded`), and what libraries
raise on the way becomes one sentence (`foreign`). Code of a checkpoint is never run, nor asked for.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import cached_file

from simdiff.data.demo import DEMO, demo_model
from simdiff.errors import SimdiffError, nearest_path
from simdiff.io import ranks
from simdiff.io.progress import step
from simdiff.models.classes import auto_class
from simdiff.models.config import quantization
from simdiff.models.devices import own_device, own_memory
from simdiff.models.files import (
    ADAPTER_USE,
    GGUF_USE,
    check_kind,
    check_name,
    check_weights,
    read_config,
)
from simdiff.models.foreign import foreign, in_one_line, quietly
from simdiff.models.loaded import check_loaded
from simdiff.models.streamed import StreamOptions, streamed_model
from simdiff.models.weights import remember_files

DTYPES: dict[str, Any] = {
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

_QUANTISED = (
    "score the unquantised model, and prune this one's files with that plan (simdiff prune MODEL "
    "--plan plan.json)"
)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    description: str | None = None,
    stream: StreamOptions | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a language model as the stock class that its config names, ready for inference.

    Args:
        name: a local directory, a hub name, or "demo".
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "cuda:1", or "auto" to spread over all GPUs; None takes the GPU
            if there is one. Of several processes on a machine each takes a GPU of its own, and with
            "auto" its share of them.
        description: text of the progress line.
        stream: how a model larger than memory is held, whose layers are loaded one at a time; None
            loads every model whole.

    Raises:
        SimdiffError: the model or the device does not exist, it is no causal or vision-language
            model of stock transformers, its files are not all of it, or its format cannot run here.
    """
    if dtype not in DTYPES:
        raise SimdiffError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    device = own_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check_device(device)
    what = f"model {name!r}"
    with step(description or f"load {name}"), quietly():
        path, directory = find_model(name)
        check_kind(directory)
        config = load_config(directory)
        auto_class(config, what)
        check_quantiser(config, what)
        if Path(path).is_dir():
            check_weights(directory)
        tokenizer = load_tokenizer(path, directory, what)
        wanted = stream is not None and stream.is_for(directory, DTYPES[dtype], device, name)
        if stream is not None and any(ranks.gather(wanted)):  # of no process alone
            model, loading = streamed_stock(path, config, what, dtype, device, stream)
            check_loaded(model, loading, what)
            remember_files(model, directory)
            return model.eval(), tokenizer
        model, loading = stock_model(path, config, what=what, dtype=dtype, device=device)
        check_loaded(model, loading, what)
        _check_runs(model, what)
        remember_files(model, directory)
    return model.eval(), tokenizer


def streamed_stock(
    path: str, config: PreTrainedConfig, what: str, dtype: str, device: str, stream: StreamOptions
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model whose layers have no weights yet; see `simdiff.models.streamed`."""
    if device == "auto":
        raise SimdiffError(f"{what}: a streamed model runs on one device, got device=auto")

    def load() -> tuple[PreTrainedModel, dict[str, Any]]:
        return stock_model(path, config, what=what, dtype=dtype, device=None)

    kind = type(meta_model(config))
    return streamed_model(kind, load, what, torch.device(device), stream)


def stock_model(
    path: str | Path,
    config: PreTrainedConfig,
    *,
    what: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = "cpu",
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of the class that its config names, and what loading it reported.

    Args:
        path: a directory or a hub name.
        config: of the model.
        what: the model, for messages.
        dtype, device: see `load_model`; with None as device it stays where it was loaded.

    Raises:
        SimdiffError: the class cannot be used, or transformers cannot load the model.
    """
    what = what or str(path)
    auto = auto_class(config, what)
    wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
    options: dict[str, Any] = {}
    if device == "auto":
        options = {"device_map": "auto", "max_memory": own_memory()}
    packed = quantization(config)
    if packed and device not in ("auto", None):  # its weights are placed as they are unpacked
        options = {"device_map": {"": device}}
    advice = f"it is quantised as {_method(packed)!r}; {_QUANTISED}" if packed else ""
    with foreign(f"{what}: cannot be loaded", advice), quietly():
        model, loading = auto.from_pretrained(
            str(path),
            config=config,
            dtype=wanted,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and then refused
            **options,
        )
        if not options and device is not None:
            model = model.to(device)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SimdiffError(f"{what}: holds an adapter beside its model: {ADAPTER_USE}")
    return model, loading


def load_tokenizer(path: str | Path, directory: Path, what: str) -> Tokenizer:
    """The tokenizer of a model; code of the checkpoint is not run.

    Raises:
        SimdiffError: there is none, or it cannot be loaded; says what to do.
    """
    if _lacks_tokenizer(directory) and Path(path).is_dir():
        raise SimdiffError(
            f"{what} must have a tokenizer, and its directory holds no file of one "
            "(tokenizer.json, tokenizer.model or vocab.*): copy those of the original"
        )
    with foreign(f"{what}: its tokenizer cannot be loaded", "copy those files of the original"):
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)


def _lacks_tokenizer(directory: Path) -> bool:
    """Whether a directory holds no file from which a tokenizer could be made."""
    patterns = ("tokenizer.*", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
    return not any(any(directory.glob(pattern)) for pattern in patterns)


def find_model(name: str) -> tuple[str, Path]:
    """What transformers is told of a model, and the directory with its config.json.

    Raises:
        SimdiffError: there is no such directory or file, and the hub lacks it or is not reached.
    """
    if name == DEMO:
        # Converted on first use, by one process of each machine.
        ranks.all_of(lambda: demo_model() if ranks.local()[0] == 0 else None)
        with ranks.alone():
            directory = demo_model()
        return str(directory), directory
    path = Path(name)
    check_name(name)
    return name, path if path.exists() else _hub_directory(name)


def _hub_directory(name: str) -> Path:
    """The directory in the hub's cache that holds a model's config.json."""
    what = f"model {name!r} must be a directory or a hub name"
    if name.endswith(".gguf"):
        raise SimdiffError(f"{what}, and there is no such file; of a GGUF file, {GGUF_USE}")
    try:
        found = cached_file(name, "config.json")
    except Exception as error:
        if "does not appear to have a file named" in str(error):
            raise SimdiffError(
                f"{what} with config.json, and {name} has none: an adapter must be merged into its "
                "base model first, and of GGUF files the original must be given"
            ) from None
        raise SimdiffError(
            f"{what} that transformers loads: {in_one_line(error)}{nearest_path(Path(name))}"
        ) from None
    return Path(str(found)).parent


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
    if Path(name).is_file():
        check_kind(Path(name))
    check_name(name)
    from huggingface_hub import snapshot_download

    try:
        with step(f"find {name}"):
            return Path(snapshot_download(name, ignore_patterns=list(_NOT_FETCHED)))
    except Exception as error:
        raise SimdiffError(
            f"model {name!r} must be a directory or a hub name: {in_one_line(error)}"
            f"{nearest_path(Path(name))}"
        ) from None


def load_config(directory: Path) -> PreTrainedConfig:
    """Read the config of a checkpoint with the stock class; code in the checkpoint is not run.

    Raises:
        SimdiffError: config.json is missing or damaged, or transformers does not know the model.
    """
    path, content = directory / "config.json", read_config(directory)
    kind = content.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        known = f"{path}: must be the config of a model that stock transformers knows"
        if "auto_map" in content:
            raise SimdiffError(
                f"{known}, and asks for code of its own (auto_map), which simdiff never runs: take "
                "a version of the model for stock transformers"
            )
        if not kind:
            raise SimdiffError(f"{known}, and has no model_type: take the original's config.json")
        raise SimdiffError(
            f"{known}, and transformers {transformers.__version__} does not know model_type "
            f"{kind!r}: a later version may (pip install --upgrade transformers)"
        )
    with foreign(f"{path}: must be the config of a model that stock transformers knows"):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the stock model of a config on the meta device: all names and shapes, no weights.

    Raises:
        SimdiffError: the config is of no causal or vision-language model, or is inconsistent.
    """
    auto = auto_class(config)
    kind = type(config).__name__
    with foreign(f"the config ({kind}) must describe a language model"), torch.device("meta"):
        return auto.from_config(copy.deepcopy(config)).eval()


def check_quantiser(config: PreTrainedConfig, what: str) -> None:
    """Refuse weights in a format that transformers does not know.

    Raises:
        SimdiffError: names the format, and what to do instead.
    """
    found = quantization(config)
    if found is None:
        return
    try:
        known = AutoHfQuantizer.supports_quant_method(found)
    except ValueError:
        known = False
    if not known:
        raise SimdiffError(
            f"{what}: is quantised as {_method(found)!r}, which transformers "
            f"{transformers.__version__} cannot read: {_QUANTISED}"
        )


def _method(quantised: dict[str, Any]) -> str:
    """The name of a quantisation."""
    method = quantised.get("quant_method") or quantised.get("quant_algo") or "unknown"
    return str(getattr(method, "value", method))


@torch.inference_mode()
def _check_runs(model: PreTrainedModel, what: str) -> None:
    """Run weights of other formats on two tokens: kernels may be missing although it was loaded."""
    usual = model.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if usual and getattr(model, "hf_quantizer", None) is None:
        return
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    with foreign(f"{what}: cannot run here", f"weights are {model.dtype}; {_QUANTISED}"), quietly():
        model(input_ids=ids, use_cache=False)


def _check_device(device: str) -> None:
    try:
        wanted = torch.device("cuda" if device == "auto" else device)
    except RuntimeError:
        raise SimdiffError(f"device must be cpu, cuda, cuda:N or auto, got {device!r}") from None
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise SimdiffError(f"device must be one that torch can use, got {device!r} without a GPU")
    if wanted.type == "cuda" and (wanted.index or 0) >= (count := torch.cuda.device_count()):
        raise SimdiffError(f"device must be one of cuda:0 to cuda:{count - 1}, got {device!r}")
