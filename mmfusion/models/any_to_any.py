"""The figure of the architecture: encode each modality, project it, put its tokens among the
text's, run the LLM, project its hidden states at signal tokens to what the generators take.

    image ─► encoder ─► input projector ─┐       ┌─► output projector ─► conditioning of a generator
    video ─► encoder ─► input projector ─┼─► LLM ┼─► output projector ─► conditioning of a generator
    audio ─► encoder ─► input projector ─┤       ├─► output projector ─► conditioning of a generator
    text ────────────────────────────────┘       └─► text ─► speaker

Legend: B rows, T tokens of a row, D hidden, N items of a modality, F features, P tokens of an item;
M targets of a modality, S signal tokens of a target, C tokens of its conditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from mmfusion.models import fusion
from mmfusion.models.encoders.base import Encoder
from mmfusion.models.generators.base import Generator
from mmfusion.models.llms.base import LLM
from mmfusion.models.llms.sequence import SequenceGroup, SequenceShare
from mmfusion.models.output_projectors.base import OutputProjector
from mmfusion.models.projectors.base import Projector
from mmfusion.models.speakers.base import Speaker
from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.processor import Processor
from mmfusion.processing.special_tokens import SPEECH
from mmfusion.processing.special_tokens import signal_tokens as signals_of
from mmfusion.types import (
    Batch,
    Conditioning,
    ConditioningSpec,
    MediaBatch,
    MediaTensors,
    Message,
    ModelOutput,
    Text,
)

OutputFactory = Callable[[int, ConditioningSpec], OutputProjector]


class AnyToAnyModel(nn.Module):
    """The five parts of a recipe.

    Args:
        encoders: one for each modality that is read.
        input_projectors: for each of them, what makes its projector from the two widths.
        llm: the backbone.
        signal_tokens: for each modality that is made, how many signal tokens stand for an item;
            they are added to the LLM's vocabulary.
        output_projectors: for each of them, what makes its projector from the LLM's width and the
            generator's specification.
        generators: one for each of them.
        needs: for each of them, the parts of its generator that are loaded.
        captioned: those whose targets need a caption.
        speaker: says aloud what the LLM puts between the signal tokens of speech, which are added
            to its vocabulary.
        step_captions: modalities of which an objective reads the captions of a whole step.

    Attributes:
        needs: parts that are loaded of each generator.
        stored: parts of each generator whose work comes with the targets.
        target_processors: those that take the place of a generator's own.
        sequence_group: the ranks that share rows with this one, where there are such.
        divided: names of encoders and denoisers whose weights ranks share, so that all must run
            them as often.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        input_projectors: Mapping[str, Callable[[int, int], Projector]],
        llm: LLM,
        signal_tokens: Mapping[str, int] | None = None,
        output_projectors: Mapping[str, OutputFactory] | None = None,
        generators: Mapping[str, Generator] | None = None,
        needs: Mapping[str, Collection[str]] | None = None,
        captioned: Collection[str] = (),
        speaker: Speaker | None = None,
        step_captions: Collection[str] = (),
    ) -> None:
        super().__init__()
        if set(encoders) != set(input_projectors):
            raise ValueError(
                f"encoders are for {sorted(encoders)}, input_projectors for "
                f"{sorted(input_projectors)}; give each modality one of both."
            )
        made = [set(given or {}) for given in (signal_tokens, output_projectors, generators)]
        if made[0] != made[1] or made[0] != made[2]:
            raise ValueError(
                "signal_tokens, output_projectors and generators are for "
                f"{[sorted(names) for names in made]}; give each modality one of all three."
            )
        self.encoders = nn.ModuleDict(dict(encoders))
        self.input_projectors = nn.ModuleDict()
        self.llm = llm
        self.output_projectors = nn.ModuleDict()
        self.generators = nn.ModuleDict(dict(generators or {}))
        self.signal_tokens = dict(signal_tokens or {})
        for modality, count in self.signal_tokens.items():
            if count < 1:
                raise ValueError(f"signal_tokens.{modality} is {count}; expected 1 or more.")
            llm.add_tokens(signals_of(modality, count))
        self.speaker = speaker
        if speaker is not None:
            llm.add_tokens(list(SPEECH))
        self._factories = dict(input_projectors)
        self._output_factories = dict(output_projectors or {})
        given = needs or {}
        self.needs = {modality: frozenset(given.get(modality, ())) for modality in self.generators}
        self.stored: dict[str, frozenset[str]] = {}
        self.target_processors: dict[str, MediaProcessor] = {}
        self.sequence_group: SequenceGroup | None = None
        self.divided: set[str] = set()
        self._captioned = frozenset(captioned)
        self._step_captions = frozenset(step_captions)
        self._processor: Processor | None = None
        self._built = False

    def build(self, pretrained: bool = True) -> None:
        """Make every module and load its weights. The second call does nothing."""
        self.llm.build(pretrained)
        for modality in self.encoders:
            if modality not in self.input_projectors:
                self.input_projectors[modality] = self._projector(modality)
        for modality, make in self._output_factories.items():
            if modality not in self.output_projectors:
                spec = self.generator(modality).spec
                self.output_projectors[modality] = make(self.llm.hidden_dim, spec)
        # These come last: projectors are drawn alike, whether they are loaded or stored.
        for modality in self.encoders:
            self._encoder(modality).build(pretrained)
        for modality in self.generators:
            self.generator(modality).build(self.needs[modality], pretrained)
        self._built = True

    def given(self, modality: str) -> ConditioningSpec:
        """What the output projector of a modality gives for a target. Works before ``build``.

        Raises:
            ValueError: where it reads a layer that the LLM does not have, or its widths are not
                those that the generator takes.
        """
        width, count = self.llm.hidden_dim, self.llm.num_layers
        with torch.device("meta"), torch.no_grad():
            projector = self._output_factories[modality](width, self.generator(modality).spec)
            found = projector.project(torch.empty(1, self.signal_tokens[modality], width))
        if count is not None and (odd := [x for x in projector.layers if not -1 <= x <= count]):
            raise ValueError(
                f"output_projectors.{modality} reads the LLM's layers {list(projector.layers)}, "
                f"but it has {count}: there is no {odd[0]}; expected -1 (the last) or 0 to {count}."
            )
        _, tokens, dim = found.tokens.shape
        gives = ConditioningSpec(tokens, dim, 0 if found.pooled is None else found.pooled.shape[-1])
        takes = self.generator(modality).spec
        if (gives.dim, gives.pooled_dim) != (takes.dim, takes.pooled_dim):
            raise ValueError(
                f"output_projectors.{modality} ({type(projector).__name__}) gives conditioning of "
                f"width {gives.dim} with a pooled vector of {gives.pooled_dim}, but "
                f"{type(self.generator(modality)).__name__} takes {takes.dim} and "
                f"{takes.pooled_dim} (0: none); expected the same. A projector takes its widths "
                "from the specification that it is made with."
            )
        return gives

    def need(self, modality: str, parts: Collection[str]) -> None:
        """Have more parts of a generator: loaded with the others, or now where these are there."""
        self.needs[modality] |= frozenset(parts)
        if self._built:
            self.generator(modality).build(parts)

    def parts(self) -> list[tuple[str, nn.Module]]:
        """The parts by their names, in the order of the figure."""
        before = (("encoders", self.encoders), ("input_projectors", self.input_projectors))
        after = (("output_projectors", self.output_projectors), ("generators", self.generators))
        named = [
            [(f"{kind}.{name}", part) for kind, parts in side for name, part in parts.items()]
            for side in (before, after)
        ]
        return [*named[0], ("llm", self.llm), *named[1]]

    def generator(self, modality: str) -> Generator:
        """That of a modality."""
        return cast(Generator, self.generators[modality])

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
                targets={
                    m: self.target_processors.get(m) or self.generator(m).target_processor()
                    for m in self.generators
                },
                signal_tokens=self.signal_tokens,
                captioned=self._captioned,
                speaks=self.speaker is not None,
                step_captions=self._step_captions,
            )
        return self._processor

    def forward(self, batch: Batch) -> ModelOutput:
        embeds, media_tokens = self.embed(batch)
        idle = embeds.new_zeros(())
        states = self._states(embeds, batch)
        conditioning: dict[str, Conditioning] = {}
        for modality in self.output_projectors:  # in the recipe's order, the same on every rank
            target = batch.host.targets[modality]
            if not target.idle:
                signals = self.processor().signal_ids[modality]
                fusion.check_signals(batch.host.input_ids, target.slots, signals, modality)
            # An idle one reads some token: every rank runs what any rank runs, there and back.
            given = self.condition(modality, states, embeds, target.slots)
            if target.idle:
                idle = idle + 0.0 * given.tokens.sum()
                idle = idle if given.pooled is None else idle + 0.0 * given.pooled.sum()
            conditioning[modality] = given
        return ModelOutput(states[-1], media_tokens, conditioning, idle)

    def _states(self, embeds: Tensor, batch: Batch) -> dict[int, Tensor]:
        """(B, T, D) of each of :attr:`layers`; of a row that ranks share, of this rank's tokens."""
        cu_seqlens = batch.host.cu_seqlens
        if batch.bounds is None:
            return self.llm.forward_layers(embeds, batch.position_ids, cu_seqlens, self.layers)
        assert self.sequence_group is not None
        share = SequenceShare(batch.bounds, self.sequence_group)
        own, places = share.own(embeds), share.own(batch.position_ids)
        states = self.llm.forward_layers(own, places, cu_seqlens, self.layers, share)
        return {layer: share.placed(state) for layer, state in states.items()}

    @property
    def layers(self) -> list[int]:
        """The LLM's layers whose hidden states are read."""
        read = (self._output(modality).layers for modality in self.output_projectors)
        return sorted({-1, *chain.from_iterable(read)})

    def condition(
        self, modality: str, states: Mapping[int, Tensor], embeds: Tensor, slots: Tensor
    ) -> Conditioning:
        """What the generator of a modality is given for each of M targets.

        Args:
            modality: of the targets.
            states: (B, T, D) of each of :attr:`layers`.
            embeds: (B, T, D) that went into the LLM.
            slots: (M, S) places of the signal tokens in the flattened (B*T) batch.
        """
        projector = self._output(modality)
        read = {layer: fusion.gather(states[layer], slots) for layer in projector.layers}
        for layer, state in self._baseline(modality, embeds.device).items():
            read[layer] = read[layer] - state
        return projector(read, fusion.gather(embeds, slots))

    @torch.no_grad()
    def _baseline(self, modality: str, device: torch.device) -> dict[int, Tensor]:
        """(1, S, D) of each layer that is read: the states that answer the projector's baseline;
        none where it has no such. They follow the LLM's adapters and new rows in every step.
        """
        projector, processor = self._output(modality), self.processor()
        if not projector.baseline:
            return {}
        asked = processor.prompt([Message("user", (Text(projector.baseline),))]).planned.input_ids
        signals = torch.tensor(processor.signal_ids[modality])
        ids = torch.cat([asked, signals])[None].to(device)
        places = torch.arange(ids.shape[1], device=device)[None]
        borders = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
        with torch.compiler.set_stance("force_eager"):  # nothing to compile a short row for
            states = self.llm.forward_layers(self.llm.embed(ids), places, borders, projector.layers)
        return {layer: state[:, -len(signals) :] for layer, state in states.items()}

    def _output(self, modality: str) -> OutputProjector:
        return cast(OutputProjector, self.output_projectors[modality])

    def embed(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns (B, T, D) embeddings with the media in their slots, and the projected media
        (N, P, D) by modality.
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
        # Idle items go through the LLM as well: gradients come back layer by layer on every rank.
        # Where a layer's input needs none, FSDP2 and ZeRO reduce in another order than elsewhere.
        return fusion.scatter(embeds, valid, slots) + idle, media_tokens

    def _tokens(
        self, modality: str, tensors: MediaTensors, media: MediaBatch, device: torch.device
    ) -> Tensor:
        """(N, P, D): the media of one modality, encoded and projected."""
        encoder = self._encoder(modality)
        projector = cast(Projector, self.input_projectors[modality])
        trains = any(p.requires_grad for p in encoder.parameters())
        longest = int(media.num_features.max())
        wanted = projector.reads_features and not media.idle
        if trains or wanted or f"encoders.{modality}" in self.divided:
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
