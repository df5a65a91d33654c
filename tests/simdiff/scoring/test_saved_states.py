"""Scores from files of hidden states: those of the hooks, bit for bit; and what is refused."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import simdiff
from simdiff.errors import SimdiffError
from simdiff.models.layer_calls import entering, leaving
from simdiff.models.structure import find_decoder_layers
from simdiff.scoring.calibration_pass import score
from support.commands import simdiff as command
from support.processes import Processes

LENGTHS = (11, 11, 7, 300, 1)


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 97, (1, length), generator=generator) for length in LENGTHS]


@torch.no_grad()
def save_states(model: PreTrainedModel, batches: list[Tensor], directory: Path) -> None:
    """As vLLM writes them: `<request>.safetensors` beside a file that is locked meanwhile."""
    directory.mkdir()
    for number, ids in enumerate(batches):
        states: list[Tensor] = []

        def enter(layer, args, kwargs, states=states):
            states.append(entering(0, args, kwargs)[0].clone())

        def leave(layer, args, output, states=states):
            states.append(leaving(0, output)[0].clone())

        layers = find_decoder_layers(model).modules
        handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
        handles.append(layers[-1].register_forward_hook(leave))
        model(input_ids=ids)
        for handle in handles:
            handle.remove()
        content = {"hidden_states": torch.stack(states, 1), "token_ids": ids[0]}
        path = directory / f"{number}-f00.safetensors"
        save_file(content, path)
        path.with_name(path.name + ".lock").touch()


def numbers(scores: simdiff.LayerScores) -> dict[str, object]:
    """All of it, but for text and time, and weights, which nobody need have who has states."""
    content = scores.to_dict()
    content["model"].pop("weights", None)
    return {name: content[name] for name in content if name not in ("created", "calibration")}


def test_the_same_bits_as_hooks(tiny: PreTrainedModel, tmp_path: Path) -> None:
    save_states(tiny, texts(), tmp_path / "states")
    for options in ({}, {"skip_leading": 2, "groups": 2}):
        # The last file has one token, of which none is left where two are skipped: the hooks
        # refuse a batch like that.
        batches = texts() if not options else texts()[:-1]
        if options:
            (tmp_path / "states" / "4-f00.safetensors").unlink()
        found = simdiff.score_states(tiny, tmp_path / "states", progress=False, **options)
        wanted = score(tiny, batches, name="", progress=False, **options)
        assert numbers(found) == numbers(wanted)
        assert found.blocks is not None
        assert found.sequences is not None
        assert found.last_token_angles is not None


def test_the_command_in_one_and_in_two_processes(
    llama: PreTrainedModel, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The model of a directory is not loaded: its weights may be missing."""
    half = llama.bfloat16()
    save_states(half, texts(), tmp_path / "states")
    (tiny_checkpoint / "model.safetensors").unlink()
    words = ["score", tiny_checkpoint, "--states", tmp_path / "states", "-o"]
    assert command(*words, tmp_path / "scores.json") == 0
    found = simdiff.LayerScores.load(tmp_path / "scores.json")
    wanted = score(half, texts(), name=str(tiny_checkpoint), progress=False)
    assert numbers(found) == numbers(wanted)
    assert found.model["dtype"] == "bfloat16"
    assert found.calibration["num_tokens"] == sum(LENGTHS)
    shared = Processes(2, lambda rank: command(*words, tmp_path / "2.json"), tmp_path / "processes")
    assert [end.code for end in shared.wait()] == [0, 0]
    again = simdiff.LayerScores.load(tmp_path / "2.json")
    assert numbers(again) == numbers(found)


def test_what_is_refused(
    llama: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "states"
    save_states(llama, texts()[:2], directory)
    path = directory / "1-f00.safetensors"
    whole, states = path.read_bytes(), load_file(path)["hidden_states"]

    def refused(content: dict[str, Tensor] | bytes) -> str:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file({name: value.contiguous() for name, value in content.items()}, path)
        with pytest.raises(SimdiffError) as caught:
            simdiff.score_states(llama, directory, progress=False)
        path.write_bytes(whole)
        assert str(path) in str(caught.value)
        return str(caught.value)

    def changed(change: Callable[[Tensor], Tensor]) -> str:
        return refused({"hidden_states": change(states.clone()), "token_ids": texts()[1][0]})

    message = changed(lambda states: states[:, :-1])
    assert "must have shape (tokens, 7, 32), got (11, 6, 32): the states that enter" in message
    assert "must have shape (tokens, 7, 32), got (11, 7, 31)" in changed(lambda s: s[..., :-1])
    assert "must have shape (tokens, 7, 32), got (11, 224)" in changed(lambda s: s.flatten(1))
    assert "of one dtype in all files, got BF16 and F32" in changed(lambda s: s.bfloat16())
    assert "must be floating-point numbers, got I32" in changed(lambda s: s.int())
    assert "got NaN or Inf in state 3 of token 5" in changed(
        lambda s: s.index_put_((torch.tensor(5), torch.tensor(3)), torch.tensor(float("nan")))
    )
    assert "must hold hidden_states and token_ids, got hidden_states" in refused(
        {"hidden_states": states}
    )
    assert "must be 11 integers" in refused({"hidden_states": states, "token_ids": torch.ones(3)})
    empty = {"hidden_states": states[:0], "token_ids": torch.zeros(0, dtype=torch.int64)}
    assert "at least one token" in refused(empty)
    assert "must be a complete safetensors file" in refused(whole[: len(whole) // 2])
    with (directory / "1-f00.safetensors.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "still being written" in refused(whole)
    with pytest.raises(SimdiffError, match="must be a directory"):
        simdiff.score_states(llama, path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SimdiffError, match="a .safetensors file for each prompt, got an empty"):
        simdiff.score_states(llama, tmp_path / "empty")
    with pytest.raises(SimdiffError, match="skip_leading must be below"):
        simdiff.score_states(llama, directory, skip_leading=11)
    words = ["score", "m", "--states", directory, "--text", "demo", "--sublayers", "-o"]
    assert command(*words, tmp_path / "x") == 2
    assert "and no text: not with --text, --sublayers" in capsys.readouterr().err
