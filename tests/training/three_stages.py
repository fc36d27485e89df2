"""Recipes of all three stages with tiny parts: a model that sees pictures of one colour, names
them, and answers with such pictures and with tones.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from mmfusion.data.writer import ShardWriter
from tests.models.generators.tiny import save_stable_diffusion
from tests.models.generators.tiny_sound import save_audio_ldm
from tests.models.tiny import save_clip
from tests.training.pictures import LORA, NEXT_TOKEN, OUTPUT, SMALL, objective
from tests.training.tiny import write_recipe

COLORS = {"w1": (220, 30, 30), "w2": (30, 200, 40), "w3": (40, 60, 230)}
CAPTIONS = {"w1": "a", "w2": "b", "w3": "c"}
"""Of the tones: their generator knows letters."""
NAME_IT, DRAW, REDRAW, PLAY = "w31", "w32", "w33", "w34"
"""What is asked for: the word of a picture, a picture of a word, one like this, a tone of a word"""
RATES = {"input_projectors": 2e-3, "output_projectors": 4e-3, "llm": 1e-2}


def full(part: str) -> dict[str, Any]:
    return {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": RATES[part]}}


def rows(**options: Any) -> dict[str, Any]:
    return {"class_path": "mmfusion.tuning.NewTokens", "init_args": {"lr": 3e-2, **options}}


def picture(word: str) -> bytes:
    """A picture of the colour that a word stands for."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), COLORS[word]).save(file, "png")
    return file.getvalue()


def tone(word: str) -> bytes:
    """A tone of the pitch that a word stands for, of a quarter of a second."""
    file = io.BytesIO()
    pitch = 300 * (1 + list(COLORS).index(word))
    soundfile.write(file, 0.4 * np.sin(np.arange(1024) * 2 * np.pi * pitch / 4000), 4000, "PCM_16",
                    format="WAV")  # fmt: skip
    return file.getvalue()


def prepare(folder: Path) -> Path:
    """Generators, encoder, and shards: captioned pictures, requests, talks of all kinds."""
    save_stable_diffusion(folder / "sd")
    save_audio_ldm(folder / "ldm")
    save_clip(folder / "clip")
    with ShardWriter(str(folder / "pairs-%06d.tar")) as writer:
        for word in COLORS:
            writer.write(word, {"png": picture(word), "txt": word.encode()})
    for name, asks in {"tones": [PLAY], "talks": [NAME_IT, DRAW, REDRAW, PLAY]}.items():
        with ShardWriter(str(folder / f"{name}-%06d.tar")) as writer:
            for ask in asks:
                for word in COLORS:
                    writer.write(f"{ask}{word}", talk(word, ask))
    return folder


def talk(word: str, ask: str) -> dict[str, bytes]:
    """A record in which one thing is asked for."""
    shown: list[dict[str, str]] = []
    record: dict[str, bytes] = {}
    if ask in (NAME_IT, REDRAW):
        shown, record["0.png"] = [{"type": "image", "image": "0.png"}], picture(word)
    request = f" {ask} {word}" if ask in (DRAW, PLAY) else f" {ask}"
    answer: Any = word
    if ask in (DRAW, REDRAW):
        answer = [{"type": "image", "image": "1.png", "caption": word}]
        record["1.png"] = picture(word)
    if ask == PLAY:
        answer = [{"type": "audio", "audio": "1.wav", "caption": CAPTIONS[word]}]
        record["1.wav"] = tone(word)
    turns = [
        {"role": "user", "content": [*shown, {"type": "text", "text": request}]},
        {"role": "assistant", "content": answer},
    ]
    return {**record, "json": json.dumps({"messages": turns}).encode()}


def converter(name: str, **options: Any) -> dict[str, Any]:
    file = {"Caption": "caption", "TextToMedia": "text_to_media", "Conversation": "conversation"}
    path = f"mmfusion.data.converters.{file[name]}.{name}"
    return {"class_path": path, "init_args": options}


def sources(home: Path, **converters: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {"shards": f"{home}/{name}-*.tar", "converter": made}
        for name, made in converters.items()
    }


def parts(home: Path, output: bool = True) -> dict[str, Any]:
    """The model's parts and losses, with or without the output side."""
    vision = {
        "class_path": "mmfusion.models.encoders.hf_vision.HFVision",
        "init_args": {"path": f"{home}/clip"},
    }
    mlp = {"class_path": "mmfusion.models.projectors.mlp.MLP", "init_args": {"depth": 2}}
    found: dict[str, Any] = {
        "model__encoders": {"image": vision},
        "model__input_projectors": {"image": mlp},
    }
    if not output:
        return found
    pictures = {
        "class_path": "mmfusion.models.generators.stable_diffusion.StableDiffusion",
        "init_args": {"path": f"{home}/sd"},
    }
    sounds = {
        "class_path": "mmfusion.models.generators.audio_ldm.AudioLDM",
        "init_args": {"path": f"{home}/ldm", "window": 128},
    }
    tiny = {"class_path": OUTPUT, "init_args": SMALL}
    # The encodings of a random text encoder hardly differ.
    apart = {"distance": "cosine", "contrastive": 0.2, "temperature": 0.002}
    return found | {
        "model__signal_tokens": {"image": 3, "audio": 2},
        "model__output_projectors": {"image": tiny, "audio": tiny},
        "model__generators": {"image": pictures, "audio": sounds},
        "model__objectives": {
            "next_token": NEXT_TOKEN,
            "align_image": objective("align", **apart),
            "align_audio": objective("align", modality="audio", distance="cosine"),
        },
    }


def stage_1(home: Path, **changes: Any) -> Path:
    """Align the input: the projector learns to name what is seen."""
    defaults = {
        **parts(home, output=False),
        "run_dir": f"{home}/stage1",
        "model__tuning": {"input_projectors": full("input_projectors")},
        "data__sources": sources(home, pairs=converter("Caption")),
        "trainer__max_steps": 16,
    }
    return write_recipe(home, **defaults | changes)


def stage_2(home: Path, **changes: Any) -> Path:
    """Align the output: projectors and signal tokens learn to make what is asked for in words."""
    draw = converter("TextToMedia", prompts={"image": [f"{DRAW} {{caption}}"]})
    defaults = {
        **parts(home),
        "run_dir": f"{home}/stage2",
        "model__tuning": {"output_projectors": full("output_projectors"), "llm": rows()},
        "model__objectives__denoise": objective("denoise", weight=0.5, min_snr=5.0),
        "model__init_from": f"{home}/stage1",
        "data__sources": sources(home, pairs=draw, tones=converter("Conversation")),
        "trainer__max_steps": 16,
    }
    return write_recipe(home, **defaults | changes)


def stage_3(home: Path, **changes: Any) -> Path:
    """Instruct: projectors and LoRA learn to answer in words or with media, as asked."""
    defaults = {
        **parts(home),
        "run_dir": f"{home}/stage3",
        "model__tuning": {
            "input_projectors": full("input_projectors"),
            "output_projectors": full("output_projectors"),
            "llm": [LORA, rows(train=False)],
        },
        "model__init_from": f"{home}/stage2",
        "data__sources": sources(home, talks=converter("Conversation")),
        "data__packs_per_step": 2,
        "trainer__max_steps": 40,
    }
    return write_recipe(home, **defaults | changes)
