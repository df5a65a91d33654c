"""The one way in: where a name leads, and what is refused with what to do."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simdiff.data.demo import demo_model
from simdiff.errors import SimdiffError
from simdiff.models.loading import load_model, source_directory
from support.checkpoints import edit_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def test_where_a_name_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache as it lies on disk: names of commits, links to blobs."""
    assert source_directory(str(tmp_path)) == tmp_path
    assert source_directory("demo") == demo_model()
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert source_directory("someone/tiny") == snapshot
    for name in ("someone/else", str(tmp_path / "none"), "a b"):
        for function in (source_directory, load_model):
            wanted = "must be a directory or a hub name" if name[0] == "s" else "no such directory"
            with pytest.raises(SimdiffError, match=wanted) as error:
                function(name)
            assert len(str(error.value)) < 400


def config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def weights(change: Callable[[dict], dict]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        stored = change(load_file(folder / WEIGHTS))
        save_file(stored, folder / WEIGHTS, {"format": "pt"})

    return edit


def both(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder) for change in changes]


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]


def quantised(**entries: object) -> Callable[[Path], object]:
    return config(quantization_config=entries)


def halved(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
ADAPTER = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
REMOTE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
RUNS = "print('CODE OF THE CHECKPOINT RUNS')"
FIRST = "model.layers.0.mlp.up_proj.weight"

FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "deeper config": (config(num_hidden_layers=8), "says 8 decoder layers, the files hold 6"),
    "shallower config": (config(num_hidden_layers=4), "says 4 decoder layers, the files hold 6"),
    "compiled": (
        weights(lambda w: {"_orig_mod." + k: v for k, v in w.items()}),
        r"begin with '_orig_mod\.'.*model\._orig_mod of a compiled one",
    ),
    "parallel": (
        weights(lambda w: {"module." + k: v for k, v in w.items()}),
        r"begin with 'module\.'",
    ),
    "no head": (
        weights(lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}),
        "lm_head.weight, the language-model head, is not in the files",
    ),
    "a weight is missing": (
        weights(lambda w: {k: v for k, v in w.items() if k != FIRST}),
        f"{FIRST} is not in the files, so that they would be random",
    ),
    "quantiser's tensors": (
        weights(lambda w: {**w, FIRST + "_scale": w[FIRST][:1, 0].clone()}),
        "tensors of a quantiser .*give the unquantised model",
    ),
    "an adapter was saved with it": (
        weights(lambda w: {**w, FIRST.replace("weight", "lora_A.weight"): w[FIRST].clone()}),
        "have no place in LlamaForCausalLM.*merge it",
    ),
    "vocabulary": (config(vocab_size=300), r"shape \(97, 32\) in the files and \(300, 32\) by"),
    "reward model": (
        config(architectures=["LlamaForSequenceClassification"]),
        "head of a classifier or reward model",
    ),
    "unknown quantiser": (
        quantised(quant_method="modelopt", quant_algo="FP8"),
        "is quantised as 'modelopt', which transformers .*score the unquantised model",
    ),
    "nameless quantiser": (quantised(quant_algo="FP8"), "quantised as 'FP8', which"),
    "GPTQ": (quantised(quant_method="gptq", bits=4), "GPTQ.*; it is quantised as 'gptq'; score"),
    "flash attention": (
        config(attn_implementation="flash_attention_2"),
        "flash attention, which cannot run here: remove attn_implementation",
    ),
    "half a file": (halved, "model.safetensors: is damaged or not whole"),
    "empty file": (text(WEIGHTS, ""), "model.safetensors: is empty"),
    "Git LFS": (text(WEIGHTS, POINTER), "is a Git LFS pointer.*git lfs pull"),
    "tokenizer in Git LFS": (text("tokenizer.json", POINTER), "tokenizer.json: is a Git LFS poin"),
    "a link to nowhere": (
        both(without(WEIGHTS), lambda folder: (folder / WEIGHTS).symlink_to("nowhere")),
        "is a link to nowhere, which does not exist: download",
    ),
    "stored in eight bits": (
        both(
            weights(lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()}),
            config(dtype="float8_e4m3fn"),
        ),
        "cannot (run|be loaded)",
    ),
    "no weights": (without(WEIGHTS), "must hold weights .*holds none: download the rest"),
    "a shard is missing": (
        both(without(WEIGHTS), text(INDEX, '{"weight_map": {"a": "model-00001-of-00002.saf"}}')),
        "names model-00001-of-00002.saf, which is not there: download",
    ),
    "index": (both(without(WEIGHTS), text(INDEX, "[]")), "must have a weight_map"),
    "adapter": (
        both(without("config.json"), text("adapter_config.json", ADAPTER)),
        r"is an adapter \(of org/base\), not a model: merge it into its base model",
    ),
    "adapter beside the model": (
        text("adapter_config.json", ADAPTER),
        "holds an adapter beside its model .*merge it",
    ),
    "GGUF": (
        both(without("config.json"), text("a.gguf", b"GGUF")),
        r"holds no config.json, but a GGUF file \(a.gguf\): simdiff cuts it with a plan",
    ),
    "GGUF and config": (
        both(without(WEIGHTS), text("a.gguf", b"GGUF")),
        r"must hold weights .*holds a GGUF file",
    ),
    "maker's format": (
        both(without("config.json"), text("params.json", "{}")),
        "their maker's own format",
    ),
    "training": (both(without("config.json"), text("zero_to_fp32.py", "")), "DeepSpeed"),
    "diffusion": (both(without("config.json"), text("model_index.json", "{}")), "diffusion"),
    "no config": (without("config.json"), "holds no config.json: give the directory"),
    "not JSON": (text("config.json", "{"), "must be JSON, but is not"),
    "no object": (text("config.json", "[]"), "must be a JSON object, got list"),
    "no model_type": (text("config.json", "{}"), "has no model_type"),
    "unknown model_type": (config(model_type="xmodel"), "a later version may"),
    "remote code": (
        both(config(model_type="xmodel", auto_map=REMOTE), text("mine.py", RUNS)),
        r"asks for code of its own \(auto_map\), which simdiff never runs",
    ),
    "remote tokenizer": (
        both(
            lambda folder: edit_json(
                folder / "tokenizer_config.json",
                tokenizer_class="Mine",
                auto_map={"AutoTokenizer": ["mine.Mine", None]},
            ),
            text("mine.py", RUNS),
        ),
        "its tokenizer cannot be loaded",
    ),
    "a value that the config refuses": (config(num_attention_heads="x"), "config.json: must be"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_used_is_refused_in_a_sentence(
    fault: str, tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, words = FAULTS[fault]
    change(tiny_checkpoint)
    with pytest.raises(SimdiffError, match=words) as error:
        load_model(str(tiny_checkpoint), device="cpu")
    message = str(error.value).replace(str(tiny_checkpoint), "")
    assert "\n" not in message
    assert len(message) < 420
    shown = capfd.readouterr()
    assert "CODE OF THE CHECKPOINT" not in shown.out
    assert "LOAD REPORT" not in shown.err  # the library's own report of 30 lines


def test_files_are_no_models(tiny_checkpoint: Path) -> None:
    gguf = tiny_checkpoint / "a.gguf"
    gguf.write_bytes(b"GGUF")
    for function in (load_model, source_directory):
        with pytest.raises(SimdiffError, match="a.gguf: is a GGUF file: simdiff cuts it"):
            function(str(gguf))
        with pytest.raises(SimdiffError, match="is a file, and a model is a directory"):
            function(str(tiny_checkpoint / WEIGHTS))
        with pytest.raises(SimdiffError, match="none.gguf: no such file"):
            function(str(tiny_checkpoint / "none.gguf"))


def test_what_transformers_ignores_is_no_fault(tiny_checkpoint: Path) -> None:
    """Tables of earlier versions, a second head, the heads that predict further tokens."""

    def change(stored: dict) -> dict:
        extra = {
            "model.layers.0.self_attn.rotary_emb.inv_freq": stored["model.norm.weight"][:4],
            "v_head.summary.weight": stored["model.norm.weight"],
            "model.layers.6.eh_proj.weight": stored["model.norm.weight"],
        }
        return stored | {name: value.clone() for name, value in extra.items()}

    weights(change)(tiny_checkpoint)
    edit_json(tiny_checkpoint / "config.json", num_nextn_predict_layers=1)
    model, _ = load_model(str(tiny_checkpoint), device="cpu")
    assert model.config.num_hidden_layers == 6
    edit_json(tiny_checkpoint / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(SimdiffError, match="says 6 decoder layers, the files hold 7"):
        load_model(str(tiny_checkpoint), device="cpu")


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"
)
def test_a_missing_package_is_named(tiny_checkpoint: Path) -> None:
    quantised(quant_method="bitsandbytes", load_in_4bit=True)(tiny_checkpoint)
    with pytest.raises(SimdiffError, match="requires bitsandbytes.*score the unquantised model"):
        load_model(str(tiny_checkpoint), device="cpu")
