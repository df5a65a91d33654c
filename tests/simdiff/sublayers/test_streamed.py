"""Sub-layers of a streamed model: found and scored as those of the whole, after a kill too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.layer_by_layer import LayerByLayer
from simdiff.models.streamed import stream_of
from simdiff.sublayers.scores import score_with_sublayers
from support.streams import batches, stored, streamed, whole


def scored(model: PreTrainedModel) -> dict[str, Any]:
    content = score_with_sublayers(model, batches(), progress=False).to_dict()
    del content["created"], content["model"]["weights"]  # see support.streams.scored
    return content


# One after the other; side by side, the one added to the other in place; one in each layer, tuples.
@pytest.mark.parametrize("family", ["gemma3", "falcon", "nemotron-h", "gpt2"])
def test_scores_are_those_of_the_whole_model(family: str, tmp_path: Path, monkeypatch) -> None:
    path = stored(family, tmp_path / "model")
    wanted = scored(whole(path))
    model = streamed(path, memory=0, folder=tmp_path / "states")
    stream = stream_of(model)
    assert stream is not None
    before = stream.bytes_read
    step, calls = LayerByLayer.step, []

    def interrupted(self: LayerByLayer, *arguments: Any) -> Any:
        calls.append(arguments[2])
        if len(calls) == 4 * 3 + 2:  # three batches and the few tokens: the fourth layer
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(LayerByLayer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scored(model)
    again = streamed(path, memory=0, folder=tmp_path / "states")
    assert scored(again) == wanted
    assert len(calls) == 4 * 3 + 2 + 4 * 3
    assert stream.watcher is None
    assert stream.bytes_read - before <= sum(map(stream.num_bytes, range(5)))


def test_layers_of_another_structure_are_refused(tmp_path: Path) -> None:
    model = streamed(stored("bloom", tmp_path / "model"))
    with pytest.raises(SimdiffError, match=r"layer 0 \(BloomBlock\): its attention and its MLP"):
        scored(model)
