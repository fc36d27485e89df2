"""What a caption is about, and on which side of the split it falls.

The split goes by concept over all sources together, so nothing that is measured was ever named in
training: not in another picture, not in speech, not in a clip.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

VAL_SHARE = 0.12
_ARTICLES = {"a", "an", "the", "some"}
_FRAMES = ("the letter ", "the number ", "the sign for ", "the sound of ")


def concept(caption: str) -> str:
    """The caption in lower case without punctuation and articles: ``A Cat!`` -> ``cat``,
    ``The letter A.`` -> ``a``.
    """
    text = unicodedata.normalize("NFKC", caption).lower().strip()
    for frame in _FRAMES:
        text = text.removeprefix(frame)
    words = re.findall(r"\w+", text.replace("\u2019", "").replace("'", ""))
    # An article at the end is not one: it is the letter "a".
    kept = [word for word in words[:-1] if word not in _ARTICLES] + words[-1:]
    return " ".join(kept)


def split_of(name: str, val_share: float = VAL_SHARE) -> str:
    """``val`` for a fixed share of names, else ``train``; the same on every machine."""
    return "val" if fraction(name) < val_share else "train"


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone and is spread evenly over names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
