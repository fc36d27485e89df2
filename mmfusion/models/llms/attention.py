"""Attention over samples laid end to end, exact: no token sees another sample, and no mask of size
T x T is made.

Registered with transformers as ``varlen`` (a name without "sdpa": transformers refuses those for
families whose soft-capped attention torch does not have, but this one does). Called with
``cu_seq_lens_q`` it runs causal attention inside each sample, samples of similar length together;
without it (generation with a cache) it is transformers' own ``sdpa``.
Legend: B rows, H heads, G key/value heads, T tokens, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmfusion.models.llms.sequence import SequenceShare

NAME = "varlen"
SHORT = 256
"""Up to this length plain products beat torch's CPU kernel, whose backward pass is slow on short
spans (measured: 2.6 times a whole step's at 20 tokens).
"""


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
    sequence_share: SequenceShare | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of (B, H, T, E) queries to (B, G, T, E) keys inside each span of ``cu_seq_lens_q``.

    With ``sequence_share`` T is this rank's part of a row that several ranks share.

    Returns:
        (B, T, H, E) and no attention weights.
    """
    heads, keys = query.shape[1], key.shape[1]
    if sequence_share is not None:
        query, key, value = sequence_share.by_heads(query, key, value)
    output = _attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling,
        dropout,
        cu_seq_lens_q,
        sliding_window,
        softcap,
        **kwargs,
    )
    if sequence_share is not None:
        output = sequence_share.by_tokens(output, heads, keys)
    return output, None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    cu_seq_lens_q: Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
    **kwargs: Any,
) -> Tensor:
    """(B, T, H, E)."""
    if cu_seq_lens_q is None and softcap:
        if (mask := attention_mask) is None:
            mask = _mask(key.shape[2], None, query.device)[-query.shape[2] :]
        output = _products(query, key, value, mask, scaling, dropout, softcap)
        return output.transpose(1, 2).contiguous()
    if cu_seq_lens_q is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    if unknown := [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__} passes {unknown} to its attention, which packed attention "
            "does not know; set attention: flash_attention_2 where it supports them."
        )
    lengths = tuple(cu_seq_lens_q.diff().tolist())
    if sum(lengths) != query.shape[2] or (len(lengths) > 1 and len(query) > 1):
        raise ValueError(
            f"cu_seqlens ends at {sum(lengths)} for {len(query)} rows of {query.shape[2]} tokens; "
            "samples must fill one row."
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = _causal(q, k, v, scaling, dropout, sliding_window, softcap)
        return output.transpose(1, 2)

    if len(lengths) == 1:
        return attend(query, key, value).contiguous()
    outputs, groups = [], _groups(lengths, query.device)
    for places_SL, valid in groups.spans:
        spans = (tensor[0][:, places_SL].transpose(0, 1) for tensor in (query, key, value))
        outputs.append(attend(*spans).flatten(0, 1)[valid])
    return torch.cat(outputs)[groups.order][None]


@dataclass(frozen=True)
class _Groups:
    """Samples of similar length, padded to attend together.

    Attributes:
        spans: for each group, (S, L) places in the row, padded at the end with any place, and the
            valid ones among its S*L. Padding comes after every valid token, so causal attention
            never looks at it.
        order: (T,) where each token of the row is in the groups' valid tokens.
    """

    spans: list[tuple[Tensor, Tensor]]
    order: Tensor


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what validation caches must serve training too
def _groups(lengths: tuple[int, ...], device: torch.device) -> _Groups:
    """Group samples by the power of two above their length. Every layer asks for the same."""
    starts = [0, *accumulate(lengths)]
    members: dict[int, list[int]] = {}
    for sample, length in enumerate(lengths):
        if length:
            members.setdefault((length - 1).bit_length(), []).append(sample)
    spans, places = [], []
    for samples in members.values():
        longest = max(lengths[sample] for sample in samples)
        first = torch.tensor([starts[sample] for sample in samples])
        count = torch.tensor([lengths[sample] for sample in samples])
        place = torch.arange(longest)
        grid = first[:, None] + place.minimum(count[:, None] - 1)
        valid = (place < count[:, None]).flatten().nonzero().squeeze(1)
        places.append(grid.flatten()[valid])
        spans.append((grid.to(device), valid.to(device)))
    return _Groups(spans, torch.cat(places).argsort().to(device))


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention in each row, (B, H, T, E)."""
    length = query.shape[2]
    window = sliding_window if sliding_window and sliding_window < length else None
    if not softcap and (query.device.type != "cpu" or length > SHORT):
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_mask(length, window, query.device) if window else None,
            dropout_p=dropout,
            is_causal=window is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    mask = _mask(length, window, query.device)
    return _products(query, key, value, mask, scaling, dropout, softcap)


def _products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Attention by plain products, (B, H, T, E); ``mask`` is True where a token may look."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # Not -inf: a padding row sees nothing, and the softmax of nothing is NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout)
    return weights @ value


def _mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, T) bool, True where a token may look."""
    place = torch.arange(length, device=device)
    mask = place[:, None] >= place
    if window:
        mask &= place[:, None] - place < window
    return mask


# The borders are another list in every batch: traced, each would be compiled anew.
AttentionInterface.register(NAME, torch.compiler.disable(varlen_sdpa))
AttentionMaskInterface.register(NAME, sdpa_mask)
