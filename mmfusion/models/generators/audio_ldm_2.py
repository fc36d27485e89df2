"""AudioLDM 2 (arXiv:2308.05734): a U-Net that attends to two streams, over the VAE and vocoder of
AudioLDM. One stream are the states that GPT-2 goes on with after the encodings of CLAP and T5 (the
"language of audio"), the other is T5's encoding itself.

The conditioning lays both end to end: first the ``G`` generated states, then T5's. The narrower
ones are followed by zeros, which the U-Net never sees. Each caption is encoded alone, as diffusers'
``AudioLDM2Pipeline.encode_prompt`` does with a single one: among others it would be padded, which
moves the places that GPT-2 counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    ClapModel,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    T5EncoderModel,
)

from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, VOCODER, Sampling
from mmfusion.models.generators.diffusers_pipeline import Component, DiffusersPipeline, DType
from mmfusion.models.generators.sampling import draw_latents
from mmfusion.models.generators.sounds import MelClip, mel_moments
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import Conditioning, ConditioningSpec, Media, MediaTensors


class AudioLDM2(DiffusersPipeline):
    """A frozen text-to-audio model with CLAP, T5 and GPT-2; those with VITS, which speak, are not
    taken.

    Args:
        path: folder of a diffusers pipeline (``model_index.json``), or a hub id.
        seconds: of a clip, in training and in answers (0: the U-Net's own); rounded up to whole
            latents.
        t5_tokens: tokens of T5's part of the conditioning; what is longer is cut.
        window: samples of the Fourier transform that mel frames are made by.
        dtype: of the weights.
        revision: commit, tag or branch of a hub id.
    """

    modality = "audio"
    components = {
        "text_encoder": Component(TEXT_ENCODER, "text_encoder", ClapModel),
        "text_encoder_2": Component(TEXT_ENCODER, "text_encoder_2", T5EncoderModel),
        "projection": Component(TEXT_ENCODER, "projection_model", AudioLDM2ProjectionModel),
        "language_model": Component(
            TEXT_ENCODER, "language_model", GPT2LMHeadModel, aliases=("GPT2Model",)
        ),
        "vae": Component(VAE, "vae", AutoencoderKL),
        "denoiser": Component(DENOISER, "unet", AudioLDM2UNet2DConditionModel),
        "vocoder": Component(VOCODER, "vocoder", SpeechT5HifiGan),
    }
    text_encoder_2: Any
    projection: Any
    language_model: Any

    def __init__(
        self,
        path: str,
        seconds: float = 0.0,
        t5_tokens: int = 64,
        window: int = 1024,
        dtype: DType = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__(path, dtype, revision)
        if t5_tokens < 1:
            raise ValueError(f"t5_tokens is {t5_tokens}; expected 1 or more.")
        self.t5_tokens = t5_tokens
        unet, vae = self.configs["denoiser"], self.configs["vae"]
        self.generated = int(self.configs["language_model"].get("max_new_tokens") or 8)
        self.widths = [
            int(self.configs["language_model"]["n_embd"]),
            int(self.configs["text_encoder_2"]["d_model"]),
        ]
        taken = [width for width in _first(unet["cross_attention_dim"]) if width is not None]
        if len(taken) != 2:
            raise ValueError(
                f"the U-Net of {self.path} attends to streams of the widths {taken}; expected two, "
                "of GPT-2 and of T5."
            )
        for takes, gives in zip(taken, self.widths, strict=True):
            self.check_width(int(takes), gives)
        self.check_width(unet["in_channels"], vae["latent_channels"], "latents")
        self.clip = MelClip(self.path, self.configs, seconds, window)

    @property
    def spec(self) -> ConditioningSpec:
        return ConditioningSpec(self.generated + self.t5_tokens, max(self.widths))

    def target_processor(self) -> MediaProcessor:
        return self.clip.processor()

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        pipeline: Any = AudioLDM2Pipeline(
            vae=None, text_encoder=self.text_encoder, text_encoder_2=self.text_encoder_2,
            projection_model=self.projection, language_model=self.language_model,
            tokenizer=self.tokenizer(), tokenizer_2=self.tokenizer("tokenizer_2"),
            feature_extractor=None, unet=None, scheduler=None, vocoder=None,
        )  # fmt: skip
        found = []
        for caption in captions:
            t5, mask, generated = pipeline.encode_prompt(
                [caption], self.device, 1, False, max_new_tokens=self.generated
            )
            t5, mask = t5[:, : self.t5_tokens], mask[:, : self.t5_tokens].bool()
            rest = self.t5_tokens - mask.shape[1]
            given = Conditioning(F.pad(t5, (0, 0, 0, rest)), mask=F.pad(mask, (0, rest)))
            found.append((generated, given))
        states, texts = torch.cat([each for each, _ in found]), [given for _, given in found]
        masks = [given.mask for given in texts if given.mask is not None]
        t5 = Conditioning(torch.cat([given.tokens for given in texts]), mask=torch.cat(masks))
        return self._joined(states, t5)

    def _joined(self, generated: Tensor, t5: Conditioning) -> Conditioning:
        """End to end, the narrower followed by zeros; see :meth:`streams`."""
        dim = self.spec.dim
        streams = (generated.to(t5.tokens), t5.tokens)
        tokens = torch.cat([F.pad(each, (0, dim - each.shape[-1])) for each in streams], 1)
        mask = None if t5.mask is None else F.pad(t5.mask, (self.generated, 0), value=True)
        return Conditioning(tokens, mask=mask)

    def streams(self, conditioning: Conditioning) -> tuple[Tensor, Conditioning]:
        """The generated states (M, G, n_embd), and T5's part (M, C, d_model) with its mask.

        Raises:
            ValueError: where there is no token left for T5's part.
        """
        tokens = conditioning.tokens
        if tokens.shape[1] <= self.generated:
            raise ValueError(
                f"the conditioning has {tokens.shape[1]} tokens, of which AudioLDM 2 takes "
                f"{self.generated} for what GPT-2 would generate and the others for T5's; expected "
                "more. Use a QueryDecoder, or more signal tokens."
            )
        mask = None if conditioning.mask is None else conditioning.mask[:, self.generated :]
        first, second = tokens[:, : self.generated], tokens[:, self.generated :]
        return first[..., : self.widths[0]], Conditioning(second[..., : self.widths[1]], mask=mask)

    def paired(
        self, conditioning: Conditioning, empty: Conditioning
    ) -> tuple[Conditioning, Conditioning]:
        """As the base class, of T5's part alone: what is generated has its place."""
        (first, given), (none, empty_t5) = self.streams(conditioning), self.streams(empty)
        pair = super().paired(given, empty_t5)
        states = (first, none.expand_as(first))
        ours, theirs = (self._joined(a, t5) for a, t5 in zip(states, pair, strict=True))
        return ours, theirs

    @torch.no_grad()
    def moments(self, tensors: MediaTensors) -> tuple[Tensor, Tensor]:
        return mel_moments(self.vae, tensors["mel"])

    def predict(self, noisy: Tensor, timesteps_M: Tensor, given: Conditioning) -> Tensor:
        generated, t5 = self.streams(given)
        return self.denoiser(
            noisy,
            timesteps_M,
            encoder_hidden_states=generated,
            encoder_hidden_states_1=t5.tokens,
            encoder_attention_mask_1=t5.mask,
        ).sample

    def draw(self, ours: Conditioning, none: Conditioning, sampling: Sampling) -> list[Media]:
        latents = draw_latents(self, self.clip.latents, ours, none, sampling)
        return self.clip.heard(latents, self.vae, self.vocoder)


def _first(widths: Any) -> Sequence[Any]:
    """Of the U-Net's first block with attention: each has the widths of its streams."""
    found = next((each for each in widths if isinstance(each, (list, tuple))), None)
    return widths if found is None else found
