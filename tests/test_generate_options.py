"""What stops an answer."""

from __future__ import annotations

import pytest

from mmfusion.generate_options import before


@pytest.mark.parametrize(
    ("pieces", "stop", "told"),
    [
        (["one ", "two ", "three"], None, ["one ", "two ", "three"]),
        (["one ", "two ", "three"], "two", ["one "]),
        (["a#", "#b", "##", "c"], "##", ["a"]),
        (["a#", "b", "#"], "##", ["a", "#b", "#"]),
        (["aab", "aac", "d"], "aac", ["aab"]),
        (["a\nb"], "\n", ["a"]),
        (["\n"], "\n", []),
        ([], "x", []),
    ],
)
def test_pieces_end_before_the_stop_wherever_it_is_cut(
    pieces: list[str], stop: str | None, told: list[str]
) -> None:
    assert list(before(stop, pieces)) == told
    if stop:
        assert "".join(told) == "".join(pieces).partition(stop)[0]
