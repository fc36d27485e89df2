"""Tiny random pipelines saved to disk, to be loaded by the real code."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

LETTERS = [*string.ascii_lowercase, *string.digits]
CLIP_TOKENS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{x}</w>" for x in LETTERS)]
T5_TOKENS = ["<pad>", "</s>", "<unk>", *LETTERS]


def clip_tokenizer() -> CLIPTokenizer:
    """Of letters, 12 tokens."""
    ids = {token: i for i, token in enumerate(CLIP_TOKENS)}
    return CLIPTokenizer(vocab=ids, merges=[], model_max_length=12)


def clip_text(kind: Any = CLIPTextModel, hidden_size: int = 32, **changes: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(CLIP_TOKENS), hidden_size=hidden_size, intermediate_size=37,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=12, bos_token_id=0,
        eos_token_id=1, **changes,
    )  # fmt: skip
    return kind(config)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Of letters between spaces; every text ends with ``</s>``, as T5's does."""
    ids = {token: i for i, token in enumerate(T5_TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


def t5_text(kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    return kind(
        config(
            vocab_size=len(T5_TOKENS), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
            pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def vae(**changes: Any) -> AutoencoderKL:
    """Halves height and width."""
    options: dict[str, Any] = {
        "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "scaling_factor": 0.25,
    }  # fmt: skip
    return AutoencoderKL(**options | changes)


def unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, **changes,
    )  # fmt: skip


def save_stable_diffusion(folder: Path, prediction_type: str = "epsilon", **scheduler: Any) -> str:
    """Squares of 16 pixels, latents of 8; conditioning of 12 tokens of width 32."""
    torch.manual_seed(3)
    schedule = DDIMScheduler(num_train_timesteps=100, prediction_type=prediction_type, **scheduler)
    pipeline = StableDiffusionPipeline(
        vae(), clip_text(), clip_tokenizer(), unet(cross_attention_dim=32), schedule, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return str(folder)


def save_stable_diffusion_xl(folder: Path) -> str:
    """Conditioning of 12 tokens of width 32 + 24 and a vector of 20."""
    torch.manual_seed(4)
    second = clip_text(CLIPTextModelWithProjection, 24, projection_dim=20)
    denoiser = unet(
        cross_attention_dim=56, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae(), clip_text(), second, clip_tokenizer(), clip_tokenizer(), denoiser,
        EulerDiscreteScheduler(num_train_timesteps=100, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return str(folder)


def save_stable_diffusion_3(folder: Path, t5: bool = True) -> str:
    """Conditioning of 12 tokens and those of T5, of width 32, and a vector of 10 + 14."""
    torch.manual_seed(5)
    first = clip_text(CLIPTextModelWithProjection, 16, projection_dim=10)
    second = clip_text(CLIPTextModelWithProjection, 12, projection_dim=14)
    denoiser = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=32, pooled_projection_dim=24, pos_embed_max_size=8,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        denoiser, FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0),
        vae(shift_factor=0.1), first, clip_tokenizer(), second, clip_tokenizer(),
        t5_text() if t5 else None, t5_tokenizer() if t5 else None,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return str(folder)


def save_pixart(folder: Path, kind: Any = PixArtAlphaPipeline, **transformer: Any) -> str:
    """Conditioning of 120 (alpha) or 300 (sigma) tokens of width 32."""
    torch.manual_seed(6)
    options: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "attention_head_dim": 12, "num_attention_heads": 4, "cross_attention_dim": 48,
        "caption_channels": 32,
    }  # fmt: skip
    pipeline = kind(
        t5_tokenizer(), t5_text(), vae(), PixArtTransformer2DModel(**options | transformer),
        DPMSolverMultistepScheduler(num_train_timesteps=100),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return str(folder)


def save_text_to_video_sd(folder: Path) -> str:
    """Frames of 16 pixels; conditioning of 12 tokens of width 32."""
    torch.manual_seed(7)
    denoiser = UNet3DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"), attention_head_dim=8,
    )  # fmt: skip
    pipeline = TextToVideoSDPipeline(
        vae(), clip_text(), clip_tokenizer(), denoiser, DDIMScheduler(num_train_timesteps=100)
    )
    pipeline.save_pretrained(folder)
    return str(folder)


def save_wan(folder: Path) -> str:
    """Latents of an eighth of the side and a quarter of the frames; conditioning of width 32."""
    torch.manual_seed(8)
    autoencoder = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 1.0, 2.0],
    )  # fmt: skip
    denoiser = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    schedule = UniPCMultistepScheduler(
        num_train_timesteps=100, prediction_type="flow_prediction", use_flow_sigmas=True,
        flow_shift=3.0,
    )  # fmt: skip
    pipeline = WanPipeline(
        t5_tokenizer(), t5_text(UMT5EncoderModel, UMT5Config), autoencoder, schedule, denoiser
    )
    pipeline.save_pretrained(folder)
    return str(folder)
