"""The speaker: words of an answer, said aloud. A generator that takes text: it has no conditioning
and no loss, and nothing of it trains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from mmfusion.types import Media


class Speaker(ABC):
    """A voice. The constructor reads configuration only; weights are loaded when it first speaks,
    so a training run never loads them.
    """

    @abstractmethod
    def say(self, text: str, seed: int = 0) -> Media | None:
        """The text as a sound; None where nothing in it can be said.

        Args:
            text: any.
            seed: of what varies between two readings of the same words.
        """
