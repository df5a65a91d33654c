"""Sub-layers of every family against forwards written out by hand.

Nothing here uses our hooks: a family's layer is written as its class has it, and the model is run
with that in place of `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.models.structure import find_decoder_layers
from simdiff.sublayers.scores import SublayerScores, score_with_sublayers
from simdiff.sublayers.structure import SublayerName
from simdiff.sublayers.surgery import remove_sublayers, sublayers_removed
from simdiff_kernels import METRICS
from simdiff_kernels.testing import exact_metrics
from support.families import FAMILIES, OPTIONS, PARALLEL, logits, tiny, token_ids

Step = Callable[[Tensor], Tensor]


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def sequential(
    mixer: str,
    norm: str,
    mlp: str,
    norm_mlp: str,
    scale: str = "",
    after: str = "",
    after_mlp: str = "",
) -> Callable[[nn.Module, dict], tuple[Step, Step]]:
    """x + s * after(mixer(norm(x))), then the same with the MLP; names of modules, '' for none."""

    def steps(layer: nn.Module, kwargs: dict) -> tuple[Step, Step]:
        def get(name: str) -> nn.Module:
            return getattr(layer, name) if name else nn.Identity()

        factor = getattr(layer, scale) if scale else 1.0

        def attend(x: Tensor) -> Tensor:
            names = mixer.split("|")
            module = next(getattr(layer, n) for n in names if getattr(layer, n, None) is not None)
            return factor * get(after)(first(module(get(norm)(x), **kwargs)))

        def feed(x: Tensor) -> Tensor:
            entered = get(norm_mlp)(x)
            return factor * get(after_mlp)(
                sum(first(get(n)(entered)).view(x.shape) for n in mlp.split("+"))
            )

        return attend, feed

    return steps


LLAMA = sequential(
    "self_attn|linear_attn|mamba", "input_layernorm", "mlp", "post_attention_layernorm"
)


GEMMA = sequential(
    "self_attn",
    "input_layernorm",
    "mlp",
    "pre_feedforward_layernorm",
    "",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)


GPT2 = sequential("attn", "ln_1", "mlp", "ln_2")


LFM2 = sequential("self_attn|conv", "operator_norm", "feed_forward", "ffn_norm")


OLMO2 = sequential(
    "self_attn", "", "mlp", "", "", "post_attention_layernorm", "post_feedforward_layernorm"
)


GRANITE = sequential(
    "self_attn", "input_layernorm", "mlp", "post_attention_layernorm", "residual_multiplier"
)


HYBRID = sequential(
    "self_attn|mamba",
    "input_layernorm",
    "block_sparse_moe+shared_mlp",
    "post_attention_layernorm",
    "residual_multiplier",
)


LLAMA4 = sequential("self_attn", "input_layernorm", "feed_forward", "post_attention_layernorm")


BAMBA = sequential("self_attn|mamba", "input_layernorm", "feed_forward", "pre_ff_layernorm")


NEOX = sequential("attention", "input_layernorm", "mlp", "post_attention_layernorm")


FALCON = sequential("self_attention", "input_layernorm", "mlp", "input_layernorm")


COHERE = sequential("self_attn", "input_layernorm", "mlp", "input_layernorm")


def opt(layer: nn.Module, kwargs: dict) -> tuple[Step, Step]:
    return (
        lambda x: first(layer.self_attn(layer.self_attn_layer_norm(x), **kwargs)),
        lambda x: layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x)))),
    )


def falcon_h1(layer: nn.Module, kwargs: dict) -> tuple[Step, Step]:
    def mix(x: Tensor) -> Tensor:
        x = layer.input_layernorm(x)
        state = layer.mamba(x, attention_mask=kwargs.get("mamba_attention_mask"))
        wanted = {k: v for k, v in kwargs.items() if k != "mamba_attention_mask"}
        attended = first(layer.self_attn(x * layer.attention_in_multiplier, **wanted))
        return state * layer.ssm_out_multiplier + attended * layer.attn_out_multiplier

    return mix, lambda x: layer.feed_forward(layer.pre_ff_layernorm(x))


BY_HAND: dict[str, Callable[[nn.Module, dict], tuple[Step, Step]]] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "mixtral",
            "qwen2",
            "qwen2-moe",
            "qwen3",
            "qwen3-moe",
            "gemma",
            "phi3",
            "smollm3",
            "deepseek-v3",
            "gpt-oss",
            "qwen3-next",
            "stablelm",
        ),
        LLAMA,
    ),
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gpt2": GPT2,
    "gpt-neo": GPT2,
    "lfm2": LFM2,
    "olmo2": OLMO2,
    "granite": GRANITE,
    "granite-moe-hybrid": HYBRID,
    "llama4": LLAMA4,
    "bamba": BAMBA,
    "opt": opt,
    "falcon-h1": falcon_h1,
    "gpt-neox": NEOX,
    "falcon": FALCON,
    "cohere2": COHERE,
}


# Their kernels take no float64; the others are compared in it.
SINGLE = (
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "deepseek-v3",
    "gpt-oss",
    "qwen3-next",
    "granite-moe-hybrid",
    "bamba",
)


REMOVED = (
    SublayerName(0, "attention"),
    SublayerName(2, "mlp"),
    SublayerName(3, "attention"),
    SublayerName(4, "mlp"),
    SublayerName(4, "attention"),
)


class Written:
    """The model with every layer's forward written out, and the states that it goes through."""

    def __init__(self, family: str, model: PreTrainedModel, removed: tuple = ()) -> None:
        self.states: dict[SublayerName, tuple[Tensor, Tensor]] = {}
        self.family, self.removed = family, removed
        self.layers = find_decoder_layers(model).modules
        for index, layer in enumerate(self.layers):
            layer.forward = self.forward(index, layer, layer.forward)

    def undo(self) -> None:
        for layer in self.layers:
            del layer.forward

    def forward(self, index: int, layer: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        names = SublayerName(index, "attention"), SublayerName(index, "mlp")

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args:  # GPT-2's come by position: cache, then mask
                kwargs = {"attention_mask": args[1], **kwargs}
            x, steps = hidden_states, BY_HAND[self.family](layer, kwargs)
            added = [
                step(x) if name not in self.removed else torch.zeros_like(x)
                for name, step in zip(names[:1], steps[:1], strict=True)
            ]
            start = x if self.family in PARALLEL else x + added[0]
            gone = names[1] in self.removed
            added.append(torch.zeros_like(x) if gone else steps[1](start).view(x.shape))
            y = x + added[0] + added[1]
            if self.family in PARALLEL:
                self.states |= {names[0]: (x + added[1], y), names[1]: (x + added[0], y)}
            else:
                self.states |= {names[0]: (x, start), names[1]: (start, y)}
            returns_tuple = self.family in ("falcon", "gpt-neo", "falcon-h1", "bamba")
            return (y, None) if returns_tuple else y

        return forward


@pytest.fixture(scope="module", params=BY_HAND)
def case(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    model = tiny(request.param)
    return request.param, model if request.param in SINGLE else model.double()


def test_removal_is_the_forward_without_it(case: tuple[str, PreTrainedModel]) -> None:
    family, model = case
    dense = logits(model)
    for removed in (REMOVED, REMOVED[:1], REMOVED[1:2]):
        written = Written(family, model, removed)
        wanted = logits(model)
        written.undo()
        with sublayers_removed(model, removed):
            torch.testing.assert_close(logits(model), wanted, rtol=1e-6, atol=1e-8)
        assert (wanted - dense).abs().max() > 1e-4
    assert torch.equal(logits(model), dense), "what was removed must have come back"


def test_scores_are_those_of_states_written_out(case: tuple[str, PreTrainedModel]) -> None:
    family, model = case
    ids = token_ids()
    scores = score_with_sublayers(model, [ids[:, :7], ids[:1]], progress=False)
    table = SublayerScores.from_scores(scores)
    assert table.names == tuple(
        SublayerName(layer, kind) for layer in range(6) for kind in ("attention", "mlp")
    )
    states: list[dict] = []
    for batch in (ids[:, :7], ids[:1]):
        written = Written(family, model)
        with torch.no_grad():
            model(input_ids=batch, use_cache=False)
        written.undo()
        states.append(written.states)
    for row, name in enumerate(table.names):
        exact = [exact_metrics(*seen[name]) for seen in states]
        for m, metric in enumerate(METRICS):
            values = torch.cat([metrics[m].flatten() for metrics in exact])
            assert table.metrics[metric].mean[row] == pytest.approx(values.mean().item(), rel=1e-5)
            assert table.metrics[metric].maximum[row] == pytest.approx(
                values.max().item(), rel=1e-5
            )
        a, b = (
            torch.cat([seen[name][side].norm(dim=-1).flatten() for seen in states])
            for side in (0, 1)
        )
        change = ((b - a).square() / (2 * a * b)).mean().item()
        assert table.norm_change[row] == pytest.approx(change, rel=1e-4)


CACHED = [name for name in FAMILIES if name in BY_HAND or name in ("recurrent-gemma", "minicpm3")]


@pytest.mark.parametrize("family", CACHED)
def test_cached_generation_without_the_first_attention(family: str) -> None:
    """Caches ask layer 0 for their length; where windows have 4 tokens, 20 are generated."""
    model = tiny(family)
    remove_sublayers(model, REMOVED)
    ids = token_ids()[:, :6]
    uncached = model.generate(ids, use_cache=False, **OPTIONS)
    cached = model.generate(ids, use_cache=True, **OPTIONS)
    assert uncached.shape == (2, 20)
    assert torch.equal(cached, uncached)
    # Bamba's own logits differ with a cache (random weights: by 0.04 of their spread), and
    # Recurrent Gemma keeps its states in the model.
    if family in ("recurrent-gemma", "bamba"):
        return
    # Positions and masks by the model itself, from what the cache says; logits, not the best token.
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        assert cache.get_seq_length() == 6
        step = [
            model(input_ids=uncached[:, k : k + 1], past_key_values=cache, use_cache=True)
            for k in range(6, 10)
        ]
        whole = model(input_ids=uncached[:, :10], use_cache=False).logits[:, 6:]
    together = torch.cat([output.logits for output in step], 1)
    assert (together - whole).abs().max() < 1e-3 * whole.std()
