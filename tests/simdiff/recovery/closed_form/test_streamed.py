"""Closed-form recovery of a streamed model: the bits of the whole, within a bound, after a kill."""

from __future__ import annotations

import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from simdiff.errors import SimdiffError
from simdiff.models.state_files import StateSets
from simdiff.models.streamed import stream_of
from simdiff.models.sweep import remove_states
from simdiff.recovery.closed_form.method import recover
from simdiff.recovery.closed_form.settings import Settings
from simdiff.recovery.closed_form.streamed import StreamedCorrection, recover_streamed
from simdiff.recovery.record import changed_parameters
from simdiff.surgery.copies import sharing_copy
from simdiff.surgery.layers import layers_removed
from support.closed_form import tokens
from support.families import tiny
from support.own_text import decided, drawn
from support.plans import plan_for
from support.processes import Processes
from support.streams import streamed, whole

BATCH = 4


def stored(family: str, directory: Path) -> Path:
    """A model whose layers matter, so that some correction is kept."""
    decided(tiny(family), 6).save_pretrained(directory)
    return directory


def of_whole(path: Path, removed: tuple[int, ...], text: torch.Tensor, **options: Any) -> tuple:
    model = whole(path)
    pruned = sharing_copy(model, removed)
    outcome = recover(
        model, plan_for(6, removed), text, pruned=pruned, options=options, batch_size=BATCH
    )
    with layers_removed(model, removed):
        return asdict(outcome), changed_parameters(pruned, model)


def of_streamed(model: Any, removed: tuple[int, ...], text: torch.Tensor, **options: Any) -> tuple:
    plan = plan_for(6, removed)
    outcome, changed = recover_streamed(model, plan, text, options=options, batch_size=BATCH)
    return asdict(outcome), changed


# Biases and tuples; a norm behind the projection and sliding windows; experts in some layers.
# A layer between two cuts; layers behind the last one that is corrected.
CASES = {
    ("qwen2", 2): (1, 4),
    ("qwen2", 1): (1, 3),
    ("gpt2", 2): (0, 3, 4, 5),
    ("gpt2", 0): (2,),
    ("gemma3", 1): (1, 2),
    ("mixtral", 2): (2, 3),
}


@pytest.mark.parametrize(("family", "after"), CASES)
def test_the_bits_of_the_model_in_memory(family: str, after: int, tmp_path: Path) -> None:
    path, removed = stored(family, tmp_path / "model"), CASES[family, after]
    text = drawn(whole(path), 24, 12)
    wanted = of_whole(path, removed, text, after_cut=after)
    assert wanted[0]["details"]["corrected"]
    for memory in (0, 1 << 20):
        model = streamed(path, memory=memory, folder=tmp_path / "states")
        assert of_streamed(model, removed, text, after_cut=after) == wanted
        remove_states(model)
        assert not (tmp_path / "states").exists()


def test_each_weight_is_read_once_to_correct_all_layers(tmp_path: Path) -> None:
    path = stored("llama", tmp_path / "model")
    model = streamed(path, memory=0, folder=tmp_path / "states")
    stream = stream_of(model)
    assert stream is not None
    before, each = stream.bytes_read, sum(map(stream.num_bytes, range(7)))
    text = tokens(8).split(4)
    batches = [{"input_ids": ids} for ids in text]
    run = StreamedCorrection(model, model, [0, 1, 4], batches[:1], batches[1:], Settings())
    run.correct()
    assert stream.bytes_read - before == each
    assert run._held_bytes == 0  # within the bound, which is 0
    assert [fit.layer for fit in run.fits] == [1, 4]  # layer 1 waits for what layer 3 leaves
    again = StreamedCorrection(model, model, [0, 1, 4], batches[:1], batches[1:], Settings())
    again.correct()  # all is known
    assert (again.fits, again.corrected) == (run.fits, run.corrected)
    assert stream.bytes_read - before == each
    other = StreamedCorrection(
        model, model, [0, 1, 4], batches[:1], batches[1:], Settings(norm_power=1)
    )
    with pytest.raises(SimdiffError, match="another run, which differs in"):
        other.correct()


@pytest.mark.parametrize("removed", [(2, 3), (1, 3)])
def test_an_interrupted_run_goes_on_from_the_last_finished_layer(
    removed: tuple[int, ...], tmp_path: Path, monkeypatch
) -> None:
    """Interrupted before each of its layers, half corrected between two cuts, and at the choice."""
    path = stored("llama", tmp_path / "model")
    text = drawn(whole(path), 12, 12)
    wanted = of_whole(path, removed, text)
    write, written = StateSets._finish, []

    class InterruptedError(Exception):
        pass

    def finish(self, names, content):
        write(self, names, content)
        written.append(content["layer"])
        raise InterruptedError

    monkeypatch.setattr(StateSets, "_finish", finish)
    while True:
        model = streamed(path, memory=0, folder=tmp_path / "states")
        try:
            found = of_streamed(model, removed, text)
            break
        except InterruptedError:
            continue
    assert found == wanted
    assert written[:6] == [1, 2, 3, 4, 5, 6]


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch) -> None:
    """Killed while the states of a layer are written, and between its weights and the manifest."""
    path, removed = stored("llama", tmp_path / "model"), (2, 3)
    text = drawn(whole(path), 12, 12)
    wanted = of_whole(path, removed, text)

    def run() -> tuple:
        return of_streamed(streamed(path, memory=0, folder=tmp_path / "states"), removed, text)

    for owner, name, number in ((StateSets, "_write", 7), (StreamedCorrection, "_written", 1)):
        inner, calls = getattr(owner, name), []

        def killed(*arguments, inner=inner, calls=calls, number=number) -> None:
            inner(*arguments)
            calls.append(arguments)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            (ended,) = Processes(1, lambda _: bool(run()), tmp_path / owner.__name__).wait()
        assert ended.code == -signal.SIGKILL, ended
    (weights,) = (tmp_path / "states").glob("corrected-weights-*")
    assert [*weights.iterdir()]  # which no manifest names: they are made anew
    assert run() == wanted
