"""Models of equal shapes are told apart by their weights, whatever they are loaded as."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from simdiff.io.progress import silent
from simdiff.models.files import same_weights
from simdiff.models.identity import model_identity
from simdiff.models.loading import load_model
from simdiff.models.streamed import StreamOptions
from simdiff.models.weights import _runs, stored_weights, weights_of
from simdiff.surgery.layers import layers_removed


@pytest.mark.parametrize("count", [257, 1000, 4096, 576 * 1536])
def test_runs_lie_evenly(count: int) -> None:
    runs = sorted(_runs(count))
    assert len(runs) == 16
    assert all(0 <= first < end <= count for first, end in runs)
    assert {end - first for first, end in runs} == {16}
    ends = [0, *(end for _, end in runs)]
    gaps = [first - end for (first, _), end in zip([*runs, (count, 0)], ends, strict=True)]
    assert max(gaps) < count / 11
    assert _runs(256) == [(0, 256)]
    assert _runs(0) == [(0, 0)]


def test_files_tell_whatever_they_are_loaded_as(tiny_checkpoint: Path) -> None:
    wanted = stored_weights(tiny_checkpoint)
    with silent():
        found = {
            dtype: load_model(str(tiny_checkpoint), dtype=dtype, device="cpu")[0]
            for dtype in ("auto", "bfloat16", "float16")
        }
        streamed, _ = load_model(
            str(tiny_checkpoint), device="cpu", stream=StreamOptions(always=True)
        )
    weights = {dtype: weights_of(model) for dtype, model in found.items()}
    assert weights["auto"] == weights["bfloat16"] == {**wanted, **weights["auto"]}
    assert weights["auto"].keys() == {"files", "memory"}
    assert weights["float16"] == wanted == weights_of(streamed)  # float16 was rounded on the way
    copy = tiny_checkpoint.with_name("copy")  # another dtype, in several files
    found["bfloat16"].save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("*.safetensors"))) > 1
    assert stored_weights(copy) == wanted
    with layers_removed(found["auto"], {1}):  # the files are no longer what it is
        assert weights_of(found["auto"]).keys() == {"memory"}
    next(iter(copy.glob("*.safetensors"))).unlink()
    assert stored_weights(copy) == {}


def test_every_tensor_tells(tiny_checkpoint: Path) -> None:
    with silent():
        model, _ = load_model(str(tiny_checkpoint), device="cpu")
    before = weights_of(model)
    seen = [before["memory"]]
    other = shutil.copytree(tiny_checkpoint, tiny_checkpoint.with_name("other"))
    for name, parameter in list(model.named_parameters())[::7]:
        parameter.data.mul_(1.01)
        assert weights_of(model).keys() == {"memory"}, name
        seen.append(weights_of(model)["memory"])
    assert len(set(seen)) == len(seen)
    parameter = model.get_parameter("model.layers.3.mlp.down_proj.weight")
    whole, rows = parameter.detach().clone(), len(parameter)
    for first in range(rows - rows // 10):  # a tenth of its rows
        parameter.data[first : first + rows // 10] *= 1.01
        assert weights_of(model)["memory"] not in seen, first
        parameter.data.copy_(whole)
    model.save_pretrained(other)
    assert same_weights({"weights": stored_weights(other)}, {"weights": before}) is False


def test_weights_are_compared_by_what_both_have(llama: PreTrainedModel) -> None:
    digests = [{}, {"files": "a"}, {"memory": "m"}, {"files": "a", "memory": "n"}, {"files": "b"}]
    found = {
        (one, other): same_weights({"weights": digests[one]}, {"weights": digests[other]})
        for one, other in itertools.combinations(range(5), 2)
    }
    differ = {pair for pair, same in found.items() if same is False}
    assert differ == {(1, 4), (2, 3), (3, 4)}
    assert {pair for pair, same in found.items() if same} == {(1, 3)}
    assert same_weights({}, {"weights": {"files": "a"}}) is None
    with torch.no_grad():
        before = model_identity(llama, "")
        llama.model.norm.weight += 1
    assert model_identity(llama, "")["fingerprint"] == before["fingerprint"]
    assert same_weights(before, model_identity(llama, "")) is False
