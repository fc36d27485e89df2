"""Placeholder tokens: one token a modality, repeated once for each feature slot of a media item;
and signal tokens: several a modality, which the LLM gives where it answers with media, and two
around the words that it says aloud.

Placeholders' embedding rows are never read: the projected media overwrite them
(``models/fusion.py``). So they need no trained row and may lie beyond the LLM's embedding table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mmfusion.types import DataError

MODALITIES = ("image", "video", "audio")
SPEECH = ("<speech>", "</speech>")
"""Signal tokens of speech, before and after the words."""


def placeholder(modality: str) -> str:
    """The placeholder token of a modality, e.g. ``<image>``."""
    return f"<{modality}>"


def add_placeholders(tokenizer: Any, modalities: Iterable[str]) -> dict[str, int]:
    """Make every placeholder a special token of the tokenizer, in place, and return their ids.

    The three known modalities are always added first and in the same order, so that a recipe which
    adds a modality keeps the ids of the others.
    """
    modalities = list(modalities)
    names = [*MODALITIES, *sorted(set(modalities) - set(MODALITIES))]
    tokenizer.add_tokens([placeholder(name) for name in names], special_tokens=True)
    return {
        name: int(tokenizer.convert_tokens_to_ids(placeholder(name))) for name in sorted(modalities)
    }


def signal_tokens(modality: str, count: int) -> list[str]:
    """The signal tokens of a modality, e.g. ``<image_0>`` to ``<image_3>``."""
    return [f"<{modality}_{i}>" for i in range(count)]


def special_token_pattern(tokenizer: Any, without: Iterable[str | None] = ()) -> re.Pattern[str]:
    """Matches any special token of the tokenizer inside a text, longest first."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = (tokens | set(tokenizer.all_special_tokens)) - set(without) - {""}
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def check_plain_text(text: str, special: re.Pattern[str]) -> None:
    """Refuse text that the tokenizer would read as one of its special tokens.

    Raises:
        DataError: ``special_token_in_text``. Text from data could otherwise forge a turn of the
            conversation or a media slot.
    """
    if found := special.search(text):
        raise DataError(
            "special_token_in_text",
            f"the text contains {found.group()!r} at character {found.start()}, which is a special "
            f"token of the tokenizer: ...{text[max(0, found.start() - 20) : found.end() + 20]!r}. "
            "Remove it: media are parts of a message of their own (from data, the converter names "
            "them), not text.",
        )
