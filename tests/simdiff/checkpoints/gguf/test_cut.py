"""GGUF files cut on the file itself: what is copied, what changes, what a bad file does."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from simdiff import cli
from simdiff.checkpoints.gguf import writer as gguf_output
from simdiff.checkpoints.gguf.container import GgufFile
from simdiff.checkpoints.gguf.cut import is_gguf, prune_gguf
from simdiff.errors import SimdiffError
from support.gguf_models import check_tensors, content, with_entry, write_gguf
from support.plans import plan_for


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
        "UINT8": 200,
        "INT8": -3,
        "UINT16": 60000,
        "INT16": -3000,
        "UINT32": 4_000_000_000,
        "INT32": -5,
        "FLOAT32": 0.1,
        "UINT64": 2**60,
        "INT64": -(2**60),
        "FLOAT64": 0.1,
        "BOOL": True,
        "STRING": "ein Satz, ungekürzt",
    }.items():
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
    assert after.pop("simdiff.removed_layers")[1] == "1,4"
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


def test_entries_of_another_type_or_size(tmp_path: Path) -> None:
    """Counts as text, and counts that a loop or a set over them would not survive."""
    sound, path = GgufFile(write_gguf(tmp_path / "a.gguf")), tmp_path / "b.gguf"
    text, huge = struct.pack("<IQ", 8, 1) + b"x", struct.pack("<IQ", 10, (1 << 63) + 5)
    far = struct.pack("<IIQQQ", 9, 8, 2, 0, (1 << 63) - 1)
    for key, value, wanted in (
        ("split.count", text, "'split.count' must be a whole number, got 'x'"),
        ("split.count", struct.pack("<If", 6, 2.0), "must be a whole number, got '2.0'"),
        ("llama.block_count", text, "must be a whole number"),
        ("llama.block_count", huge, "layer 6 has none"),
        ("llama.nextn_predict_layers", text, "must be a whole number"),
        ("llama.leading_dense_block_count", text, "must be a whole number"),
        ("llama.attention.sliding_window", text, "must be a whole number"),
        ("llama.n_deepstack_layers", text, "must be a whole number"),
        ("tokenizer.ggml.tokens", far, "is truncated"),
        ("other", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, "'other' is nested too"),
    ):
        path.write_bytes(with_entry(sound, key, value))
        with pytest.raises(SimdiffError, match=wanted):
            prune_gguf(path, plan_for(6, (1,)), tmp_path / "c.gguf")
    sound.close()


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
        patch.setattr(gguf_output, "_copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune_gguf(source, plan, output)
    with monkeypatch.context() as patch:  # a copy that comes out short is noticed before renaming
        copy = gguf_output._copy
        patch.setattr(gguf_output, "_copy", lambda pieces, *rest: copy(list(pieces)[:-1], *rest))
        with pytest.raises(SimdiffError, match="truncated"):
            prune_gguf(source, plan, output)
    with monkeypatch.context() as patch:
        full = SimpleNamespace(free=100)
        patch.setattr(gguf_output.shutil, "disk_usage", lambda _: full)
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
