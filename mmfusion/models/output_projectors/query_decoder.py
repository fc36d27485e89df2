"""The tiny transformer of NExT-GPT (arXiv:2309.05519): learned queries attend to the signal states.

One query for each token of the conditioning, and one for the pooled vector where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfusion.models.output_projectors.base import OutputProjector
from mmfusion.types import Conditioning, ConditioningSpec


class QueryDecoder(OutputProjector):
    """An encoder over the signal states and a decoder of learned queries, pre-norm.

    Args:
        in_dim, spec: given by the model.
        layers: see the base class.
        add_embeddings: see the base class.
        baseline: see the base class.
        dim: width inside.
        encoder_layers: over the signal states.
        decoder_layers: of the queries.
        heads: of attention.
        ffn_dim: width of the feed-forward layers.
        dropout: inside the layers.
    """

    means = (*OutputProjector.means, "heads")

    def __init__(
        self,
        in_dim: int,
        spec: ConditioningSpec,
        layers: Sequence[int] = (-1,),
        add_embeddings: bool = False,
        baseline: str = "",
        dim: int = 512,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        heads: int = 4,
        ffn_dim: int = 2048,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_dim, spec, layers, add_embeddings, baseline)
        if dim % heads:
            raise ValueError(f"dim {dim} is no multiple of heads {heads}.")
        self.heads = heads
        self.inward = nn.Linear(in_dim, dim)
        options: dict[str, Any] = {
            "dim_feedforward": ffn_dim, "dropout": dropout, "activation": "gelu",
            "batch_first": True, "norm_first": True,
        }  # fmt: skip
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(dim, heads, **options), encoder_layers, nn.LayerNorm(dim),
            enable_nested_tensor=False,
        )  # fmt: skip
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(dim, heads, **options), decoder_layers, nn.LayerNorm(dim)
        )
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.ndim > 1:  # as nn.Transformer does: copies of one layer start apart
                nn.init.xavier_uniform_(parameter)
        queries = spec.tokens + (spec.pooled_dim > 0)
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.outward = nn.Linear(dim, spec.dim)
        self.pooled = nn.Linear(dim, spec.pooled_dim) if spec.pooled_dim else None

    def project(self, states_MSD: Tensor) -> Conditioning:
        queries = self.queries.expand(len(states_MSD), -1, -1)
        found = self.decoder(queries, self.encoder(self.inward(states_MSD)))
        tokens = self.outward(found[:, : self.spec.tokens])
        return Conditioning(tokens, self.pooled(found[:, -1]) if self.pooled else None)
