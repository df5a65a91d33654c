"""Readers of files that others wrote: a damaged file gives a sentence or a right result.

Never another exception, a hang or more memory than a small file needs. `support/damage.py` makes
the damage. What was found so is a test of its own beside the other tests of that reader.
"""

from __future__ import annotations

import inspect
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

from simdiff.checkpoints.gguf import position_rules
from simdiff.checkpoints.gguf.container import GgufFile
from simdiff.checkpoints.gguf.cut import examine_gguf, gguf_depth, prune_gguf
from simdiff.checkpoints.weight_index import INDEX, read_weights
from simdiff.errors import SimdiffError
from simdiff.evaluation.journal import EvaluationJournal
from simdiff.io.json_files import write_json
from simdiff.io.safetensors_header import read_header
from simdiff.planning.plan import PruningPlan, is_sublayer_plan
from simdiff.recovery.training.state import STATE, TrainingState
from simdiff.report.sources import read_sources
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.plan import SublayerName, SublayerPlan
from support.damage import damaged_bytes, damaged_json, fuzz
from support.gguf_models import ODD_ENTRIES, with_entry, write_gguf
from support.plans import plan_for
from support.report_files import evaluation, recovery, write_run
from support.scores import drawn_scores
from support.tiny_models import make_tiny

Result = TypeVar("Result")
OF_ALL = ("general.alignment", "general.architecture", "split.count", "split.no", "general.type")
KEY = {"model": "tiny", "text": {"name": "t"}}


def read(reader: Callable[[], Result]) -> Result | None:
    """What a reader returns; None where it refuses the file in a sentence."""
    try:
        return reader()
    except SimdiffError as error:
        words = str(error)
    assert 20 < len(words) < 2000, words
    return None


def either(text: st.SearchStrategy[str], data: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file damaged in its structure, or in its bytes."""
    written = text.map(lambda t: t.encode("utf-8", errors="surrogatepass"))
    return st.one_of(written, written, damaged_bytes(data))


def test_headers_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file({**tensors, "c": torch.ones((), dtype=torch.int64)}, path, {"format": "pt"})
    valid = path.read_bytes()
    (length,) = struct.unpack("<Q", valid[:8])
    header = json.loads(valid[8 : 8 + length])

    def whole(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode() + valid[8 + length :]

    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = read(lambda: read_header(path))
        if found is None:
            return
        try:
            entries = dict(deserialize(content))
        except SafetensorError as error:
            pytest.fail(f"safetensors refuses what was read: {error}: {content[8:400]!r}")
        assert {t.name for t in found[1]} == set(entries)
        for tensor in found[1]:
            entry = entries[tensor.name]
            assert (tensor.dtype, list(tensor.shape)) == (entry["dtype"], list(entry["shape"]))
            assert content[tensor.start :][: tensor.num_bytes] == bytes(entry["data"])

    fuzz(st.one_of(damaged_json(header).map(whole), damaged_bytes(valid)), check, 200)


def test_indices_of_shards(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / names[0])
    save_file({"c": torch.ones(2)}, tmp_path / names[1])
    where = {"a": names[0], "b": names[0], "c": names[1]}
    index = {"metadata": {"total_size": 28}, "weight_map": where}

    def check(content: bytes) -> None:
        (tmp_path / INDEX).write_bytes(content)
        found = read(lambda: read_weights(tmp_path))
        if found is not None:
            assert {name: tensor.path.name for name, tensor in found.tensors.items()} == where

    fuzz(either(damaged_json(index), json.dumps(index).encode()), check, 200)


def test_gguf_files(tmp_path: Path) -> None:
    path, output = tmp_path / "model.gguf", tmp_path / "cut.gguf"
    valid = write_gguf(
        path, lambda writer, _: writer.add_array("tokenizer.ggml.tokens", ["a", "bc"]), num_blocks=3
    ).read_bytes()
    plan = plan_for(3, (1,))
    architectures = ("llama", "deepseek2", "gemma3", "llama4", "rwkv7", "qwen3next", "nemotron_h")
    names = sorted(set(re.findall(r'whole\("([a-z_.]+)"', inspect.getsource(position_rules))))
    keys = (*names, "block_count", "nextn_predict_layers", "leading_dense_block_count", "new")
    sound = {
        name: GgufFile(write_gguf(tmp_path / name, architecture=name, num_blocks=3))
        for name in architectures
    }

    def typed(drawn: tuple[str, str, bytes]) -> bytes:
        name, key, value = drawn
        return with_entry(sound[name], key if key in OF_ALL else f"{name}.{key}", value)

    entries = st.tuples(
        st.sampled_from(architectures),
        st.sampled_from((*OF_ALL, *keys)),
        st.sampled_from(ODD_ENTRIES),
    ).map(typed)
    head = len(valid) - sum(tensor.num_bytes for tensor in GgufFile(path).tensors)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        depth = read(lambda: gguf_depth(path))
        examined = read(lambda: examine_gguf(path))
        assert examined is None or examined[1] == depth
        if read(lambda: prune_gguf(path, plan, output, overwrite=True)) is not None:
            assert gguf_depth(output) == 2

    try:
        fuzz(st.one_of(damaged_bytes(valid, head), entries), check, 200)
    finally:
        for file in sound.values():
            file.close()


def test_plans(tmp_path: Path) -> None:
    path, again = tmp_path / "plan.json", tmp_path / "again.json"
    full = plan_for(6, (2, 4), num_parameters=100).to_dict()
    by_hand = PruningPlan((2, 3), 6).to_dict()
    lists = st.from_regex(r"[0-9]{1,6}([-, \n][0-9]{1,12}){0,6}", fullmatch=True)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        read(lambda: is_sublayer_plan(path))
        plan = read(lambda: PruningPlan.load(path))
        if plan is None:
            return
        plan.save(again)
        assert PruningPlan.load(again) == plan
        removed = read(lambda: [plan.reason(layer) for layer in (*plan.removed, *plan.protected)])
        assert removed is not None
        assert not plan.num_layers or set(plan.kept) | set(plan.removed) == set(
            range(plan.num_layers)
        )

    text = json.dumps(full).encode()
    damage = either(st.one_of(damaged_json(full), damaged_json(by_hand), lists), text)
    fuzz(damage, check, 200)


def test_plans_of_sublayers(tmp_path: Path) -> None:
    path, again = tmp_path / "plan.json", tmp_path / "again.json"
    ranking = tuple(SublayerName(layer, "attention") for layer in (1, 0, 2))
    valid = SublayerPlan(
        unit="attention",
        removed=ranking[:1],
        ranking=ranking,
        importance=(0.1, 0.2, 0.3),
        num_layers=3,
        protected=(),
        criterion="block-influence",
        formula="f",
        alpha=None,
        notes=(),
        model={"name": "m"},
        calibration={},
        options={},
    ).to_dict()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        plan = read(lambda: SublayerPlan.load(path))
        if plan is not None:
            plan.save(again)
            assert SublayerPlan.load(again) == plan

    fuzz(either(damaged_json(valid), json.dumps(valid).encode()), check, 200)


def test_scores(tmp_path: Path) -> None:
    path, again = tmp_path / "scores.json", tmp_path / "again.json"
    drawn_scores(3, 2).save(path)
    valid = json.loads(path.read_text())

    def check(content: bytes) -> None:
        path.write_bytes(content)
        scores = read(lambda: LayerScores.load(path))
        if scores is not None:
            scores.save(again)
            first, second = (s.to_dict() for s in (scores, LayerScores.load(again)))
            assert {**first, "created": ""} == {**second, "created": ""}

    fuzz(either(damaged_json(valid), json.dumps(valid).encode()), check, 200)


def test_journals_of_evaluations(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    with EvaluationJournal(KEY, path, lambda layers: [1.5, 2.5]) as journal:
        journal((1, 2))
        journal((3,))
    valid = json.loads(path.read_text())

    def check(content: bytes) -> None:
        path.write_bytes(content)
        journal = read(lambda: EvaluationJournal(KEY, path, lambda layers: [9.0]))
        if journal is not None:
            assert all(isinstance(loss, float) for loss in journal((1, 2)).losses)

    fuzz(either(damaged_json(valid), json.dumps(valid).encode()), check, 200)


def test_states_of_a_training(tmp_path: Path) -> None:
    state = TrainingState(4, 2, weights={"a": torch.ones(3)}, losses=[1.0])
    state.save(tmp_path, KEY)
    valid = (tmp_path / STATE).read_bytes()

    def check(content: bytes) -> None:
        (tmp_path / STATE).write_bytes(content)
        found = read(lambda: TrainingState.load(tmp_path, KEY))
        assert found is None or isinstance(found, TrainingState)

    fuzz(damaged_bytes(valid, len(valid)), check, 200)


def test_files_of_a_report(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    tokens = torch.randint(1, 90, (4, 16), generator=torch.Generator().manual_seed(3))
    plan = write_run(directory, score(make_tiny("llama"), [tokens], name="tiny", progress=False))
    sound = {
        "evaluation": evaluation(plan),
        "recovery": recovery(),
        "results": json.loads((directory / "results.json").read_text()),
    }
    for kind, content in sound.items():
        write_json(directory / f"{kind}.json", content)
    assert read_sources(directory).evaluation is not None

    def check(drawn: tuple[str, str]) -> None:
        kind, text = drawn
        (directory / f"{kind}.json").write_text(text)
        read(lambda: read_sources(directory))
        write_json(directory / f"{kind}.json", sound[kind])

    kinds = [st.tuples(st.just(kind), damaged_json(content)) for kind, content in sound.items()]
    fuzz(st.one_of(kinds), check, 100)


def test_what_is_sound_is_read(tmp_path: Path) -> None:
    """The checks above mean nothing where every file is refused."""
    for plan in (plan_for(6, (2, 4)), PruningPlan((2, 3), 6)):
        plan.save(tmp_path / "plan.json")
        assert PruningPlan.load(tmp_path / "plan.json") == plan
