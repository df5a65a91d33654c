"""Words of messages."""

from __future__ import annotations

from simdiff.errors import number_of


def test_numbers_of_things() -> None:
    found = [number_of(*of) for of in ((1, "round"), (0, "round"), (2, "batch"), (1024, "pass"))]
    assert found == ["1 round", "0 rounds", "2 batches", "1,024 passes"]
