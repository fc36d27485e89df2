"""One row of tokens on several ranks: each runs the LLM on a part of the row, and attention on some
of the heads.

Ulysses (arXiv:2309.14509): everything in a decoder but attention treats tokens alone, and attention
treats heads alone. So before attention the ranks exchange tokens for heads (all to all), after it
heads for tokens. Parts need not be equally long, nor heads divide evenly.
Legend: B rows (one), T tokens of the row, P tokens of this rank's part, H heads, G key/value heads,
E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn import functional as collectives
from torch.nn import functional as F


class SequenceGroup:
    """The ranks that share a row, in the order of their parts.

    Args:
        group: the process group.

    Attributes:
        rank: of this process, in the group.
        size: of the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, flat: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """All to all: so many numbers to each rank, and from each; differentiable."""
        output = flat.new_empty(sum(received))
        flat = flat.contiguous()
        found = collectives.all_to_all_single(output, flat, received, sent, self._group)
        return cast(Tensor, found)


@dataclass(frozen=True)
class SequenceShare:
    """A rank's part of a row.

    Args:
        bounds: where each rank's part begins, and where the last one ends.
        group: the ranks that share the row.
    """

    bounds: tuple[int, ...]
    group: SequenceGroup

    @property
    def rank(self) -> int:
        """Of this process, in the group."""
        return self.group.rank

    @property
    def lengths(self) -> list[int]:
        """P of each rank."""
        return [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]

    def own(self, row: Tensor) -> Tensor:
        """(B, T, ...) to this rank's (B, P, ...)."""
        return row[:, self.bounds[self.rank] : self.bounds[self.rank + 1]]

    def placed(self, states: Tensor) -> Tensor:
        """(B, P, D) to (B, T, D), zero where other ranks' parts are."""
        before, after = self.bounds[self.rank], self.bounds[-1] - self.bounds[self.rank + 1]
        return F.pad(states, (0, 0, before, after))

    def by_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, P, E) queries and (B, G, P, E) keys and values to those of all T tokens, of this
        rank's heads. Where there are fewer key/value heads than ranks they are repeated.

        Raises:
            ValueError: where there are fewer heads than ranks.
        """
        heads, size = query.shape[1], len(self.lengths)
        if heads < size:
            raise ValueError(
                f"sequence_parallel is {size}, but the LLM has {heads} attention heads, of which "
                f"each rank needs one or more. Set it to {heads} or less."
            )
        if key.shape[1] < size:
            repeats = heads // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
        queries, keys = _dealt(heads, key.shape[1], size)
        return (
            self._to_heads(query, queries),
            self._to_heads(key, keys),
            self._to_heads(value, keys),
        )

    def by_tokens(self, output: Tensor, heads: int, keys: int) -> Tensor:
        """(B, T, h, E) of this rank's heads to (B, P, H, E) of its tokens.

        Args:
            output: of attention.
            heads: H.
            keys: G.
        """
        size = len(self.lengths)
        counts, _ = _dealt(heads, keys if keys >= size else heads, size)
        return self._to_tokens(output, counts)

    def _to_heads(self, states: Tensor, counts: Sequence[int]) -> Tensor:
        """(B, H, P, E) to (B, h, T, E); ``counts`` are h of each rank."""
        _, _, length, width = states.shape
        own = counts[self.rank]
        received = self.group.exchange(
            states.flatten(),  # head by head, so rank by rank
            [count * length * width for count in counts],
            [own * other * width for other in self.lengths],
        )
        parts = received.split([own * other * width for other in self.lengths])
        shapes = zip(parts, self.lengths, strict=True)
        return torch.cat([part.view(1, own, other, width) for part, other in shapes], 2)

    def _to_tokens(self, output: Tensor, counts: Sequence[int]) -> Tensor:
        """(B, T, h, E) to (B, P, H, E); ``counts`` are h of each rank."""
        width, own = output.shape[-1], self.lengths[self.rank]
        sizes = [own * count * width for count in counts]
        received = self.group.exchange(
            output.flatten(),  # token by token, so rank by rank
            [length * counts[self.rank] * width for length in self.lengths],
            sizes,
        )
        parts = zip(received.split(sizes), counts, strict=True)
        return torch.cat([part.view(1, own, count, width) for part, count in parts], 2)


def _dealt(heads: int, keys: int, size: int) -> tuple[list[int], list[int]]:
    """Query heads and key/value heads of each rank: a key/value head stays with its queries."""
    counts = [keys // size + (rank < keys % size) for rank in range(size)]
    return [count * (heads // keys) for count in counts], counts
