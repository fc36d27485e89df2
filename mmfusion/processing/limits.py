"""What an LLM can take of a sample: how many tokens, and which. The LLM tells it, the processor
checks it on the ids of each sample, before anything is decoded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mmfusion.types import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What an LLM can take.

    Attributes:
        tokens: positions it has; None: any number.
        hard: whether it fails beyond them (learned positions), or merely was not trained there
            (rotary ones).
        rows: of its embedding table, new tokens included.
        without_row: ids in its tokenizer's vocabulary that have none of these rows.
    """

    tokens: int | None = None
    hard: bool = False
    rows: int | None = None
    without_row: frozenset[int] = field(default=frozenset(), repr=False)

    def room(self, tokens: int) -> int | None:
        """Tokens that can be generated after ``tokens``; None: any number. The last one is never
        read.
        """
        return self.tokens - tokens + 1 if self.tokens and self.hard else None


class LimitCheck:
    """Checks samples against the limits of one LLM.

    Args:
        limits: of the LLM.
        tokenizer: names tokens in errors.
        free: ids that need no row (placeholders).
    """

    def __init__(self, limits: Limits, tokenizer: Any, free: Iterable[int]) -> None:
        self._limits, self._tokenizer = limits, tokenizer
        self._without_row = limits.without_row - set(free)
        self._warned = False

    def ids(self, ids: Iterable[int]) -> None:
        """Refuse tokens without an embedding.

        Raises:
            ValueError: the tokenizer is not that of the weights.
        """
        if self._without_row and (found := sorted(self._without_row.intersection(ids))):
            named = {self._tokenizer.convert_ids_to_tokens(index): index for index in found}
            raise ValueError(
                f"the sample holds the tokens {named}, but the LLM's embedding table has "
                f"{self._limits.rows} rows: it has no embedding for them. Use the tokenizer (and "
                f"chat template) of these weights, or train rows for them: new_tokens: "
                f"{list(named)} of the LLM, and tuning NewTokens."
            )

    def item(self, tokens: int, modality: str) -> None:
        """Refuse a media item that would fill more than all positions, of any kind: how long it is
        is a word of its file, and planned for before it is read.

        Raises:
            DataError: ``too_long``.
        """
        most = self._limits.tokens
        if most is not None and tokens > most:
            raise DataError(
                "too_long",
                f"one {modality} needs {tokens} tokens, the LLM has {most} positions; cut it, or "
                "take an input projector that makes fewer tokens of it.",
            )

    def length(self, tokens: int, what: str, remedy: str) -> None:
        """Refuse more tokens than learned positions; warn once beyond what rotary ones were
        trained for.

        Raises:
            DataError: ``too_long``.
        """
        most = self._limits.tokens
        if most is None or tokens <= most:
            return
        if self._limits.hard:
            raise DataError(
                "too_long", f"{what} has {tokens} tokens, the LLM takes at most {most}; {remedy}."
            )
        if not self._warned:
            self._warned = True
            log.warning(
                "%s has %d tokens, but the LLM was made for %d (max_position_embeddings): beyond "
                "them it may get worse. This is said once.",
                what,
                tokens,
                most,
            )
