"""Media tokens into their placeholder slots, hidden states out of the signal tokens': pure tensor
functions, every count checked.

Counts, slots and ids are best on the host: they are compared there, so that nothing waits for the
accelerator.
B rows, T tokens of a row, D hidden, N media items of a modality, P tokens of an item (padded), S
slots; M targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def first_n(counts_N: Tensor, length: int) -> Tensor:
    """(N, length) bool, True on the first ``counts_N[n]`` places of row n."""
    return torch.arange(length, device=counts_N.device) < counts_N[:, None]


def valid_tokens(tokens_NPD: Tensor, num_tokens_N: Tensor, name: str) -> Tensor:
    """(S, D): each item's first ``num_tokens`` tokens, in reading order.

    Raises:
        ValueError: where an item has more slots than the projector gave tokens.
    """
    if len(tokens_NPD) != len(num_tokens_N):
        raise ValueError(
            f"{name}: projected {len(tokens_NPD)} items, the batch counts {len(num_tokens_N)}."
        )
    longest = int(num_tokens_N.max()) if len(num_tokens_N) else 0
    if longest > tokens_NPD.shape[1]:
        raise ValueError(
            f"{name}: an item has {longest} placeholder slots, the projector gave "
            f"{tokens_NPD.shape[1]} tokens; Projector.num_tokens and its forward disagree."
        )
    places = first_n(num_tokens_N, tokens_NPD.shape[1]).flatten().nonzero().squeeze(1)
    return tokens_NPD.flatten(0, 1)[places.to(tokens_NPD.device, non_blocking=True)]


def scatter(embeds_BTD: Tensor, tokens_SD: dict[str, Tensor], slots_S: dict[str, Tensor]) -> Tensor:
    """Write every media token into its placeholder slot.

    Args:
        embeds_BTD: (B, T, D) embeddings of the text.
        tokens_SD: by modality, the valid tokens in reading order.
        slots_S: by modality, (S,) positions in the flattened (B*T) batch.

    Returns:
        (B, T, D), differentiable in the embeddings and the tokens.

    Raises:
        ValueError: where slots and tokens of a modality differ in number, lie outside the batch, or
            are claimed twice.
    """
    rows, length, width = embeds_BTD.shape
    for name, tokens in tokens_SD.items():
        if len(slots_S[name]) != len(tokens):
            raise ValueError(
                f"{name}: {len(slots_S[name])} placeholder slots, {len(tokens)} media tokens; they "
                "must match. Were the samples planned with this recipe's encoder and projector?"
            )
    slots = torch.cat([slots_S[name] for name in tokens_SD]) if tokens_SD else torch.empty(0)
    if not len(slots):
        return embeds_BTD
    if int(slots.min()) < 0 or int(slots.max()) >= rows * length:
        raise ValueError(
            f"placeholder slots reach from {int(slots.min())} to {int(slots.max())}, the batch has "
            f"{rows} x {length} tokens."
        )
    if len(torch.unique(slots)) != len(slots):
        raise ValueError("two media tokens claim the same placeholder slot.")
    tokens = torch.cat([tokens_SD[name].to(embeds_BTD.dtype) for name in tokens_SD])
    slots = slots.to(embeds_BTD.device, non_blocking=True)
    return embeds_BTD.flatten(0, 1).index_copy(0, slots, tokens).view(rows, length, width)


def check_placeholders(input_ids_BT: Tensor, slots_S: Tensor, placeholder: int, name: str) -> None:
    """Fail unless the slots of a modality are exactly the positions of its placeholder token.

    Raises:
        ValueError: with both counts.
    """
    flat = input_ids_BT.flatten()
    placed = int((flat == placeholder).sum())
    right = int((flat[slots_S] == placeholder).sum()) if len(slots_S) else 0
    if not placed == right == len(slots_S):
        raise ValueError(
            f"{name}: {placed} placeholder tokens in the text, {len(slots_S)} slots, {right} of "
            "them on a placeholder; all three must be equal."
        )


def gather(states_BTD: Tensor, slots_MS: Tensor) -> Tensor:
    """(M, S, D): the states at the signal tokens of each target.

    Args:
        states_BTD: (B, T, D).
        slots_MS: (M, S) positions in the flattened (B*T) batch.

    Raises:
        ValueError: where a slot lies outside the batch.
    """
    rows, length, _ = states_BTD.shape
    if len(slots_MS) and (int(slots_MS.min()) < 0 or int(slots_MS.max()) >= rows * length):
        raise ValueError(
            f"signal tokens reach from {int(slots_MS.min())} to {int(slots_MS.max())}, the batch "
            f"has {rows} x {length} tokens."
        )
    return states_BTD.flatten(0, 1)[slots_MS.to(states_BTD.device, non_blocking=True)]


def check_signals(
    input_ids_BT: Tensor, slots_MS: Tensor, signal_ids: Sequence[int], name: str
) -> None:
    """Fail unless the slots of a modality are exactly its signal tokens, in their order.

    Raises:
        ValueError: with both counts.
    """
    flat, ids = input_ids_BT.flatten(), torch.tensor(signal_ids)
    placed = int(torch.isin(flat, ids).sum())
    right = int((flat[slots_MS] == ids).sum()) if len(slots_MS) else 0
    if not placed == right == slots_MS.numel():
        raise ValueError(
            f"{name}: {placed} signal tokens in the text, {slots_MS.numel()} slots, {right} of "
            "them on their own signal token; all three must be equal."
        )
