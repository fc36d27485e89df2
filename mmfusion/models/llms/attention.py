"""Attention over samples laid end to end, exact: no token sees another sample, and no mask of size
T x T is made.

Registered with transformers as ``varlen_sdpa``. Called with ``cu_seq_lens_q`` it runs one causal
attention a sample; without it (generation with a cache) it is transformers' own ``sdpa``.
Legend: B rows, H heads, G key/value heads, T tokens, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "varlen_sdpa"


def varlen_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of (B, H, T, E) queries to (B, G, T, E) keys inside each span of ``cu_seq_lens_q``.

    Returns:
        (B, T, H, E) and no attention weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **({"softcap": softcap} if softcap is not None else {}),
            **kwargs,
        )
    if unknown := [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__} passes {unknown} to its attention, which packed attention "
            "does not know; set attention: flash_attention_2 where it supports them."
        )
    lengths = cu_seq_lens_q.diff().tolist()
    spans = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
    outputs = [_causal(q, k, v, scaling, dropout, sliding_window, softcap) for q, k, v in spans]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of one sample, (B, H, T, E)."""
    place = torch.arange(query.shape[2], device=query.device)
    mask = place[:, None] >= place
    if sliding_window:
        mask &= place[:, None] - place < sliding_window
    if softcap is None:
        masked = sliding_window is not None and len(place) > sliding_window
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask if masked else None,
            dropout_p=dropout,
            is_causal=not masked,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    repeats = query.shape[1] // key.shape[1]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2) * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value.repeat_interleave(repeats, 1)


AttentionInterface.register(NAME, varlen_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
