"""Text-to-media pairs: the user asks for what a caption says, the answer is the media.

``cat.jpg`` and ``cat.txt`` with the prompt ``Draw {caption}`` are the user's "Draw A cat." and the
assistant's picture.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from mmfusion.data.converters.base import Converter
from mmfusion.data.converters.caption import Caption
from mmfusion.types import DataError, Media, Message, Sample, Text

CAPTION = "{caption}"


class TextToMedia(Converter):
    """One medium with text, as a request and its answer.

    Args:
        prompts: requests with ``{caption}`` in them, one list for each modality. Each record has
            always the same one, chosen by its key.
        answer: the assistant's words before the medium.
        text: the member that holds the caption, as in :class:`Caption`.
        media: modality of each media extension. The usual ones are known.
    """

    def __init__(
        self,
        prompts: dict[str, list[str]],
        answer: str = "",
        text: str = "txt",
        media: dict[str, str] | None = None,
    ) -> None:
        for modality, requests in prompts.items():
            check_requests(f"prompts.{modality}", requests)
        self.prompts, self.answer = prompts, answer
        self._caption = Caption(text=text, media=media)

    def __call__(self, record: Mapping[str, bytes], shard: str, key: str) -> Sample:
        """Make the sample; see the base class.

        Raises:
            DataError: as :class:`Caption`; ``media_count`` for another number of media than one;
                ``no_prompt`` for a modality without requests.
        """
        media, caption = self._caption.read(record)
        if len(media) != 1:
            raise DataError("media_count", f"the record holds {len(media)} media; expected one.")
        requests = self.prompts.get(media[0].modality)
        if requests is None:
            raise DataError(
                "no_prompt",
                f"the record holds {media[0].modality}; there are prompts for "
                f"{sorted(self.prompts)}.",
            )
        request = request_for(requests, key, caption)
        target = Media(media[0].modality, media[0].data, media[0].format, caption=caption)
        words = (Text(self.answer),) if self.answer else ()
        turns = (Message("user", (Text(request),)), Message("assistant", (*words, target)))
        return Sample(turns, shard=shard, key=key)


def check_requests(name: str, requests: Sequence[str]) -> None:
    """Each holds the caption once.

    Raises:
        ValueError: with the name of the argument.
    """
    if not requests or any(request.count(CAPTION) != 1 for request in requests):
        raise ValueError(f"{name} is {requests}; expected requests that each hold {CAPTION} once.")


def request_for(requests: Sequence[str], key: str, caption: str) -> str:
    """Always the same one for a record."""
    return requests[zlib.crc32(key.encode()) % len(requests)].replace(CAPTION, caption)
