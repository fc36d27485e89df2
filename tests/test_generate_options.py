"""What stops an answer, and what it is not given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmfusion.generate_options import before, check_length, check_options


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


@pytest.mark.parametrize(
    ("length", "stop", "message"),
    [
        (None, None, "max_new_tokens is None"),
        (2.5, None, "max_new_tokens is 2.5"),
        (0, None, "max_new_tokens is 0"),
        (3, ["a"], r"stop is \['a'\]"),
    ],
)
def test_what_is_no_end_of_an_answer_is_refused(length: Any, stop: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_length(length, stop)
    check_length(np.int64(3), "a")


@pytest.mark.parametrize("name", ["penalty_alpha", "force_words_ids", "dola_layers"])
def test_what_hugging_face_keeps_as_remote_code_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .* remote code"):
        check_options({name: 1})
