"""Tiny random pipelines of sound, saved to disk to be loaded by the real code."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AudioLDMPipeline,
    AutoencoderKL,
    AutoencoderOobleck,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ClapConfig,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Tokenizer,
)

from tests.models.generators.tiny import LETTERS, t5_text, t5_tokenizer


def roberta_tokenizer(longest: int = 16) -> PreTrainedTokenizerFast:
    """Letters, between ``<s>`` and ``</s>``; RoBERTa's ids of start, pad and end."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *string.ascii_lowercase]
    model = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, "<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=longest,
    )  # fmt: skip


def mel_vae(channels: int = 4) -> AutoencoderKL:
    """Halves frames and bins."""
    return AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(32, 32), latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8, scaling_factor=0.25,
    )  # fmt: skip


def vocoder(bins: int = 8) -> SpeechT5HifiGan:
    """4 kHz, 64 samples a frame."""
    config = SpeechT5HifiGanConfig(
        model_in_dim=bins, sampling_rate=4000, upsample_initial_channel=8, upsample_rates=[8, 8],
        upsample_kernel_sizes=[16, 16], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]], normalize_before=False,
        initializer_range=0.3,
    )  # fmt: skip
    return SpeechT5HifiGan(config)


def save_audio_ldm(folder: Path, prediction_type: str = "epsilon", **scheduler: Any) -> str:
    """Clips of 16 frames of 8 bins, 0.256 s; conditioning of one vector of width 32."""
    torch.manual_seed(3)
    text = ClapTextConfig(
        vocab_size=30, hidden_size=16, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=18, projection_dim=32,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=(32, 64),
        attention_head_dim=4, norm_num_groups=8, class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=32, class_embeddings_concat=True,
    )  # fmt: skip
    schedule = DDIMScheduler(num_train_timesteps=100, prediction_type=prediction_type, **scheduler)
    pipeline = AudioLDMPipeline(
        mel_vae(), ClapTextModelWithProjection(text), roberta_tokenizer(), unet, schedule, vocoder()
    )
    pipeline.save_pretrained(folder)
    return str(folder)


def save_audio_ldm_2(folder: Path) -> str:
    """Clips as of :func:`save_audio_ldm`; 4 generated states of width 16, T5's of width 32."""
    torch.manual_seed(3)
    text = {
        "vocab_size": 100, "hidden_size": 8, "intermediate_size": 37, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 18, "projection_dim": 16,
    }  # fmt: skip
    audio = {
        "spec_size": 64, "window_size": 4, "num_mel_bins": 64, "intermediate_size": 37,
        "depths": [1, 1], "num_attention_heads": [1, 1], "num_hidden_layers": 2,
        "hidden_size": 16, "patch_size": 2, "patch_stride": 2, "patch_embed_input_channels": 4,
        "patch_embeds_hidden_size": 8, "projection_dim": 16,
    }  # fmt: skip
    clap = ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    gpt2 = GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=60, vocab_size=50)
    gpt2.max_new_tokens = 4
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 16, 32), (None, 16, 32)),
    )  # fmt: skip
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *LETTERS, *(f"\u0120{x}" for x in LETTERS)]
    roberta = RobertaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16
    )
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -9.0),
        *((x, -1.0) for x in ["\u2581", *LETTERS]),
    ]
    pipeline = AudioLDM2Pipeline(
        mel_vae(), ClapModel(clap), t5_text(), AudioLDM2ProjectionModel(16, 32, 16),
        GPT2LMHeadModel(gpt2), roberta, T5Tokenizer(vocab=pieces, model_max_length=12), None, unet,
        DDIMScheduler(num_train_timesteps=100), vocoder(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return str(folder)


def save_stable_audio(folder: Path) -> str:
    """Windows of 128 samples at 4 kHz in stereo, 16 latents; 6 tokens of width 8."""
    torch.manual_seed(3)
    vae = AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[2, 4], decoder_channels=3,
        decoder_input_channels=3, audio_channels=2, channel_multiples=[2, 4], sampling_rate=4000,
    )  # fmt: skip
    transformer = StableAudioDiTModel(
        sample_size=16, in_channels=3, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        num_key_value_attention_heads=2, out_channels=3, cross_attention_dim=8, time_proj_dim=8,
        global_states_input_dim=16, cross_attention_input_dim=8,
    )  # fmt: skip
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 6
    pipeline = StableAudioPipeline(
        vae, t5_text(), StableAudioProjectionModel(32, 8, 0, 32), tokenizer, transformer,
        EDMDPMSolverMultistepScheduler(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    # Its own, which diffusers makes only where torchsde is installed.
    name = "CosineDPMSolverMultistepScheduler"
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", name]})
    )
    config = {
        "_class_name": name, "prediction_type": "v_prediction", "sigma_data": 1.0,
        "sigma_max": 500, "sigma_min": 0.3, "sigma_schedule": "exponential",
    }  # fmt: skip
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return str(folder)
