"""Streamed models: the same bits as the whole, every weight read once, killed and gone on with."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import modeling_utils

from simdiff.errors import SimdiffError
from simdiff.models import layer_by_layer, state_files
from simdiff.models.gpu_copies import GpuCopies
from simdiff.models.layer_by_layer import LayerByLayer
from simdiff.models.loading import load_config, streamed_stock
from simdiff.models.streamed import StreamOptions, stream_of
from simdiff.models.structure import find_decoder_layers
from simdiff.models.sweep import remove_states
from simdiff.models.tensor_reader import TensorReader
from support.streams import scored, stored, streamed, whole

# Tied head, sliding windows, layer types, fused and plain experts, buffers, linear attention, state
# spaces, learned positions, layers that return tuples.
KINDS = (
    "gemma3",
    "qwen2",
    "deepseek-v3",
    "qwen3-moe",
    "qwen3-next",
    "bamba",
    "lfm2",
    "gpt2",
    "bloom",
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def wanted(llama: Path) -> dict[str, Any]:
    return scored(whole(llama))


@pytest.mark.parametrize("family", KINDS)
def test_scores_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    path = stored(family, tmp_path / "model")
    model = streamed(path, memory=0, folder=tmp_path / "states")
    names = [name for name, _ in model.named_parameters()]
    assert scored(model) == scored(whole(path))
    assert [name for name, _ in model.named_parameters()] == names
    remove_states(model)
    assert not (tmp_path / "states").exists()


@pytest.mark.parametrize("family", ["gemma3", "qwen3-moe"])
def test_weights_that_are_cast(family: str, tmp_path: Path) -> None:
    path = stored(family, tmp_path / "model")
    assert scored(streamed(path, "bfloat16")) == scored(whole(path, "bfloat16"))


def test_a_model_makes_the_arguments_of_its_layers_once(llama: Path, wanted, monkeypatch) -> None:
    asked, run = [], LayerByLayer._run_body

    def counted(self, batch, course):
        asked.append(batch)
        return run(self, batch, course)

    monkeypatch.setattr(LayerByLayer, "_run_body", counted)
    assert scored(streamed(llama)) == wanted
    assert len(asked) == 1 + 3 * 3  # two tokens; a batch's layer 0, arguments, embeddings
    for room, most in ((0, 1 + 3 * 7), (600, 1 + 2 * 8 + 3)):  # the last batch's fit
        asked.clear()
        monkeypatch.setattr(layer_by_layer, "_ARGUMENT_BYTES", room)
        assert scored(streamed(llama)) == wanted
        assert len(asked) == most


class Gpu:
    """In place of a GPU: copies are made at once, and what waits for what is written down."""

    class Event:
        def __init__(self, log: list[Any], name: tuple[str, int]) -> None:
            self.log, self.name = log, name

        def synchronize(self) -> None:
            self.log.append(("waited", *self.name))

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.counts = Counter[str]()

    def event(self, kind: str) -> Gpu.Event:
        number = self.counts[kind]
        self.counts[kind] += 1
        self.log.append((kind, number))
        return Gpu.Event(self.log, (kind, number))

    def to_gpu(self, tensors):
        return [tensor.clone() for tensor in tensors], self.event("copied")

    def take(self, tensors, copied) -> None:
        self.log.append(("taken", copied.name[1]))

    def to_main(self, tensor):
        return tensor.clone(), self.event("states")

    def computed(self):
        return self.event("computed")


def test_what_waits_for_a_gpu(llama: Path, wanted, tmp_path: Path, monkeypatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(GpuCopies, "of", lambda _: gpu)
    empty, read = torch.empty, TensorReader.read
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **{**k, "pin_memory": False}))

    def noted(self, tensors):
        gpu.event("read")
        return read(self, tensors)

    monkeypatch.setattr(TensorReader, "read", noted)
    assert scored(streamed(llama, memory=0, folder=tmp_path / "states")) == wanted
    at = {entry: place for place, entry in reversed([*enumerate(gpu.log)])}
    assert gpu.counts["copied"] == gpu.counts["read"] == 6
    for layer in range(6):
        assert at["copied", layer] < at["taken", layer] < at["computed", layer]
        if layer > 1:  # no third layer on the GPU, no memory that is still copied from read over
            assert at["waited", "computed", layer - 2] < at["copied", layer]
            assert at["waited", "copied", layer - 2] < at["read", layer]
            assert ("waited", "computed", layer - 1) not in gpu.log[: at["copied", layer]]
    written = [entry for entry in gpu.log if entry[0] == "states"]
    assert len(written) == 6 * 3
    assert all(("waited", *entry) in gpu.log for entry in written)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_scores_on_a_gpu(llama: Path, tmp_path: Path, dtype: str, memory: int) -> None:
    wanted = scored(whole(llama, dtype, "cuda"))["metrics"]
    with torch.cuda.stream(torch.cuda.Stream()):  # whichever the caller computes in
        model = streamed(llama, dtype, "cuda", memory=memory, folder=tmp_path / "states")
        found = scored(model)["metrics"]
    for name, metric in wanted.items():
        assert found[name]["mean"] == pytest.approx(metric["mean"], rel=1e-3, abs=1e-6), name
    assert all(one.is_meta for one in find_decoder_layers(model).modules.parameters())


def test_each_weight_is_read_once_and_then_gone(llama: Path, monkeypatch) -> None:
    model = streamed(llama)
    stream = stream_of(model)
    assert stream is not None
    layers = list(find_decoder_layers(model).modules)
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())
    with monkeypatch.context() as patch:  # what it takes as it is does not pass through the loader
        patch.setattr(modeling_utils, "convert_and_load_state_dict_in_model", None)
        scored(model)
    content = safetensors.torch.load_file(llama / "model.safetensors")
    sizes = {name: value.numel() * value.element_size() for name, value in content.items()}
    inside = sum(size for name, size in sizes.items() if ".layers." in name)
    assert stream.bytes_read == inside
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())
    assert model.lm_head.weight.is_meta


def test_a_held_layer_outlives_its_turn(llama: Path) -> None:
    """Where it begins in a line of the cache, which decides over last bits, stays too."""
    stream = stream_of(model := streamed(llama))
    assert stream is not None
    layer, wanted = find_decoder_layers(model).modules[1], whole(llama).model.layers[1]
    each = stream.each([1, 2, 3, 4])
    next(each)
    places = [parameter.data_ptr() % 64 for parameter in layer.parameters()]
    stream.hold(1)
    assert [parameter.data_ptr() % 64 for parameter in layer.parameters()] == places
    assert any(places)
    next(each), next(each), next(each)
    for ours, theirs in zip(layer.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    stream.release(1)
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_what_layers_share_is_refused(tmp_path: Path) -> None:
    model = streamed(stored("gemma3n", tmp_path / "model"))
    with pytest.raises(SimdiffError, match="layer 2 passes more than its hidden states on"):
        scored(model)


def test_what_happens_between_layers_is_refused(llama: Path) -> None:
    model = streamed(llama)
    layer = find_decoder_layers(model).modules[3]
    layer.register_forward_pre_hook(lambda _, arguments: (arguments[0] / 2, *arguments[1:]))
    with pytest.raises(SimdiffError, match="changes the hidden states between layers 2 and 3"):
        scored(model)


def test_hidden_states_within_a_bound(llama: Path, wanted, tmp_path: Path, monkeypatch) -> None:
    model = streamed(llama, memory=100)
    with pytest.raises(SimdiffError, match="more than 100 bytes of memory"):
        scored(model)
    not_cached = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: not_cached.append(_))
    for memory, held in ((0, 0), (5000, 0), (1 << 20, 6)):  # what lies in memory is not cached too
        model = streamed(llama, memory=memory, folder=tmp_path / str(memory))
        assert scored(model) == wanted
        assert len(not_cached) == held


def test_weight_files_must_not_change(llama: Path, tmp_path: Path) -> None:
    path = shutil.copytree(llama, tmp_path / "model")
    model = streamed(path)
    os.utime(path / "model.safetensors", ns=(1, 1))
    with pytest.raises(SimdiffError, match="must stay as it is while .* and has changed"):
        scored(model)
    (path / "model.safetensors").unlink()
    with pytest.raises(SimdiffError, match="and is gone"):
        scored(model)


def test_folders_that_cannot_be_used(llama: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "states"
    scored(streamed(llama, folder=folder))
    other = shutil.copytree(llama, tmp_path / "other")  # the same, but its files are newer
    os.utime(other / "model.safetensors", ns=(1, 1))
    with pytest.raises(SimdiffError, match="is of another run, which differs in weight files"):
        scored(streamed(other, folder=folder))
    model = streamed(llama, folder=folder)
    monkeypatch.setattr("support.streams.PADDED", torch.ones(2, 7, dtype=torch.int64))
    with pytest.raises(SimdiffError, match="another run, which differs in the text"):
        scored(model)
    remove_states(model)
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    with pytest.raises(SimdiffError, match="must be new or empty, and holds other files"):
        scored(streamed(llama, folder=folder))
    assert (folder / "letter.txt").exists()
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".run.json.x1y2").touch()  # of a run that was killed while it began
    model = streamed(llama, folder=folder)
    scored(model)
    remove_states(model)
    assert folder.exists()  # it was there before
    assert not any(folder.iterdir())
    write = state_files.write_json

    def denied(path, content):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(state_files, "write_json", denied)
    with pytest.raises(SimdiffError, match="cannot be written: Permission denied"):
        scored(streamed(llama, folder=folder))
    monkeypatch.setattr(state_files, "write_json", write)
    with pytest.raises(SimdiffError, match="streamed pass"):
        scored(streamed(llama, folder=tmp_path / "no" / "parent"))


def test_a_full_disk(llama: Path, wanted, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(state_files.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(SimdiffError, match=r"must have .* bytes free for the hidden states"):
            scored(streamed(llama, folder=tmp_path / "states"))
    write, written = state_files.StateSets._write, []

    def full(self, name, states):
        written.append(name)
        if len(written) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, states)

    with monkeypatch.context() as patch:
        patch.setattr(state_files.StateSets, "_write", full)
        with pytest.raises(SimdiffError, match="the disk is full; what is finished stays"):
            scored(streamed(llama, folder=tmp_path / "states"))
    model = streamed(llama, folder=tmp_path / "states")
    assert scored(model) == wanted
    assert "0003" in written[8]  # the third layer failed, so two were not read again
    stream = stream_of(model)
    assert stream is not None
    assert stream.bytes_read == streamed_bytes(llama, layers=range(2, 6))


def streamed_bytes(path: Path, layers: range) -> int:
    """What is read of some layers and what lies outside them."""
    model = streamed(path)
    stream = stream_of(model)
    assert stream is not None
    return stream.bytes_read + sum(map(stream.num_bytes, layers))


KILLED = """
import os, signal, sys
from pathlib import Path
from simdiff.models.layer_by_layer import LayerByLayer
from support.streams import scored, streamed
step, calls = LayerByLayer.step, []
def killed(self, *arguments):
    calls.append(arguments)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)
LayerByLayer.step = killed
scored(streamed(Path(sys.argv[1]), folder=Path(sys.argv[2])))
"""


@pytest.mark.parametrize("at", [11])  # the fourth layer, its second batch of three
def test_a_kill_loses_no_finished_layer(llama: Path, wanted, tmp_path: Path, at: int) -> None:
    command = [sys.executable, "-c", KILLED, str(llama), str(tmp_path / "states"), str(at)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    model = streamed(llama, folder=tmp_path / "states")
    assert scored(model) == wanted
    stream = stream_of(model)
    assert stream is not None
    # The writer may have been killed before the third layer's files were named.
    some = {streamed_bytes(llama, layers=range(first, 6)) for first in (2, 3)}
    assert stream.bytes_read in some


def test_a_streamed_model_runs_on_one_device(llama: Path) -> None:
    with pytest.raises(SimdiffError, match="a streamed model runs on one device"):
        streamed_stock(str(llama), load_config(llama), "tiny", "auto", "auto", StreamOptions())


def test_streaming_is_chosen_where_a_model_does_not_fit(llama: Path, monkeypatch, capsys) -> None:
    options = StreamOptions()
    assert not options.is_for(llama, "auto", "cpu", "tiny")
    size = (llama / "model.safetensors").stat().st_size
    monkeypatch.setattr("simdiff.models.streamed.available_memory", lambda _: size)
    assert options.is_for(llama, "auto", "cpu", "tiny")
    assert "Note: tiny is streamed a layer at a time" in capsys.readouterr().err
    assert not options.is_for(llama, torch.bfloat16, "cpu", "tiny")
    assert StreamOptions(always=True).is_for(llama, torch.bfloat16, "cpu", "tiny")
