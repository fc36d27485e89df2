"""Fills a cache with what a recipe names: at every ``path`` of a part a tiny random model of that
class, at every ``shards`` a tiny shard of the committed media. The recipe itself stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmfusion.data.writer import ShardWriter
from mmfusion.paths import expand
from tests.models.generators.tiny import save_stable_diffusion, save_text_to_video_sd, save_wan
from tests.models.generators.tiny_sound import save_audio_ldm
from tests.models.tiny import save_clip, save_llm

ASSETS = Path(__file__).parents[1] / "assets"
MEDIA = {"image": ("picture", "jpg"), "audio": ("speech", "ogg"), "video": ("video", "mp4")}
"""For each modality, its key in the committed manifest and its extension."""


def save_efficientnet(folder: Path) -> None:
    """EfficientNet-Lite0 at random weights."""
    from efficientnet_lite_pytorch import EfficientNet

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_file(
        EfficientNet.from_name("efficientnet-lite0").state_dict(), folder / "model.safetensors"
    )


def save_whisper(folder: Path) -> None:
    """A random Whisper encoder of two narrow layers."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
    )
    torch.manual_seed(0)
    WhisperEncoder(config).save_pretrained(folder)


def save_voice(path: Path) -> None:
    """What training looks at of a Piper voice: its configuration."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    config = {"audio": {}, "espeak": {"voice": "en"}, "inference": {}, "phoneme_id_map": {}}
    Path(f"{path}.json").write_text(json.dumps(config))


MAKERS = {
    "EfficientNetLite": save_efficientnet,
    "EfficientNetLiteVideo": save_efficientnet,
    "WhisperEncoder": save_whisper,
    "HFVision": save_clip,
    "HFCausalLM": save_llm,
    "StableDiffusion": save_stable_diffusion,
    "TextToVideoSD": save_text_to_video_sd,
    "Wan": save_wan,
    "AudioLDM": save_audio_ldm,
    "Piper": save_voice,
}
"""What stands in for the weights of each class. A recipe with a new class needs a line here."""


def encoders(folder: Path) -> dict[str, Any]:
    """The ``model.encoders`` of a recipe: those of the quickstart, small, at random weights."""
    net, whisper = folder / "efficientnet", folder / "whisper"
    here = "mmfusion.models.encoders"
    small = {"path": str(net), "grid": 1, "image_size": 64}
    made = {
        "image": {"class_path": f"{here}.efficientnet.EfficientNetLite", "init_args": small},
        "video": {
            "class_path": f"{here}.efficientnet.EfficientNetLiteVideo",
            "init_args": {**small, "frames": 2},
        },
        "audio": {
            "class_path": f"{here}.whisper.WhisperEncoder",
            "init_args": {"path": str(whisper), "pool": 20, "silence_seconds": 0.0},
        },
    }
    fill({"model": {"encoders": made}})
    return made


def fill(recipe: Mapping[str, Any], samples: int = 6) -> None:
    """Make the parts and the shards that a recipe names and that are not there yet."""
    for part in _with_key(recipe.get("model", {}), "class_path"):
        path = part.get("init_args", {}).get("path")
        if path is not None and not Path(expand(path)).exists():
            MAKERS[part["class_path"].rsplit(".", 1)[-1]](Path(expand(path)))
    reads, makes = (list(recipe.get("model", {}).get(k) or ()) for k in ("encoders", "generators"))
    for source in _with_key(recipe.get("data", {}), "shards"):
        kind = source["converter"]["class_path"].rsplit(".", 1)[-1]
        shards = source["shards"]
        for pattern in [shards] if isinstance(shards, str) else shards:
            path = Path(expand(pattern))
            if not list(path.parent.glob(path.name)):
                write_shard(str(path).replace("*", "%06d"), kind, reads, samples, makes)


def write_shard(
    pattern: str, converter: str, reads: list[str], samples: int, makes: Sequence[str] = ()
) -> None:
    """A shard for this converter whose samples show the modalities in turn.

    Args:
        pattern: of its path.
        converter: name of its class.
        reads: modalities that the model reads.
        samples: how many.
        makes: modalities that it makes.
    """
    with (ASSETS / "manifest.json").open() as file:
        entries = [entry for entry in json.load(file) if all(k in entry for k, _ in MEDIA.values())]
    with ShardWriter(pattern) as writer:
        for number, entry in enumerate(entries[:samples]):
            record = RECORDS[converter](number, reads, makes, entry)
            writer.write(f"{number:04d}", record)


def _medium(entry: Mapping[str, str], modality: str, place: str = "") -> dict[str, bytes]:
    key, extension = MEDIA[modality]
    return {place + extension: (ASSETS / entry[key]).read_bytes()}


def _caption(
    number: int, reads: Sequence[str], makes: Sequence[str], entry: Mapping[str, str]
) -> dict[str, bytes]:
    shown = reads[number % len(reads)]
    return {**_medium(entry, shown), "txt": entry["caption"].encode()}


def _pair(
    number: int, reads: Sequence[str], makes: Sequence[str], entry: Mapping[str, str]
) -> dict[str, bytes]:
    return _caption(number, makes, (), entry)


def _words(
    number: int, reads: Sequence[str], makes: Sequence[str], entry: Mapping[str, str]
) -> dict[str, bytes]:
    return {"txt": entry["caption"].encode()}


def _conversation(
    number: int, reads: Sequence[str], makes: Sequence[str], entry: Mapping[str, str]
) -> dict[str, bytes]:
    """In turn: a question about a medium, a medium from words, a medium from a medium."""
    ask = (number + number // len(reads)) % 3 if makes else 0
    seen, made = reads[number % len(reads)], makes[number % len(makes)] if makes else ""
    record = {} if ask == 1 else _medium(entry, seen, "0.")
    answer: Any = entry["caption"]
    if ask:
        record |= _medium(entry, made, "1.")
        name = f"1.{MEDIA[made][1]}"
        answer = [{"type": made, made: name, "caption": answer}, {"type": "text", "text": "Here."}]
    turns = [
        {"role": "user", "content": "Show me." if ask == 1 else f"<{seen}> What is it?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Are you sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    return {**record, "json": json.dumps({"messages": turns}).encode()}


RECORDS = {
    "Caption": _caption,
    "Conversation": _conversation,
    "TextToMedia": _pair,
    "TextToSpeech": _words,
}
"""A record for each converter. A recipe with a new one needs a line here."""


def _with_key(value: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """Every mapping inside ``value`` that has this key."""
    if isinstance(value, Mapping):
        if key in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _with_key(item, key)
