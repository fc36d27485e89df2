"""Packed attention against one plain attention a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfusion.models.llms import attention
from mmfusion.models.llms.attention import varlen_sdpa


def plain(q: Tensor, k: Tensor, v: Tensor, window: int | None, cap: float | None) -> Tensor:
    """Softmax attention of (H, T, E), token by token."""
    outputs = torch.empty_like(q)
    for head in range(q.shape[0]):
        group = head // (q.shape[0] // k.shape[0])
        for t in range(q.shape[1]):
            first = max(0, t + 1 - window) if window else 0
            scores = k[group, first : t + 1] @ q[head, t] * q.shape[2] ** -0.5
            if cap:
                scores = cap * torch.tanh(scores / cap)
            outputs[head, t] = scores.softmax(0) @ v[group, first : t + 1]
    return outputs


@pytest.mark.parametrize("short", [0, 256])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 3}, {"softcap": 2.0}, {"softcap": 2.0, "sliding_window": 2}]
)
@pytest.mark.parametrize("lengths", [[1, 7, 3, 1, 8, 2], [9], [4, 4]])
def test_each_sample_attends_to_itself_only(
    lengths: list[int], options: dict[str, Any], short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", short)
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(1, heads, total, 5, requires_grad=True) for heads in (4, 2, 2))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    output, _ = varlen_sdpa(nn.Identity(), q, k, v, None, cu_seq_lens_q=cu, **options)
    spans = zip(*(x[0].split(lengths, 1) for x in (q, k, v)), strict=True)
    window, cap = options.get("sliding_window"), options.get("softcap")
    with torch.enable_grad():
        expected = torch.cat([plain(*span, window, cap) for span in spans], 1).transpose(0, 1)[None]
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    found = torch.autograd.grad((output * weights).sum(), (q, k, v))
    right = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    torch.testing.assert_close(found, right)


def test_rows_that_the_borders_do_not_fill_are_refused() -> None:
    q = torch.randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match="cu_seqlens ends at 5 for 1 rows of 6 tokens"):
        varlen_sdpa(nn.Identity(), q, q, q, None, cu_seq_lens_q=torch.tensor([0, 2, 5]))


def test_attention_sinks_are_refused_not_ignored() -> None:
    q = torch.randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match="s_aux"):
        varlen_sdpa(
            nn.Identity(), q, q, q, None, cu_seq_lens_q=torch.tensor([0, 6]), s_aux=torch.ones(2)
        )


def test_borders_met_first_in_inference_serve_training() -> None:
    cu = torch.tensor([0, 2, 5, 6])
    with torch.inference_mode():
        q = torch.randn(1, 2, 6, 4)
        varlen_sdpa(nn.Identity(), q, q, q, None, cu_seq_lens_q=cu)
    q = torch.randn(1, 2, 6, 4, requires_grad=True)
    varlen_sdpa(nn.Identity(), q, q, q, None, cu_seq_lens_q=cu)[0].sum().backward()
    assert q.grad is not None
