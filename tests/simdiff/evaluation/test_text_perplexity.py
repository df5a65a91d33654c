"""Perplexity of a text: every token once, transformers' recipe, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedModel

from simdiff.data.text import token_windows
from simdiff.errors import SimdiffError
from simdiff.evaluation.text_perplexity import (
    joined_windows,
    read_text,
    text_perplexity,
    text_windows,
)
from simdiff.evaluation.window_perplexity import perplexity


def recipe(model: PreTrainedModel, ids: torch.Tensor, length: int, stride: int) -> tuple:
    """transformers' documented loop over windows, with its own loss of the masked labels.

    The documentation weights each window's mean by its labels less one; only a label at the
    window's first position gets lost in the shift, so it is weighted by what is left here.
    """
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        labels = ids[begin:end].clone()
        labels[: -(end - previous)] = -100
        predicted = int((labels[1:] != -100).sum())
        if predicted:
            with torch.no_grad():
                loss = model(input_ids=ids[None, begin:end], labels=labels[None]).loss
            total += float(loss.double()) * predicted
        count += predicted
        previous = end
        if end == len(ids):
            break
    return total / count, count


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("num_tokens", "length"), [(40, 16), (16, 16), (97, 8), (33, 2)])
def test_every_token_is_predicted_once(num_tokens: int, length: int, bos: bool) -> None:
    content = length - int(bos)
    for stride in range(1, content + 1):
        windows = text_windows(num_tokens, length, stride, bos)
        predicted = [t for window in windows for t in range(window.first, window.end)]
        given = set(range(num_tokens)) - set(predicted)
        assert len(predicted) == len(set(predicted))
        assert predicted == sorted(predicted)
        if bos:
            assert not given
        elif stride < content:
            assert given == {0}
        else:
            assert given == set(range(0, num_tokens, stride))
        for window in windows:
            assert window.end - window.start <= content
            assert window.first - window.start >= int(not bos)
            if window.start and window.end - window.start == content:
                assert window.first - window.start >= content - stride


@pytest.mark.parametrize("stride", [1, 5, 12, 16])
def test_equals_transformers_recipe(
    llama: PreTrainedModel, tiny_checkpoint: Path, tiny_text: Path, stride: int
) -> None:
    tiny_text.write_text("\n\n".join(tiny_text.read_text().split("\n\n")[:3]))
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    text = read_text(
        str(tiny_text), tokenizer, num_windows=0, window_length=16, stride=stride, part="all"
    )
    got = text_perplexity(llama, text)
    nll, count = recipe(llama.double(), text.tokens, 16, stride)
    assert got.num_tokens == count
    assert got.nll == pytest.approx(nll, rel=1e-6)  # the model itself ran in float32
    assert got.perplexity == pytest.approx(float(torch.tensor(nll).exp()), rel=1e-6)
    assert got.low is not None
    assert got.high is not None
    assert got.low < got.perplexity < got.high


def test_without_overlap_it_is_perplexity(
    llama: PreTrainedModel, tiny_checkpoint: Path, tiny_text: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    cut = {"part": "held-out", "num_windows": 7, "window_length": 16}
    windows = token_windows(str(tiny_text), tokenizer, **cut)
    wanted = perplexity(llama, windows.tokens)
    for stride in (None, 16):
        text = read_text(str(tiny_text), tokenizer, stride=stride, **cut)
        assert torch.equal(text.tokens, windows.tokens.flatten())
        got = text_perplexity(llama, text)
        assert got.nll == pytest.approx(wanted.nll, rel=1e-6)
        assert got.standard_error == pytest.approx(wanted.standard_error, rel=1e-4)
        assert (got.num_tokens, got.num_runs) == (wanted.num_tokens, 7)


def test_bos_is_context_of_every_window(
    llama: PreTrainedModel, tiny_checkpoint: Path, tiny_text: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.bos_token = "w95"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w95 $A", special_tokens=[("w95", 95)]
    )
    text = read_text(str(tiny_text), tokenizer, num_windows=3, window_length=16, stride=6)
    assert text.identity["bos"]
    assert [(w.start, w.end, w.first) for w in text.windows] == [
        (0, 15, 0),
        (6, 21, 15),
        (12, 27, 21),
    ]
    total = 0.0
    for window in text.windows:
        ids = torch.cat([torch.tensor([95]), text.tokens[window.start : window.end]])
        with torch.no_grad():
            log_p = llama.double()(input_ids=ids[None]).logits[0].log_softmax(-1)
        for token in range(window.first, window.end):
            total -= float(log_p[token - window.start, text.tokens[token]])
    got = text_perplexity(llama.float(), text)
    assert got.num_tokens == 27
    assert got.nll == pytest.approx(total / 27, rel=1e-6)


def test_overlapping_windows_are_drawn_together() -> None:
    sums = [(15.0, 15), *((float(n), 4) for n in range(9))]
    blocks = joined_windows(sums, 16)
    assert blocks == [(15.0, 15), (0.0 + 1 + 2 + 3, 16), (4.0 + 5 + 6 + 7 + 8, 20)]
    assert joined_windows([(2.0, 3), (1.0, 2)], 16) == [(3.0, 5)]


def test_refusals(tiny_checkpoint: Path, tiny_text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)

    def cut(**changes: int) -> None:
        read_text(str(tiny_text), tokenizer, **{"window_length": 16, **changes})

    with pytest.raises(SimdiffError, match=r"held-out half .* window of 2000 tokens, got 5\d0"):
        cut(window_length=2000)
    with pytest.raises(SimdiffError, match=r"stride must be 1 to 16 tokens .* got 17"):
        cut(stride=17)
    with pytest.raises(SimdiffError, match="got 0"):
        cut(stride=0)
    with pytest.raises(SimdiffError, match="at least 2 tokens, got 1"):
        cut(window_length=1)
    with pytest.raises(SimdiffError, match="0 .all of the text. or more, got -1"):
        cut(num_windows=-1)


def test_nan_is_refused(llama: PreTrainedModel, tiny_checkpoint: Path, tiny_text: Path) -> None:
    with torch.no_grad():
        llama.model.norm.weight[0] = float("nan")
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    text = read_text(str(tiny_text), tokenizer, num_windows=3, window_length=16)
    with pytest.raises(SimdiffError, match="NaN or Inf in 3 of 3 windows"):
        text_perplexity(llama, text)
