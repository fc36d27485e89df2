"""Things are what entries of media with captions say."""

from __future__ import annotations

from mmfusion.tools.quickstart.datasets import Entry
from mmfusion.tools.quickstart.things import Thing, things_of, turned


def test_entries_become_things() -> None:
    entry = Entry("val", "k", {"png": b"p", "txt": b"A red circle.", "json": b'{"concept": "c"}'})
    (found,) = things_of([entry], "image", "png")
    assert found == Thing("val", "k", "image", "A red circle.", "png", b"p", {"concept": "c"})
    assert found.words == "a red circle"


def test_options_are_turned_and_none_is_lost() -> None:
    turns = {tuple(turned("abc", f"reason {number}")) for number in range(40)}
    assert turns == {("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")}
