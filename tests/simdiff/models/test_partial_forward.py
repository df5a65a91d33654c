"""States carried from depth to depth, whatever layers take and return, by sums on paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simdiff.data.batches import model_inputs, token_mask
from simdiff.errors import SimdiffError
from simdiff.models import partial_forward as module
from simdiff.models.partial_forward import PartialForward

IDS = torch.tensor([[1, 2, 3]])


class Layer(nn.Module):
    """Twice what enters and its number, as `kind` returns it; counts how often it ran."""

    def __init__(self, number: int, kind: str) -> None:
        super().__init__()
        self.number, self.kind, self.runs = number, kind, 0

    def forward(self, hidden_states: Tensor, plus: float = 0.0) -> Any:
        self.runs += 1
        states = 2 * hidden_states + self.number + plus
        return {"tuple": (states, "second", "third"), "list": [states, "second"]}.get(
            self.kind, states
        )


class Model(nn.Module):
    """Three layers behind an embedding that gives every token its number, twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(10, 2)
        self.embedding.weight.data = torch.arange(10.0)[:, None].expand(10, 2).clone()
        self.layers = nn.ModuleList(Layer(number, kind) for number in range(3))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        assert use_cache is False
        states = self.embedding(input_ids)
        for layer in self.layers:
            if self.kind == "tuple":
                states, second, third = layer(states, 0.5)
                assert (second, third) in (("second", "third"), (None, None))
            elif self.kind == "list":
                states, _ = layer(states, plus=0.5)
            elif self.kind == "keyword":
                states = layer(plus=0.5, hidden_states=states)
            else:
                states = layer(states, plus=0.5)
        return states


@pytest.fixture
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(module, "decoder_body", lambda model: model)
    monkeypatch.setattr(
        module, "find_decoder_layers", lambda model: type("Found", (), {"modules": model.layers})
    )
    return Model(request.param)


@pytest.mark.parametrize("model", ["tensor", "tuple", "list", "keyword"], indirect=True)
def test_states_of_every_depth(model: Model) -> None:
    """x, 2 x + 1/2, 4 x + 5/2, 8 x + 15/2; any depth from any other, each layer run once."""
    wanted = [
        torch.stack([factor * IDS + offset] * 2, dim=-1)
        for factor, offset in ((1, 0), (2, 0.5), (4, 2.5), (8, 7.5))
    ]
    batch = {"input_ids": IDS}
    with PartialForward(model) as depths:
        assert [layer.runs for layer in model.layers] == [1, 1, 1]  # told what they return
        assert torch.equal(depths.run(batch, None, 0, 0), wanted[0])
        for stop in range(4):
            assert torch.equal(depths.run(batch, None, 0, stop), wanted[stop])
            for start in range(stop + 1):
                before = [layer.runs for layer in model.layers]
                assert torch.equal(depths.run(batch, wanted[start], start, stop), wanted[stop])
                ran = [layer.runs - n for layer, n in zip(model.layers, before, strict=True)]
                assert ran == [int(start <= layer < stop) for layer in range(3)]
    assert not any("forward" in vars(layer) for layer in model.layers)


@pytest.mark.parametrize("model", ["tensor"], indirect=True)
def test_forwards_are_put_back(model: Model) -> None:
    def own(hidden_states: Tensor, plus: float) -> Tensor:
        raise RuntimeError("as it was")

    model.layers[1].forward = own
    with pytest.raises(RuntimeError, match="as it was"), PartialForward(model):
        pass
    assert model.layers[1].forward is own
    assert not any("forward" in vars(model.layers[k]) for k in (0, 2))


@pytest.mark.parametrize("model", ["tensor"], indirect=True)
def test_other_states_are_refused(model: Model) -> None:
    batch = {"input_ids": IDS}
    for forward, message in (
        (
            lambda *_, **__: torch.zeros(1, 2, 2),
            r"states \(1, 3, 'hidden_size'\) .* of Model, got "
            r"\(1, 2, 2\)$",
        ),
        (lambda *_, **__: torch.zeros(1, 3), r"got \(1, 3\)$"),
        (lambda x, **_: x / 0, "NaN or Inf among those that enter layer 2 of 3$"),
    ):
        model.layers[1].forward = forward
        with PartialForward(model) as depths, pytest.raises(SimdiffError, match=message):
            depths.run(batch, None, 0, 2)
    del model.layers[1].forward
    model.embedding.weight.data[:] = torch.inf
    with (
        PartialForward(model) as depths,
        pytest.raises(SimdiffError, match="that enter layer 0 of 3$"),
    ):
        depths.run(batch, None, 0, 0)


def test_batches_as_a_model_takes_them() -> None:
    """Left of the text there are no positions; right of it they go on, and nobody reads them."""
    ids = torch.arange(8).view(2, 4)
    left, right = (
        torch.tensor(rows) for rows in ([[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 1]])
    )
    plain, whole, padded, after = model_inputs(
        [
            ids,
            {"input_ids": ids, "attention_mask": torch.ones(2, 4)},
            {"input_ids": ids, "attention_mask": left.bool()},
            {"input_ids": ids, "attention_mask": right},
        ],
        "recovery",
    )
    assert list(plain) == list(whole) == ["input_ids"]
    assert padded["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert padded["attention_mask"].dtype == torch.int64
    assert list(after) == ["input_ids", "attention_mask"]
    assert token_mask(plain).tolist() == [[True] * 4] * 2
    assert token_mask(after).tolist() == [[True, True, False, False], [True] * 4]
    for bad, message in (
        (ids[0], r"integers .batch, sequence., got torch.int64 of shape \(4,\)"),
        (ids[:, :0], r"shape \(2, 0\)"),
        (ids.float(), "got torch.float32"),
        (
            {"input_ids": ids, "attention_mask": left[:, :2]},
            r"must have shape \(2, 4\) like input_ids, got \(2, 2\)",
        ),
    ):
        with pytest.raises(SimdiffError, match=message):
            model_inputs([bad], "recovery")
