"""What of Hugging Face's ``generate`` an answer may be given: its options, where it stops, and the
seed of its draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

_ONE = "an answer is one text with its parts; ask several times, with other seeds"
NOT_TAKEN = {
    "guidance_scale": "that of media is in sampling=Sampling(guidance_scale=...)",
    "stop_strings": "the text at which the answer ends is stop",
    "eos_token_id": "the tokens that end an answer are those of training",
    "pad_token_id": "padding is the tokenizer's",
    "generation_config": "give what is in it, option by option",
    **dict.fromkeys(
        ("penalty_alpha", "dola_layers", "force_words_ids", "constraints", "num_beam_groups"),
        "Hugging Face keeps that as remote code, which is not run",
    ),
    **dict.fromkeys(("num_return_sequences", "return_dict_in_generate"), _ONE),
    **dict.fromkeys(
        ("output_scores", "output_logits", "output_attentions", "output_hidden_states"), _ONE
    ),
}
"""Options of Hugging Face's ``generate`` that an answer is not given, and why."""
BESIDE = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"}
"""Those it takes that are not in a ``GenerationConfig``."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse those of :data:`NOT_TAKEN`, and those that nobody knows.

    Raises:
        ValueError: naming the option.
    """
    taken = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name in options:
        if name in NOT_TAKEN or name not in taken | BESIDE:
            why = NOT_TAKEN.get(name, "Hugging Face's GenerationConfig knows no such option")
            raise ValueError(f"generate takes no {name}: {why}.")


def check_length(max_new_tokens: Any, stop: Any) -> None:
    """Where an answer ends.

    Raises:
        ValueError: for what is no number of tokens, or no text.
    """
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected a number, 1 or more.")
    if not isinstance(stop, str | None):
        raise ValueError(f"stop is {stop!r}; expected one text, or None.")


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws from ``seed`` inside, torch's generators as they were after."""
    with torch.random.fork_rng() if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        yield


class StopAt(StoppingCriteria):
    """Stops a row where its text holds ``stop``, with any tokenizer; Hugging Face's
    ``stop_strings`` knows the vocabularies of some kinds only.
    """

    def __init__(self, stop: str, tokenizer: Any) -> None:
        self._stop, self._tokenizer = stop, tokenizer
        self._window = len(stop.encode()) + 4
        """Tokens that may hold it."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, -self._window :])
        return torch.tensor([self._stop in text for text in texts], device=input_ids.device)


def before(stop: str | None, pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of a text up to ``stop``; what may be the beginning of it is held back."""
    stop, held = stop or "", ""
    for piece in pieces:
        held += piece
        told, found, _ = held.partition(stop) if stop else (held, "", "")
        if found:
            held = told
            break
        kept = next((n for n in range(len(stop) - 1, 0, -1) if held.endswith(stop[:n])), 0)
        told, held = held[: len(held) - kept], held[len(held) - kept :]
        if told:
            yield told
    if held:
        yield held


class Left(StoppingCriteria):
    """Stops generation when the consumer has left."""

    now = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.now, dtype=torch.bool, device=input_ids.device)
