"""Windows that a model cannot read are refused before it runs, in commands and functions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import simdiff
from simdiff.errors import Note, SimdiffError
from simdiff.models.windows import check_windows, positions
from support.commands import simdiff as command
from support.families import COMMON, FAMILIES
from support.vision_models import tiny_vision

LENGTHS = {  # of those that have a table of positions
    "gpt2": 1024,
    "gpt-neo": 64,
    "opt": 64,
    "mpt": 2048,
}
MORE: dict[str, tuple[str, dict[str, Any], tuple[int | None, bool]]] = {
    "gptj": ("GPTJConfig", {"n_positions": 64, "rotary_dim": 4}, (64, True)),
    "gpt-bigcode": ("GPTBigCodeConfig", {"n_positions": 64}, (64, True)),
    "codegen": ("CodeGenConfig", {"n_positions": 64, "rotary_dim": 4}, (64, True)),
    "ctrl": ("CTRLConfig", {"n_positions": 64, "dff": 48}, (64, True)),
    "openai-gpt": ("OpenAIGPTConfig", {"n_positions": 64}, (64, True)),
    "mamba": ("MambaConfig", {"num_hidden_layers": 2, "hidden_size": 32}, (None, False)),
}


def built(name: str, entries: dict[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(getattr(transformers, name)(**entries))


@pytest.mark.parametrize("family", FAMILIES)
def test_how_many_positions_a_family_has(family: str) -> None:
    model = built(*FAMILIES[family])
    limit, learned = positions(model)
    assert learned == (family in LENGTHS)
    stated = getattr(model.config, "max_position_embeddings", None)
    assert limit in ([LENGTHS[family]] if learned else [None, stated])


@pytest.mark.parametrize("name", MORE)
def test_other_tables_of_positions(name: str) -> None:
    kind, entries, wanted = MORE[name]
    usual = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97} if "gp" in name else {}
    usual = usual or {"n_embd": 32, "n_layer": 2, "n_head": 4, **COMMON}
    assert positions(built(kind, {**usual, **entries})) == wanted


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_longest_window_is_read_and_no_longer_one(name: str) -> None:
    kind, entries = FAMILIES[name]
    longest = 32 if name == "gpt2" else 64
    entries = {**entries, "n_positions": 32} if name == "gpt2" else entries
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**entries)).eval()
    ids = torch.arange(2 * longest).reshape(2, -1) % 97
    simdiff.score(model, ids, progress=False)
    with pytest.raises(SimdiffError, match=f"at most {longest} tokens.*got {longest + 1}: give"):
        simdiff.score(model, torch.zeros(2, longest + 1, dtype=torch.int64), progress=False)


def test_ids_are_compared_with_the_embedding(llama: PreTrainedModel) -> None:
    check_windows(llama, [torch.tensor([[0, 96]]), torch.empty(0, 4)], "score")
    for wrong in (97, -1):
        with pytest.raises(SimdiffError, match=f"must be 0 to 96, .* got {wrong}: the tokenizer"):
            check_windows(llama, [torch.tensor([[0, wrong]])], "score")


def test_a_note_where_a_rotary_model_was_made_for_less(llama: PreTrainedModel) -> None:
    llama.config.max_position_embeddings = 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_windows(llama, [torch.zeros(1, 16, dtype=torch.int64)], "score")
    with pytest.warns(Note, match="windows of 17 tokens are longer than the 16"):
        check_windows(llama, [torch.zeros(1, 17, dtype=torch.int64)], "score")
    vision = tiny_vision("llava")  # whose tower has a table of positions
    assert positions(vision) == (64, False)


def test_every_way_is_refused_before_the_model_runs(
    tiny_checkpoint: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaModel, PreTrainedTokenizerFast

    scores = tmp_path / "scores.json"
    amount = ["--num-windows", "4", "--window-length", "16"]
    text = ["--text", tiny_text, *amount]
    assert command("score", tiny_checkpoint, *text, "--output", scores) == 0
    assert command("plan", scores, "--num-layers", 1, "--output", tmp_path / "plan.json") == 0
    backend = Tokenizer(models.WordLevel({f"w{i}": 2 * i for i in range(97)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(
        tiny_checkpoint
    )

    def never(*_: object, **__: object) -> object:
        raise AssertionError("the model ran")

    monkeypatch.setattr(LlamaModel, "forward", never)
    plan = ["--plan", tmp_path / "plan.json"]
    for words in (
        ["score", tiny_checkpoint, *text, "--output", tmp_path / "a"],
        ["eval", tiny_checkpoint, *text],
        ["run", tiny_checkpoint, *text, "--output", tmp_path / "b"],
        ["compare", tiny_checkpoint, *text, "--output", tmp_path / "c"],
        ["recover", tiny_checkpoint, *text, *plan, "--output", tmp_path / "d"],
    ):
        assert command(*words) == 2
        assert "token ids must be 0 to 96" in capsys.readouterr().err
    saved = simdiff.LayerScores.load(scores)
    with pytest.raises(SimdiffError, match="token ids must be 0 to 96"):
        simdiff.plan(saved, 1, model=tiny_checkpoint, windows=torch.full((2, 8), 150))


def test_commands_print_the_note(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from support.checkpoints import edit_json

    edit_json(tiny_checkpoint / "config.json", max_position_embeddings=8)
    text = ["--text", tiny_text, "--num-windows", 4, "--window-length", 16]
    assert command("score", tiny_checkpoint, *text, "--output", tmp_path / "scores.json") == 0
    shown = capsys.readouterr().err
    assert shown.count("Note: windows of 16 tokens are longer than the 8 for which this Llama") == 1
    assert "UserWarning" not in shown
