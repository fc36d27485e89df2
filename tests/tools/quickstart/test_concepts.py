import pytest

from mmfusion.tools.quickstart.concepts import concept, fraction, split_of


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A cat.", "cat"),
        ("Cat!", "cat"),
        ("The  CAT", "cat"),
        ("The letter A.", "a"),
        ("a", "a"),
        ("A man and a dog.", "man and dog"),
        ("It\u2019s a dog's life", "its dogs life"),
        ("“Crossroads”.", "crossroads"),
        ("Cat on the mat", "cat on mat"),
        ("…!", ""),
        ("", ""),
    ],
)
def test_articles_case_and_punctuation_do_not_make_another_concept(caption, expected):
    assert concept(caption) == expected


def test_split_is_the_same_on_every_machine():
    assert [split_of(name) for name in ("owl", "cat", "zebu", "sock")] == [
        "val",
        "train",
        "val",
        "val",
    ]


def test_about_the_wanted_share_is_held_out():
    held_out = sum(split_of(f"concept {n}", 0.1) == "val" for n in range(10_000))
    assert 900 < held_out < 1100


def test_fractions_are_spread_evenly():
    values = sorted(fraction(str(n)) for n in range(2000))
    assert values[0] >= 0
    assert values[-1] < 1
    assert max(abs(value - n / 2000) for n, value in enumerate(values)) < 0.04
