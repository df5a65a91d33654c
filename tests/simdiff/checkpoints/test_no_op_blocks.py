"""Sub-layer plans as vLLM's no-op blocks, read as vLLM's class DeciLMForCausalLM reads them."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from simdiff.checkpoints.no_op_blocks import CODE_FILE, with_blocks, write_no_op_blocks
from simdiff.errors import SimdiffError, SurgeryError
from simdiff.models.identity import model_identity
from simdiff.provenance.verify import verify
from simdiff.sublayers.plan import SublayerPlan
from simdiff.sublayers.structure import KINDS, SublayerName
from simdiff.sublayers.surgery import sublayers_removed
from support.checkpoints import edit_json
from support.commands import simdiff
from support.tiny_models import make_tiny

WEIGHTS, PLAN, AGAINST = (
    "weights against config",
    "plan against config",
    "equals the original's tensors",
)
REMOVED = ((1, "attention"), (3, "mlp"), (4, "attention"), (4, "mlp"), (5, "mlp"))


def plan_of(model: PreTrainedModel, removed: tuple[tuple[int, str], ...]) -> SublayerPlan:
    names = tuple(SublayerName(layer, kind) for layer in range(6) for kind in KINDS)
    return SublayerPlan(
        unit="sublayer",
        removed=tuple(SublayerName(*name) for name in removed),
        ranking=names,
        importance=(0.5,) * 12,
        num_layers=6,
        protected=(),
        criterion="simdiff",
        formula="x",
        alpha=None,
        notes=(),
        model=model_identity(model, "tiny"),
        calibration={},
    )


class Norm(nn.Module):
    """vLLM's RMSNorm: with a residual it adds to it, normalises the sum and returns both."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.weight = LlamaRMSNorm(config.hidden_size).weight
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        whole = x if residual is None else x + residual
        norm = whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return norm if residual is None else (norm, whole)


class Attention(nn.Module):
    """As many heads of keys as the block's config says."""

    def __init__(self, config: PreTrainedConfig, num_kv_heads: int) -> None:
        super().__init__()
        size, self.dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.dim, bias=False)
        self.k_proj = nn.Linear(size, num_kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(size, num_kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.dim, size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])[None]
        cos, sin = (part[:, None] for part in self.rotary(x, places))
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )

        def turned(y: Tensor) -> Tensor:
            first, second = y.chunk(2, -1)
            return y * cos + torch.cat([-second, first], -1) * sin

        mixed = nn.functional.scaled_dot_product_attention(
            turned(q), turned(k), v, is_causal=True, enable_gqa=True
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """DeciLMDecoderLayer: what a no-op block has not, it does not build."""

    def __init__(self, config: PreTrainedConfig, index: int) -> None:
        super().__init__()
        block = config.block_configs[index]
        self.no_attention, self.no_ffn = block.attention.no_op, block.ffn.no_op
        if not self.no_attention:
            num_kv_heads = config.num_attention_heads // block.attention.n_heads_in_group
            self.self_attn = Attention(config, num_kv_heads)
            self.input_layernorm = Norm(config)
        if not self.no_ffn:
            assert not hasattr(block.ffn, "ffn_mult")
            sized = copy.deepcopy(config)
            sized.intermediate_size = block.ffn.intermediate_size
            self.mlp = LlamaMLP(sized)
            self.post_attention_layernorm = Norm(config)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.no_attention:
            if residual is None:
                residual, x = x, self.input_layernorm(x)
            else:
                x, residual = self.input_layernorm(x, residual)
            x = self.self_attn(x)
        if not self.no_ffn:
            x, residual = self.post_attention_layernorm(x, residual)
            x = self.mlp(x)
        return x, residual


class DeciLM(nn.Module):
    """DeciLMForCausalLM, with the names of its parameters before vLLM joins q, k and v."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.model.layers = nn.ModuleList(Layer(config, index) for index in layers)
        self.model.norm = Norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        parameters = dict(self.named_parameters())
        for name, value in weights.items():
            parameters[name].data.copy_(value)  # an unknown name is a KeyError in vLLM too
        assert parameters.keys() == weights.keys()

    def forward(self, ids: Tensor) -> Tensor:
        x, residual = self.model.embed_tokens(ids), None
        for layer in self.model.layers:
            x, residual = layer(x, residual)
        return self.lm_head(self.model.norm(x, residual)[0])


@pytest.mark.parametrize("removed", [REMOVED, ((0, "attention"), (0, "mlp"), (2, "mlp"))])
def test_read_as_vllm_does(
    tiny_checkpoint: Path, tmp_path: Path, removed: tuple[tuple[int, str], ...]
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    out = tmp_path / "out"
    plan_of(dense, removed).save(tmp_path / "plan.json")
    words = ("export", tmp_path / "plan.json", "--format", "vllm", "--model", tiny_checkpoint)
    assert simdiff(*words, "-o", out) == 0
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert (config.architectures, config.model_type) == (["DeciLMForCausalLM"], "nemotron-nas")
    attentions = sum(not block.attention.no_op for block in config.block_configs)
    assert attentions == 6 - sum(kind == "attention" for _, kind in removed)
    again = copy.deepcopy(config)  # vLLM copies configs, sends them to workers and hashes them
    assert json.loads(again.to_json_string())["block_configs"] == config.block_configs
    assert pickle.loads(pickle.dumps(config.block_configs)) == config.block_configs
    theirs = DeciLM(config)
    theirs.load_weights(load_file(out / "model.safetensors"))
    ids = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(), sublayers_removed(dense, removed):
        torch.testing.assert_close(theirs(ids), dense(ids).logits, rtol=1e-4, atol=1e-5)
    assert (out / "tokenizer.json").is_file()
    checks = verify(out, tiny_checkpoint)
    assert {check.passed for check in checks} == {True, None}
    assert [check.name for check in checks if check.passed is None] == [
        "loads with stock classes",
        "cached generation",
        "generation config",
    ][: 3 - (out / "generation_config.json").is_file()]
    assert json.loads((out / "plan.json").read_text())["schema"] == "simdiff.sublayer_plan"
    assert simdiff(*words, "-o", out) == 2
    assert simdiff(*words, "-o", out, "--overwrite") == 0


def test_faults_of_no_op_blocks_are_found(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_of(make_tiny("llama"), REMOVED)
    out = tmp_path / "out"

    def faults(change: Callable[[], object]) -> list[str]:
        write_no_op_blocks(tiny_checkpoint, plan, out, overwrite=True)
        change()
        return [check.name for check in verify(out, tiny_checkpoint) if check.passed is False]

    def weights(**changed: Tensor) -> None:
        held = load_file(out / "model.safetensors")
        save_file({**held, **changed}, out / "model.safetensors", {"format": "pt"})

    bad = torch.full((32,), torch.nan)
    norm = "model.norm.weight"
    assert faults(lambda: None) == []
    code = faults(lambda: (out / CODE_FILE).write_text("import os"))
    assert code == ["config"]
    assert faults(lambda: edit_json(out / "config.json", auto_map={"AutoConfig": "a.B"})) == code
    assert faults(lambda: edit_json(out / "config.json", block_configs=[])) == [PLAN]
    other = plan_of(make_tiny("llama"), REMOVED[:-1])
    assert faults(lambda: other.save(out / "plan.json")) == [WEIGHTS, PLAN]
    assert faults(lambda: weights(**{norm: bad})) == ["finite", AGAINST]
    assert faults(lambda: weights(**{norm: torch.zeros(16)})) == [WEIGHTS, AGAINST]
    assert faults(lambda: weights(**{"model.layers.1.self_attn.more": torch.zeros(2)})) == [
        WEIGHTS,
        AGAINST,
    ]
    with pytest.raises(SimdiffError, match="against=.*none"):
        verify(out, tmp_path / "none")


def test_shards(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_of(make_tiny("llama"), REMOVED)
    write_no_op_blocks(tiny_checkpoint, plan, tmp_path / "out", max_shard_size=30_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {*index["weight_map"].values()}
    assert len(files) > 1
    weights = {k: v for file in files for k, v in load_file(tmp_path / "out" / file).items()}
    assert weights.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_parameters"] == sum(v.numel() for v in weights.values())


@pytest.mark.parametrize("sizes", [(4096, 11008), (4096, 14336), (576, 1536), (2048, 5632)])
def test_widths_that_a_multiplier_can_say(sizes: tuple[int, int]) -> None:
    """As vLLM, SGLang and llama.cpp's converter read it."""
    hidden, width = sizes
    entries = {"num_attention_heads": 8, "hidden_size": hidden, "intermediate_size": width}
    blocks = with_blocks(entries, plan_of(make_tiny("llama"), REMOVED))["block_configs"]
    multiplier = blocks[0]["ffn"]["ffn_mult"]
    size = int(2 * multiplier * hidden / 3)
    assert (size if size % 256 == 0 else size + 256 - size % 256) == width
    assert blocks[3]["ffn"] == {"no_op": True, "replace_with_linear": False, "ffn_mult": None}
    assert blocks[0]["attention"]["n_heads_in_group"] == 1


def test_what_cannot_be_a_no_op_block(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = make_tiny("llama")

    def write(removed: tuple[tuple[int, str], ...]) -> None:
        write_no_op_blocks(tiny_checkpoint, plan_of(model, removed), tmp_path / "out")

    with pytest.raises(SurgeryError, match="first sub-layer that stays must be one, and is mlp 0"):
        write(((0, "attention"),))
    with pytest.raises(SimdiffError, match="the plan was made for another model"):
        write_no_op_blocks(tiny_checkpoint, plan_of(make_tiny("gpt2"), REMOVED), tmp_path / "out")
    path = tiny_checkpoint / "config.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps(entries | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(SurgeryError, match="quantised checkpoint"):
        write(REMOVED)
    path.write_text(json.dumps(entries | {"architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(SurgeryError, match='LlamaForCausalLM; the architecture is ."Qwen2For'):
        write(REMOVED)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_missing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    plan_of(make_tiny("llama"), REMOVED).save(plan)
    for words, wanted in (
        (("--format", "list"), "must be a plan of whole layers"),
        (("--format", "vllm", "-o", tmp_path / "out"), "--model must be given"),
        (("--format", "vllm", "--model", tiny_checkpoint), "--output must be given"),
        (
            ("--format", "vllm", "--model", tiny_checkpoint, "-o", "-"),
            "--output - is for text; the directory",
        ),
    ):
        assert simdiff("export", plan, *words) == 2
        assert wanted in capsys.readouterr().err
    assert simdiff("prune", tiny_checkpoint, "--plan", plan, "-o", tmp_path / "p") == 2
    assert "for vLLM (`simdiff export --format vllm`)" in capsys.readouterr().err
