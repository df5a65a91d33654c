"""What transformers 5 wrote, in transformers 4.57 and sentence-transformers: ids and numbers.

`make test-transformers4` installs both into a folder of their own and names it to this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import simdiff
from support.checkpoints import edit_json, plan_for, save_model

FOLDER = os.environ.get("SIMDIFF_TRANSFORMERS4", "")
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="needs transformers 4.57: make test-transformers4"
)

TEXT = "The steam engine, ça va? 42"
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
READ = """
import json, sys, torch
from importlib.machinery import ModuleSpec
from types import ModuleType
# That of the environment is for transformers 5; only training needs it.
datasets = sys.modules["datasets"] = ModuleType("datasets")
datasets.__spec__, datasets.__version__ = ModuleSpec("datasets", None), "0"
for name in ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict", "Value"):
    setattr(datasets, name, type(name, (), {}))
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
found = {}
for name in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto").eval()
    ids = tokenizer(sys.argv[2], return_tensors="pt")["input_ids"]
    chat = [{"role": "user", "content": sys.argv[2]}]
    with torch.no_grad():
        found[name] = ids, tokenizer.apply_chat_template(chat, tokenize=False), model(ids).logits
from sentence_transformers import SentenceTransformer
found["sentence"] = torch.tensor(SentenceTransformer(sys.argv[4]).encode([sys.argv[2]]))
torch.save(found, sys.argv[3])
"""


def write_tokenizer(folder: Path) -> None:
    """One token a byte, in the form of transformers 4."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:93], "Ã", "§"]
    vocab = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    own = Tokenizer(models.BPE(vocab, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    entries = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "model_max_length": 2048,
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))


def as_transformers_4(folder: Path) -> None:
    edit_json(
        folder / "config.json",
        dtype=None,
        torch_dtype="float32",
        rope_parameters=None,
        rope_theta=500000.0,
        rope_scaling=SCALING,
        transformers_version="4.51.0",
    )


def embedder(folder: Path) -> None:
    """As sentence-transformers saves a decoder: no head, names without the base model's prefix."""
    save_model("llama, tied", folder, "50GB")
    as_transformers_4(folder)
    write_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {n.removeprefix("model."): t for n, t in weights.items() if n != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kinds = ("", "Transformer"), ("1_Pooling", "Pooling")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of transformers 4: cut, cut and converted, cut and recovered; an embedder."""
    folder = tmp_path_factory.mktemp("transformers4")
    dense, sentence = folder / "dense", folder / "dense-sentence"
    save_model("llama", dense, "50GB")
    as_transformers_4(dense)
    write_tokenizer(dense)
    embedder(sentence)
    plan = plan_for(AutoModelForCausalLM.from_pretrained(dense))
    outputs = {name: folder / name for name in ("cut", "converted", "recovered", "sentence")}
    simdiff.prune(dense, plan, outputs["cut"])
    simdiff.prune(dense, plan, outputs["converted"], dtype="bfloat16", device="cpu")
    text = [f"engine {i} of steam, and {i * i} more of it" for i in range(40)]
    simdiff.recover(
        dense, plan, outputs["recovered"], text, num_windows=8, window_length=16, device="cpu"
    )
    other = plan_for(AutoModelForCausalLM.from_pretrained(sentence))
    simdiff.prune(sentence, other, outputs["sentence"])
    return outputs


@pytest.fixture(scope="module")
def found(written: dict[str, Path]) -> dict[str, Any]:
    names = [str(written[name]) for name in ("cut", "converted", "recovered")]
    result = written["cut"].parent / "found.pt"
    arguments = [json.dumps(names), TEXT, str(result), str(written["sentence"])]
    done = subprocess.run(
        [sys.executable, "-c", READ, *arguments],
        env={**os.environ, "PYTHONPATH": FOLDER},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(result)


@pytest.mark.parametrize("name", ["cut", "converted", "recovered"])
def test_ids_and_logits_are_those_of_transformers_5(
    name: str, written: dict[str, Path], found: dict[str, Any]
) -> None:
    ids, chat, logits = found[str(written[name])]
    tokenizer = AutoTokenizer.from_pretrained(written[name])
    assert ids.tolist() == tokenizer([TEXT])["input_ids"]
    assert chat == "<s>" + TEXT
    model = AutoModelForCausalLM.from_pretrained(written[name]).eval()
    assert model.dtype == logits.dtype
    assert (logits.dtype == torch.bfloat16) == (name == "converted")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    config = json.loads((written[name] / "config.json").read_text())
    assert config["rope_scaling"] == SCALING
    assert "rope_parameters" not in config


def test_sentence_transformers_embeds(written: dict[str, Path], found: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(written["sentence"]).eval()
    ids = AutoTokenizer.from_pretrained(written["sentence"])([TEXT], return_tensors="pt")
    with torch.no_grad():
        states = model.model(ids["input_ids"]).last_hidden_state
    torch.testing.assert_close(found["sentence"], states.mean(1))
