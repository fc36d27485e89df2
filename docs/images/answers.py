"""Draws docs/images/answers.png: what a run made when it was asked in new words.

python docs/images/answers.py runs/quickstart/any_to_any
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from mmfusion.inference import load
from mmfusion.processing.images import decode_image
from mmfusion.processing.videos import decode_video
from mmfusion.tools.quickstart.heldout import read_held_out, text_of
from mmfusion.tools.quickstart.judges import SoundJudge
from mmfusion.tools.quickstart.measure import data_of
from mmfusion.tools.quickstart.measure_media import SAMPLING
from mmfusion.types import Media

SHOWN, FRAMES = {"image": 8, "audio": 4, "video": 4}, 5
PER_ROW = {"image": 8, "audio": 4, "video": 2}


def panel(medium: Media) -> np.ndarray:
    """A picture, five frames of a clip side by side, or the mel frames of a sound."""
    if medium.modality == "image":
        return decode_image(medium.data, medium.format).permute(1, 2, 0).numpy()
    if medium.modality == "video":
        frames = decode_video(medium.data, medium.format, fps=4.5, max_frames=9).numpy()
        chosen = frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]
        return np.concatenate(list(chosen.transpose(0, 2, 3, 1)), axis=1)
    mel = SoundJudge("").processor()(medium)["mel"].numpy()
    return mel.T[::-1]


def main(run: Path) -> None:
    """Ask, in the order of the held-out requests, and draw what is made."""
    chat = load(run)
    sources = data_of(run).val_sources
    items = [
        item
        for name, source in sources.items()
        if name.endswith("_requests")
        for item in read_held_out(source)
    ]
    figure = plt.figure(figsize=(12, 7))
    rows = sum(SHOWN[name] // PER_ROW[name] for name in SHOWN)
    grid, row = figure.add_gridspec(rows, 8, hspace=0.5), 0
    for modality, count in SHOWN.items():
        asked = [item for item in items if item.about["modality"] == modality]
        chosen = asked[:: len(asked) // count][:count]
        prompts: Any = [list(item.sample.messages[:1]) for item in chosen]
        answers = chat.generate(prompts, max_new_tokens=40, sampling=SAMPLING)
        wide = 8 // PER_ROW[modality]
        for number, (item, answer) in enumerate(zip(chosen, answers, strict=True)):
            at = number % PER_ROW[modality] * wide
            axes = figure.add_subplot(grid[row + number // PER_ROW[modality], at : at + wide])
            axes.set_title(textwrap.fill(text_of(item.sample.messages[0]), 22 * wide), fontsize=7)
            axes.axis("off")
            if answer.media:
                aspect: Any = "auto" if modality == "audio" else "equal"
                axes.imshow(panel(answer.media[0]), aspect=aspect)
        row += count // PER_ROW[modality]
    figure.savefig(Path(__file__).with_name("answers.png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
