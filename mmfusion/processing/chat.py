"""Messages to token ids and trained mask.

``chat`` samples are rendered by the tokenizer's own chat template, with a placeholder token where a
media item stands; assistant turns are trained up to and including their end token. ``plain``
samples (captions in pretraining) are their contents joined after one start token.

Which token is trained is decided by where its characters lie in the rendered text, never by its id:
many tokenizers use the end token for padding as well.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,
    render_jinja_template,
)

from mmfusion.processing.special_tokens import check_plain_text, placeholder, special_token_pattern
from mmfusion.types import DataError, Media, Message

DATE = date(2024, 7, 26)
"""Today, for templates that print it (Llama 3.2's own where it knows none): with the true date a
run would see other tokens on another day.
"""
Span = tuple[int, int]
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """Renders messages with one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer that already holds the placeholder tokens.
        modalities: modalities that have a placeholder token.
        signals: for each modality that an answer may hold, its signal tokens.
        speech: signal tokens around words that an answer says aloud; None: it says none.
    """

    def __init__(
        self,
        tokenizer: Any,
        modalities: Sequence[str],
        signals: Mapping[str, Sequence[str]] | None = None,
        speech: tuple[str, str] | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets, which the trained mask "
                "needs; use a fast tokenizer (a folder with tokenizer.json)."
            )
        self.tokenizer = tokenizer
        self.special = special_token_pattern(tokenizer)
        starts = [] if tokenizer.bos_token == tokenizer.eos_token else [tokenizer.bos_token]
        self._end_tokens = special_token_pattern(
            tokenizer,
            without=[
                *starts,
                *map(placeholder, modalities),
                *itertools.chain(*(signals or {}).values()),
                *(speech or ()),
            ],
        )
        self._signals = {name: "".join(tokens) for name, tokens in (signals or {}).items()}
        self._speech = speech
        self._end_token_here = re.compile(rf"[ \t]*(?:{self._end_tokens.pattern})")
        self._closed = re.compile(rf"(?:{self._end_tokens.pattern})\s*$")

    def chat(
        self, messages: Sequence[Message], generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Ids and trained mask of a conversation; one placeholder id for each media item.

        Raises:
            DataError: for messages that no template can show, or that this one refuses.
            ValueError: for a template whose turns cannot be told apart.
        """
        _check_order(messages)
        turns = [{"role": message.role, "content": self._content(message)} for message in messages]
        if not generation_prompt and _GENERATION_BLOCK.search(self._template()):
            return self._encode(*self._render_blocks(turns))
        text = self._render(turns, generation_prompt)
        if generation_prompt:
            return self._encode(text, [])
        return self._encode(text, self._answer_spans(text, turns))

    def plain(self, messages: Sequence[Message], eos: bool) -> tuple[list[int], list[bool]]:
        """Start token, contents in order, and the end token if asked; assistant text is trained."""
        text, spans = "", []
        for message in messages:
            start, text = len(text), text + self._content(message)
            if message.role == "assistant":
                spans.append((start, len(text)))
        ids, trained = self._encode(text, spans)
        end = [self._end_token_id()] if eos else []
        return [self._start_token_id(), *ids, *end], [False, *trained, *(True for _ in end)]

    def _content(self, message: Message) -> str:
        """The message as one string. Neighbouring texts are joined before they are checked."""
        whole, plain = "", [""]
        for part in message.content:
            if isinstance(part, Media):
                whole += self._shown(part, message.role)
                plain.append("")
            elif part.spoken and message.role == "assistant" and self._speech:
                whole += part.text.join(self._speech)
                plain += [part.text, ""]
            else:
                whole += part.text
                plain[-1] += part.text
        for text in plain:
            check_plain_text(text, self.special)
        return whole

    def _shown(self, media: Media, role: str) -> str:
        """What stands for it: placeholder where it is input, signal tokens where it is answered."""
        return self._signals[media.modality] if role == "assistant" else placeholder(media.modality)

    def _template(self) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template, so "
                "conversations cannot be rendered. Set `tokenizer.chat_template` (a "
                "chat_template.jinja beside tokenizer.json), or use an instruct model."
            )
        template = self.tokenizer.get_chat_template()
        # The compiled template, which transformers keeps; what is passed to it must be plain data.
        _compile_jinja_template(template).globals["strftime_now"] = DATE.strftime
        return template

    def _render(self, turns: list[dict[str, str]], generation_prompt: bool = False) -> str:
        self._template()
        with _refusals(turns):
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt
            )

    def _render_blocks(self, turns: list[dict[str, str]]) -> tuple[str, list[Span]]:
        """The text and what the template marks in it as trained, with an end token that it leaves
        just outside.
        """
        # Not apply_chat_template's own mask: it loses the last tokens of an answer that ends in a
        # character of several tokens.
        with _refusals(turns):
            (text,), (blocks,) = render_jinja_template(
                conversations=[turns],
                chat_template=self._template(),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        spans = []
        for start, stop in blocks:
            if not self._closed.search(text, start, stop):
                end = self._end_token_here.match(text, stop)
                stop = end.end() if end else stop
            spans.append((start, stop))
        return text, spans

    def _answer_spans(self, text: str, turns: list[dict[str, str]]) -> list[Span]:
        """Characters of each assistant turn, from the end of its prompt to its end token."""
        spans = []
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._render(turns[:i], generation_prompt=True)
            if not text.startswith(before):
                raise _template_error(f"prompt of turn {i}", before, text)
            spans.append((len(before), self._end_of_turn(text, len(before), turns, i)))
        return spans

    def _end_of_turn(self, text: str, start: int, turns: list[dict[str, str]], i: int) -> int:
        """Just after the first end token that follows the turn's own text; without one, where the
        rendering of the conversation up to this turn ends.
        """
        upto = self._render(turns[: i + 1])
        whole = text.startswith(upto)
        content = turns[i]["content"].strip()
        for token in self._end_tokens.finditer(text, start, len(upto) if whole else len(text)):
            if text[start : token.start()].rstrip().endswith(content):
                return token.end()
        if not whole or content not in text[start : len(upto)]:
            raise _template_error(f"turn {i}", upto, text)
        return len(upto)

    def _encode(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return encoding["input_ids"], _overlaps(encoding["offset_mapping"], spans)

    def _start_token_id(self) -> int:
        """The bos token; where there is none, the special token a conversation starts with."""
        if self.tokenizer.bos_token_id is not None:
            return self.tokenizer.bos_token_id
        if self.tokenizer.chat_template:
            start = self._render([{"role": "user", "content": "a"}])
            if found := self.special.match(start):
                return self.tokenizer.convert_tokens_to_ids(found.group())
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        raise ValueError(
            f"the tokenizer {self.tokenizer.name_or_path!r} has no bos token, no chat template "
            "starting with a special token and no eos token; captions need one to start with. Set "
            "`tokenizer.bos_token`."
        )

    def _end_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no eos token, but the "
                "converter asks for one; set `tokenizer.eos_token` or the converter's `eos: false`."
            )
        return self.tokenizer.eos_token_id


@contextmanager
def _refusals(turns: list[dict[str, str]]) -> Iterator[None]:
    """A template's own error is one of the data."""
    try:
        yield
    except TemplateError as error:
        raise DataError(
            "template_refused",
            f"the chat template refuses the roles {[turn['role'] for turn in turns]}: {error}",
        ) from error


def _check_order(messages: Sequence[Message]) -> None:
    """At most one system message, and it comes first; then the user begins."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[:1] != ["user"] or "system" in turns:
        raise DataError(
            "wrong_order",
            f"a conversation has the roles {roles}; expected an optional system message, then a "
            "user message, then the rest.",
        )


def _overlaps(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, whether it covers a character of a span.

    Some tokenizers trim white space from their offsets, so a token also owns what lies between it
    and the token before.
    """
    marks, last = [], 0
    for start, end in offsets:
        start, last = min(start, last), max(end, last)
        marks.append(any(start < stop and end > begin for begin, stop in spans))
    return marks


def _template_error(what: str, prefix: str, text: str) -> ValueError:
    same = next(
        (i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b),
        min(len(prefix), len(text)),
    )
    return ValueError(
        f"the tokenizer's chat template renders the {what} otherwise alone than inside the whole "
        f"conversation: {prefix[same : same + 40]!r} against {text[same : same + 40]!r} after "
        f"{text[max(0, same - 40) : same]!r}. So the assistant's tokens cannot be found. Put "
        "{% generation %} ... {% endgeneration %} around the assistant's text in the template, or "
        "use a template that does not rewrite earlier turns."
    )
