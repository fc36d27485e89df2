r"""Media with a caption, as in pretraining: media, an optional prompt, and the trained text.

The sample is ``plain``: no chat template, no roles. ``cat.jpg`` and ``cat.txt`` with the prompt
``Image caption:`` read ``<start><image>...Image caption: A cat.\n``.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmfusion.data.converters.base import Converter
from mmfusion.data.converters.members import (
    MODALITY_OF,
    as_text,
    media_members,
    media_of,
    read_json,
    read_text,
)
from mmfusion.types import DataError, Media, Message, Sample, Text


class Caption(Converter):
    """Image, video or audio with text.

    Args:
        text: the member that holds the caption: an extension (``txt``), or a JSON member and its
            key (``json:caption``).
        media: modality of each media extension (``jpg`` also covers ``0.jpg``). The usual ones
            are known. A record may hold several media; they come in the order of their names.
        prompt: text between the media and the caption, one for all or one for each modality (that
            of the first item counts). Not trained.
        end: text after the caption, trained: it tells the model to stop.
        eos: end with the tokenizer's end token as well, trained.
    """

    def __init__(
        self,
        text: str = "txt",
        media: dict[str, str] | None = None,
        prompt: str | dict[str, str] = "",
        end: str = "\n",
        eos: bool = False,
    ) -> None:
        self.text = text
        self.media = dict(MODALITY_OF if media is None else media)
        self.prompt = prompt
        self.end = end
        self.eos = eos

    def __call__(self, record: Mapping[str, bytes], shard: str, key: str) -> Sample:
        """Make the sample; see the base class.

        Raises:
            DataError: ``missing_member``, ``missing_key``, ``bad_text``, ``bad_json``,
                ``empty_text``, ``media_count``.
        """
        items, caption = self.read(record)
        prompt = self.prompt
        if isinstance(prompt, dict):
            prompt = prompt.get(items[0].modality, "")
        gap = " " if prompt and not prompt[-1].isspace() else ""
        question: list[Text | Media] = [*items, Text(prompt)] if prompt else [*items]
        return Sample(
            messages=(
                Message("user", tuple(question)),
                Message("assistant", (Text(gap + caption + self.end),)),
            ),
            format="plain",
            eos=self.eos,
            shard=shard,
            key=key,
        )

    def read(self, record: Mapping[str, bytes]) -> tuple[list[Media], str]:
        """The media of a record and their caption.

        Raises:
            DataError: as :meth:`__call__`.
        """
        items = [
            media_of(record, name, modality) for name, modality in media_members(record, self.media)
        ]
        if not items:
            raise DataError(
                "media_count",
                f"the record has the members {sorted(record)}; expected one of {list(self.media)}.",
            )
        return items, self.words(record)

    def words(self, record: Mapping[str, bytes]) -> str:
        """The caption alone.

        Raises:
            DataError: as :meth:`__call__`, but for ``media_count``.
        """
        caption = self._caption(record).strip()
        if not caption:
            raise DataError("empty_text", f"the caption in {self.text!r} is empty.")
        return caption

    def _caption(self, record: Mapping[str, bytes]) -> str:
        member, _, name = self.text.partition(":")
        if not name:
            return read_text(record, member)
        document = read_json(record, member)
        if not isinstance(document, dict) or name not in document:
            held = sorted(document) if isinstance(document, dict) else type(document).__name__
            raise DataError(
                "missing_key", f"member {member!r} holds {held}; expected the key {name!r}."
            )
        return as_text(document[name], f"{self.text!r}")
