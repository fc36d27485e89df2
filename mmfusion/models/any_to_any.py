"""The figure of the architecture: encode each modality, project it, put its tokens among the
text's, run the LLM.

    image ─► encoder ─► input projector ─┐
    video ─► encoder ─► input projector ─┼─► LLM ─► hidden states ─► objectives
    audio ─► encoder ─► input projector ─┤
    text ────────────────────────────────┘

Legend: B rows, T tokens of a row, D hidden, N items of a modality, F features, P tokens of an item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from mmfusion.models import fusion
from mmfusion.models.encoders.base import Encoder
from mmfusion.models.llms.base import LLM
from mmfusion.models.projectors.base import Projector
from mmfusion.processing.processor import Processor
from mmfusion.types import Batch, MediaBatch, MediaTensors, ModelOutput


class AnyToAnyModel(nn.Module):
    """Encoders, input projectors and the LLM of a recipe.

    Args:
        encoders: one for each modality.
        input_projectors: for each modality, what makes its projector from the two widths.
        llm: the backbone.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        input_projectors: Mapping[str, Callable[[int, int], Projector]],
        llm: LLM,
    ) -> None:
        super().__init__()
        if set(encoders) != set(input_projectors):
            raise ValueError(
                f"encoders are for {sorted(encoders)}, input_projectors for "
                f"{sorted(input_projectors)}; give each modality one of both."
            )
        self.encoders = nn.ModuleDict(dict(encoders))
        self.input_projectors = nn.ModuleDict()
        self.llm = llm
        self._factories = dict(input_projectors)
        self._processor: Processor | None = None

    def build(self, pretrained: bool = True) -> None:
        """Make every module and load its weights. The second call does nothing."""
        self.llm.build(pretrained)
        for modality in self.encoders:
            self._encoder(modality).build(pretrained)
            if modality not in self.input_projectors:
                self.input_projectors[modality] = self._projector(modality)

    def _projector(self, modality: str) -> Projector:
        return self._factories[modality](self._encoder(modality).out_dim, self.llm.hidden_dim)

    def _encoder(self, modality: str) -> Encoder:
        return cast(Encoder, self.encoders[modality])

    def processor(self) -> Processor:
        """The contract with the data: tokenizer, media processors, tokens a media item takes."""
        if self._processor is None:
            with torch.device("meta"):  # num_tokens needs no weights
                projectors = {modality: self._projector(modality) for modality in self.encoders}
            self._processor = Processor(
                tokenizer=self.llm.tokenizer(),
                media={m: self._encoder(m).media_processor() for m in self.encoders},
                num_tokens={m: projector.num_tokens for m, projector in projectors.items()},
                limits=self.llm.limits(),
            )
        return self._processor

    def forward(self, batch: Batch) -> ModelOutput:
        embeds, media_tokens, idle = self.embed(batch)
        hidden = self.llm(embeds, batch.position_ids, batch.host.cu_seqlens)
        return ModelOutput(hidden, media_tokens, idle)

    def embed(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Returns (B, T, D) embeddings with the media in their slots, the projected media (N, P, D)
        by modality, and the idle zero.
        """
        if absent := set(self.encoders) - set(batch.media):
            raise ValueError(f"the batch says nothing of {sorted(absent)}, not even an idle item.")
        embeds = self.llm.embed(batch.input_ids)
        idle = embeds.new_zeros(())
        media_tokens, valid, slots = {}, {}, {}
        for modality in self.encoders:  # in the recipe's order, the same on every rank
            media = batch.host.media[modality]  # counts and slots; the tensors are in batch.media
            tokens = self._tokens(modality, batch.media[modality].tensors, media, embeds.device)
            if media.idle:
                idle = idle + 0.0 * tokens.sum()
            placeholder = self.processor().placeholder_ids[modality]
            fusion.check_placeholders(batch.host.input_ids, media.slots, placeholder, modality)
            media_tokens[modality], slots[modality] = tokens, media.slots
            counts = self._checked_counts(modality, media)
            valid[modality] = fusion.valid_tokens(tokens, counts, modality)
        return fusion.scatter(embeds, valid, slots), media_tokens, idle

    def _tokens(
        self, modality: str, tensors: MediaTensors, media: MediaBatch, device: torch.device
    ) -> Tensor:
        """(N, P, D): the media of one modality, encoded and projected."""
        encoder = self._encoder(modality)
        projector = cast(Projector, self.input_projectors[modality])
        trains = any(p.requires_grad for p in encoder.parameters())
        longest = int(media.num_features.max())
        if trains or (projector.reads_features and not media.idle):
            with nullcontext() if trains else torch.no_grad():
                features = encoder(tensors)
        else:
            shape = (len(media.num_features), longest, encoder.out_dim)
            features = torch.zeros(shape, device=device)
        if len(features) != len(media.num_features) or features.shape[1] < longest:
            raise ValueError(
                f"{modality}: the encoder gave {tuple(features.shape)}, expected "
                f"{len(media.num_features)} items of up to {longest} features; "
                "MediaProcessor.num_features and Encoder.forward disagree."
            )
        # A frozen encoder may be kept in a lower precision than its projector trains in.
        dtype = next((p.dtype for p in projector.parameters()), features.dtype)
        valid = fusion.first_n(media.num_features, features.shape[1])
        return projector(features.to(dtype), valid.to(device, non_blocking=True))

    def _checked_counts(self, modality: str, media: MediaBatch) -> Tensor:
        """(N,) placeholder slots of each item, which must be the tokens its projector gives."""
        if media.idle:
            return torch.zeros_like(media.num_tokens)
        projector = cast(Projector, self.input_projectors[modality])
        given = [projector.num_tokens(count) for count in media.num_features.tolist()]
        if given != media.num_tokens.tolist():
            raise ValueError(
                f"{modality}: the projector gives {given} tokens for the batch's items, their "
                f"placeholder slots are {media.num_tokens.tolist()}; the samples were planned with "
                "another projector."
            )
        return media.num_tokens
