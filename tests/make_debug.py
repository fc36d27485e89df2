"""Makes what ``recipes/debug.yaml`` trains on: a random LLaMA, a random CLIP, coloured squares.

``python -m tests.make_debug`` writes them below ``$MMFUSION_CACHE/debug``.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from mmfusion.data.writer import ShardWriter
from mmfusion.paths import cache_dir
from tests.models.tiny import save_clip, save_llm

COLOURS = ["red", "green", "blue", "yellow", "black", "white", "magenta", "cyan"]


def make_debug(folder: Path) -> None:
    """Write the two models and the shards; what is there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    save_llm(folder / "llm", initializer_range=0.02)
    save_clip(folder / "clip")
    for name, count in (("train", 64), ("val", 16)):
        with ShardWriter(str(folder / f"{name}-%06d.tar"), overwrite=True) as writer:
            for i in range(count):
                colour = i % len(COLOURS)
                png = io.BytesIO()
                Image.new("RGB", (16 + i // 8, 16), COLOURS[colour]).save(png, "PNG")
                caption = f"w{colour}".encode()
                writer.write(f"{name}{i:04d}", {"png": png.getvalue(), "txt": caption})


if __name__ == "__main__":
    make_debug(cache_dir() / "debug")
