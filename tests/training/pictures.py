"""Tiny stages of a model that answers with pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mmfusion.data.writer import ShardWriter
from tests.models.generators.tiny import save_stable_diffusion
from tests.models.tiny import save_llm
from tests.training.tiny import write_recipe

OUTPUT = "mmfusion.models.output_projectors.query_decoder.QueryDecoder"
SMALL = {"dim": 16, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn_dim": 32}
PARTS = {
    "model__encoders": {},
    "model__input_projectors": {},
    "model__signal_tokens": {"image": 3},
    "model__output_projectors": {"image": {"class_path": OUTPUT, "init_args": SMALL}},
}
FULL = {"class_path": "mmfusion.tuning.Full", "init_args": {"lr": 3e-3}}
NEW = {"class_path": "mmfusion.tuning.NewTokens", "init_args": {"lr": 3e-2}}
LORA = {"class_path": "mmfusion.tuning.LoRA", "init_args": {"r": 2, "lr": 1e-2}}
NEXT_TOKEN = {"class_path": "mmfusion.objectives.next_token.NextToken"}


def objective(name: str, **options: object) -> dict[str, object]:
    """Of a recipe: ``align`` or ``denoise``."""
    path = {"align": "condition_alignment.ConditionAlignment", "denoise": "denoising.Denoising"}
    options = {"modality": "image", **options}
    return {"class_path": f"mmfusion.objectives.{path[name]}", "init_args": options}


OBJECTIVES = {
    "next_token": NEXT_TOKEN,
    "align": objective("align"),
    "denoise": objective("denoise", drop_condition=0.1, min_snr=5.0),
}


def prepare(folder: Path) -> Path:
    """A tiny Stable Diffusion and 40 pairs of words and pictures of one colour."""
    save_stable_diffusion(folder / "sd")
    draw = np.random.default_rng(0)
    with ShardWriter(str(folder / "pairs-%06d.tar")) as writer:
        for i in range(40):
            picture = np.broadcast_to(draw.integers(0, 255, 3, np.uint8), (16, 16, 3))
            file = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(picture)).save(file, "png")
            words = f"w{draw.integers(30)} w{draw.integers(30)}"
            writer.write(f"{i:03d}", {"png": file.getvalue(), "txt": words.encode()})
    return folder


def recipe(home: Path, **changes: object) -> Path:
    """Stage 2 of a model that answers with pictures of 16 pixels, beside answers of words."""
    converter = {
        "class_path": "mmfusion.data.converters.text_to_media.TextToMedia",
        "init_args": {"prompts": {"image": ["w31 {caption}", "w32 {caption}"]}},
    }
    source = {"shards": f"{home}/pairs-*.tar", "converter": converter}
    words = {
        "shards": f"{home}/words-*.tar",
        "converter": {"class_path": "tests.training.tiny.TinyConverter"},
    }
    generator = {
        "class_path": "mmfusion.models.generators.stable_diffusion.StableDiffusion",
        "init_args": {"path": f"{home}/sd"},
    }
    defaults = {
        **PARTS,
        "model__generators": {"image": generator},
        "model__objectives": OBJECTIVES,
        "model__tuning": {"output_projectors": FULL, "llm": NEW},
        "data__sources": {"pairs": source, "words": words},
        "trainer__max_steps": 12,
    }
    return write_recipe(home, **defaults | changes)


def aligned_rows(home: Path, **changes: object) -> Path:
    """A recipe in whose steps a rank may have no picture to make: alignment alone trains the rows
    of new tokens, which the output head shares.
    """
    save_llm(home / "tied", tie_word_embeddings=True)
    return recipe(
        home,
        trainer__max_steps=6,
        model__llm__init_args__path=f"{home}/tied",
        model__objectives={"align": objective("align")},
        data__pack_tokens=24,
        data__packs_per_step=2,
        data__sources__words__weight=3,
        **changes,
    )
