"""Words to be said aloud: the user asks for them, the answer says them.

``cat.txt`` with the prompt ``Say: {caption}`` is the user's "Say: A cat." and the assistant's "A
cat.", spoken. No sound is needed: the voice is not trained.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmfusion.data.converters.base import Converter
from mmfusion.data.converters.caption import Caption
from mmfusion.data.converters.text_to_media import check_requests, request_for
from mmfusion.types import Message, Sample, Text


class TextToSpeech(Converter):
    """A text, as a request and its spoken answer. Media of the record are left out.

    Args:
        prompts: requests with ``{caption}`` in them. Each record has always the same one, chosen
            by its key.
        spoken: the answer is said; without, it is written. A model learns from both when to speak.
        text: the member that holds the text, as in :class:`Caption`.
    """

    def __init__(self, prompts: list[str], spoken: bool = True, text: str = "txt") -> None:
        check_requests("prompts", prompts)
        self.prompts, self.spoken = prompts, spoken
        self._caption = Caption(text=text, media={})

    def __call__(self, record: Mapping[str, bytes], shard: str, key: str) -> Sample:
        """Make the sample; see the base class.

        Raises:
            DataError: ``missing_member``, ``missing_key``, ``bad_text``, ``bad_json``,
                ``empty_text``.
        """
        words = self._caption.words(record)
        asked = Message("user", (Text(request_for(self.prompts, key, words)),))
        answered = Message("assistant", (Text(words, spoken=self.spoken),))
        return Sample((asked, answered), shard=shard, key=key)
