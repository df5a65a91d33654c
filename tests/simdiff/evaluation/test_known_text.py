"""A text that a model does not know is told from one that it knows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff.data.text import token_windows
from simdiff.evaluation.known_text import share_of_bytes, tell_of_text, unknown_text

ENGLISH = """Over the centuries the town was destroyed and rebuilt several times. After the war only
a few families lived there, who made their living from farming and fishing. It was not until the
railway was built that new inhabitants came, and the first factories rose on the bank of the river.
Many workers lived in narrow houses behind the station, while the owners built their villas."""
FINNISH = """Vuosisatojen kuluessa kaupunki tuhottiin ja rakennettiin uudelleen monta kertaa. Sodan
jälkeen siellä asui enää muutama perhe, jotka elivät maanviljelyksestä ja kalastuksesta. Vasta
rautatien rakentaminen toi uusia asukkaita, ja ensimmäiset tehtaat nousivat joen rannalle."""
CODE = """def spans(values):
    result = []
    for value in sorted(set(values)):
        if result and value == result[-1][1] + 1:
            result[-1] = (result[-1][0], value)
        else:
            result.append((value, value))
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in result)
"""


def letters() -> str:
    drawn = torch.randint(27, (400,), generator=torch.Generator().manual_seed(0))
    return "".join("abcdefghijklmnopqrstuvwxyz "[index] for index in drawn)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return bytes(ids.tolist()).decode()


def test_single_bytes_are_the_measure() -> None:
    ids = torch.tensor([list(b"aabb" * 32)])  # one bit for each byte
    assert share_of_bytes(math.log(2), ids, Bytes()) == pytest.approx(1.0)
    assert share_of_bytes(0.25 * math.log(2), ids, Bytes()) == pytest.approx(0.25)
    assert share_of_bytes(1.0, torch.tensor([list(b"aaaa")]), Bytes()) == 0.0
    found = unknown_text(math.log(2), ids, 128, Bytes(), "it")
    assert found is not None
    assert "it does not know this text: its perplexity of 2 is 100% of the bits" in found
    assert unknown_text(math.log(2), ids, 32, Bytes(), "it") is None  # too little context
    assert unknown_text(0.3 * math.log(2), ids, 128, Bytes(), "it") is None


@pytest.mark.model
def test_what_the_demo_model_knows(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = demo

    def told(windows: torch.Tensor) -> str:
        tell_of_text(model, tokenizer, windows, "demo")
        return " ".join(capsys.readouterr().err.split())

    plain = "Note: demo has a chat template, and the text is plain"
    for text, known in ((ENGLISH, True), (CODE, True), (FINNISH, False), (letters(), False)):
        found = told(tokenizer(text, return_tensors="pt").input_ids[:, :128])
        assert ("Warning: demo does not know this text" in found) != known, (text, found)
        assert plain in found
    windows = token_windows("demo", tokenizer, num_windows=1, window_length=128).tokens
    assert "Warning" not in told(windows)
    chat = [{"role": "user", "content": ENGLISH}, {"role": "assistant", "content": "Indeed."}]
    said = tokenizer.apply_chat_template(chat, tokenize=False)
    assert told(tokenizer(said, return_tensors="pt").input_ids) == ""


def test_a_bos_is_no_chat(llama: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = {1: SimpleNamespace(special=True), 2: SimpleNamespace(special=True)}
    tokenizer = SimpleNamespace(chat_template="x", added_tokens_decoder=tokens, bos_token_id=1)
    for ids, plain in (([1, 5, 6], True), ([1, 2, 6], False), ([5, 1, 6], False)):
        tell_of_text(llama, tokenizer, torch.tensor([ids]), "it")
        assert ("the text is plain" in " ".join(capsys.readouterr().err.split())) == plain
