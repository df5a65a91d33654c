"""Lists of layers as people write them."""

from __future__ import annotations

import re
import time

import pytest

from simdiff.errors import SimdiffError
from simdiff.planning.layer_lists import is_layer_list, parse_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("2,3,8-10", (2, 3, 8, 9, 10)),
        ("2\n3\n", (2, 3)),
        (" 5 - 6 , 1,\r\n5", (5, 6, 1)),
        ("7", (7,)),
    ],
)
def test_lists(text: str, layers: tuple[int, ...]) -> None:
    assert is_layer_list(text)
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", " ", "-1", "1-", "2;3", "[2, 3]", "1.5", "two", ",2", "9-8"])
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(SimdiffError, match=f"such as 0,1,28-29, .*got .?{re.escape(text)}"):
        parse_layers(text)


def test_a_slip_of_the_keyboard_does_not_fill_the_memory() -> None:
    for text in ("0-99999999999", "123456789", "1" * 5000, "0-9999," * 100_000):
        with pytest.raises(SimdiffError) as caught:
            parse_layers(text)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text", ["1  " * 200_000 + "x", "1" + " " * 500_000 + "x", "1 - " * 99_999]
)
def test_a_table_of_numbers_is_told_from_a_list_at_once(text: str) -> None:
    start = time.process_time()
    assert not is_layer_list(text)
    assert time.process_time() - start < 2
