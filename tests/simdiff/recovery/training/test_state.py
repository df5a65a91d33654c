"""The state of a training on the disk: finished, of other input, damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.recovery.training.data import Examples
from simdiff.recovery.training.state import STATE
from simdiff.recovery.training.step import Student
from support.training import SMALL, equal, trained, weights


def test_a_finished_training_is_not_done_again(
    dense: PreTrainedModel,
    text: tuple[Examples, Examples],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, result = trained(dense, text, directory=tmp_path / "state")
    monkeypatch.setattr(Student, "_loss", lambda *_: pytest.fail("it trained"))
    again, same = trained(dense, text, directory=tmp_path / "state")
    assert equal(weights(again), weights(model))
    assert same == result


def test_a_state_of_other_input_or_damaged(
    dense: PreTrainedModel, text: tuple[Examples, Examples], tmp_path: Path
) -> None:
    directory = tmp_path / "state"
    trained(dense, text, directory=directory)
    with pytest.raises(SimdiffError, match="another run, which differs in options"):
        trained(dense, text, replace(SMALL, learning_rate=2e-2), directory)
    other = text[0].take(slice(1, None)), text[1]
    with pytest.raises(SimdiffError, match=r"differs in start\.\w+.*, examples"):
        trained(dense, other, SMALL, directory)
    whole = (directory / STATE).read_bytes()
    # The last one makes torch's unpickler take from an empty stack.
    for damaged in (whole[: len(whole) // 2], b"", b"PK nothing", b"\x80\x02s."):
        (directory / STATE).write_bytes(damaged)
        with pytest.raises(SimdiffError, match="but is damaged .*: remove .* to start again"):
            trained(dense, text, SMALL, directory)
