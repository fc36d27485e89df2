"""Next token prediction on the supervised positions only, in chunks: [tokens, vocabulary] logits
are never made.

Each chunk's logits give its loss and at once its gradients, which are kept (as in Liger Kernel,
arXiv:2410.10989); the backward pass only scales them. Legend: B rows, T tokens, K supervised
tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfusion.models.any_to_any import AnyToAnyModel
from mmfusion.objectives.base import Loss, Objective
from mmfusion.types import IGNORE_INDEX, Batch, ModelOutput


class NextToken(Objective):
    """Cross entropy of each supervised token, from the hidden state before it.

    Args:
        weight: of this loss in the sum.
        chunk: supervised tokens whose logits are made at a time.
    """

    def __init__(self, weight: float = 1.0, chunk: int = 1024) -> None:
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be 1 or more.")
        self.weight = weight
        self.chunk = chunk

    def forward(self, model: AnyToAnyModel, output: ModelOutput, batch: Batch) -> Loss:
        device, num_samples = output.hidden_states.device, len(batch.samples)
        rows, places, labels, segments = (
            index.to(device, non_blocking=True) for index in _supervised(batch.host)
        )
        total, losses_K = chunked_cross_entropy(
            output.hidden_states[rows, places], labels, model.llm.logits, self.chunk
        )
        none = torch.zeros(num_samples, device=device)
        return Loss(
            total=total,
            count=torch.full((), len(segments), device=device),
            per_sample=none.index_add(0, segments, losses_K),
            per_sample_count=none.long().index_add(0, segments, torch.ones_like(segments)),
        )


def _supervised(host: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each of the K labels: row and place of the hidden state it is predicted from, the label,
    its sample.
    """
    rows, places = (host.labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    segments = host.segment_ids[rows, places + 1]
    if not torch.equal(segments, host.segment_ids[rows, places]) or bool(
        (host.labels[:, 0] != IGNORE_INDEX).any()
    ):
        raise ValueError(
            "the first token of a sample is a label, but nothing of that sample comes before "
            "it; set its label to IGNORE_INDEX."
        )
    return rows, places, host.labels[rows, places + 1], segments


def chunked_cross_entropy(
    hidden_KD: Tensor, labels_K: Tensor, head: Callable[[Tensor], Tensor], chunk: int
) -> tuple[Tensor, Tensor]:
    """Losses of ``head(hidden)`` against the labels, in fp32: their sum, with gradients for the
    hidden states and for whatever trains inside the head (full weights, LoRA, new token rows), and
    each of them (K,), detached.
    """
    parameters = _trainable(head, hidden_KD) if torch.is_grad_enabled() else []
    return _ChunkedCrossEntropy.apply(hidden_KD, labels_K, head, chunk, *parameters)


def _trainable(head: Callable[[Tensor], Tensor], hidden_KD: Tensor) -> list[Tensor]:
    """The leaves that train in the head's graph, found by walking it for one token."""
    probe = head(hidden_KD.detach().new_zeros(1, hidden_KD.shape[1]))
    leaves: dict[int, Tensor] = {}
    seen, stack = set(), [probe.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        stack += [parent for parent, _ in node.next_functions]
    return list(leaves.values())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the losses and, already in the forward pass, its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        labels_K: Tensor,
        head: Callable[[Tensor], Tensor],
        chunk: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = hidden_KD.requires_grad or bool(parameters)
        losses, hidden_grads = [hidden_KD.new_zeros(0, dtype=torch.float32)], []
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for start in range(0, len(labels_K), chunk):
            labels = labels_K[start : start + chunk]
            with torch.set_grad_enabled(wanted):
                hidden = hidden_KD[start : start + chunk].detach().requires_grad_(wanted)
                loss = F.cross_entropy(head(hidden).float(), labels, reduction="none")
                if wanted:
                    grads = torch.autograd.grad(loss.sum(), [hidden, *parameters])
                    hidden_grads.append(grads[0])
                    for total, grad in zip(sums, grads[1:], strict=True):
                        total += grad
            losses.append(loss.detach())
        hidden_grad = torch.cat(hidden_grads) if hidden_grads else torch.zeros_like(hidden_KD)
        ctx.save_for_backward(
            hidden_grad, *[total.to(p.dtype) for total, p in zip(sums, parameters, strict=True)]
        )
        losses_K = torch.cat(losses)
        ctx.mark_non_differentiable(losses_K)
        return losses_K.sum(), losses_K

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, *parameter_grads = (
            (grad * grad_outputs[0]).to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden_grad, None, None, None, *parameter_grads
