"""Answered samples in the run directory, for whoever has no W&B: ``samples/<name>-<step>/`` with
``index.html``, ``samples.jsonl`` and the media, of the last few validations. ``val`` are those of
training, ``validate`` and ``test`` of the commands.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from mmfusion.training.callbacks.table import Answered
from mmfusion.types import Media

FOLDER = "samples"
KEPT = 5
"""Validations whose samples stay."""
MAX_BYTES = 8 * 2**20
"""Of a medium that is kept."""


@dataclass(frozen=True)
class SamplePages:
    """The pages of a run, written by one process.

    Args:
        run: the run directory.
        name: how the names of its folders begin.
        step: of the weights; None is the trainer's.
    """

    run: Path
    name: str
    step: int | None = None

    def write(self, rows: Sequence[Answered], trainer_step: int) -> Path:
        """Write rows; the oldest pages of the name beyond ``KEPT`` are removed."""
        step = trainer_step if self.step is None else self.step
        folder = self.run / FOLDER
        page = write_page(folder / f"{self.name}-{step:08d}", rows)
        for old in sorted(folder.glob(f"{self.name}-*"))[:-KEPT]:
            if old != page.parent:
                shutil.rmtree(old)
        return page


def write_page(folder: Path, rows: Sequence[Answered]) -> Path:
    """Write rows and their media into a folder, whole or not at all; what was there is replaced."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    written = [_write(aside, number, row) for number, row in enumerate(rows)]
    lines = "".join(json.dumps(row) + "\n" for row in written)
    (aside / "samples.jsonl").write_text(lines, encoding="utf-8")
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True)
    page = environment.get_template("samples.html.jinja").render(title=folder.name, rows=written)
    (aside / "index.html").write_text(page, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return folder / "index.html"


def _write(folder: Path, number: int, row: Answered) -> dict[str, Any]:
    """A row as JSON; its media are files beside."""
    kinds = {"media": row.media, "made": row.made, "wanted": row.wanted}
    return {
        "source": row.source,
        "prompt": row.prompt,
        "answer": row.answer,
        "truth": row.truth,
        "spoken": row.spoken,
        "truth_spoken": row.truth_spoken,
        "undrawn": list(row.undrawn),
        **{
            kind: [_keep(folder, f"{number:04d}-{kind}-{i}", item) for i, item in enumerate(items)]
            for kind, items in kinds.items()
        },
    }


def _keep(folder: Path, name: str, media: Media) -> dict[str, Any]:
    # A format comes from data, and must not become a path.
    file = f"{name}.{re.sub('[^a-z0-9]', '', media.format)[:8] or 'bin'}"
    lacking = "too large" if len(media.data) > MAX_BYTES else ""
    if not media.data:
        lacking = "features took its place"
    if not lacking:
        (folder / file).write_bytes(media.data)
    start, end = media.start, media.end
    span = "" if start is None and end is None else f"#t={start or 0}"
    return {
        "modality": media.modality,
        "file": None if lacking else file,
        "lacking": lacking,
        "span": f"{span},{end}" if end is not None else span,
        "caption": media.caption,
    }
