"""One self-contained HTML page about a quickstart run: curves, figures, samples with answers."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from PIL import Image

from mmfusion.tools.quickstart.figures import BOUNDS_OF_SMALL, read_columns, rows
from mmfusion.types import Media, Message

SHOWN = {
    "talks-picture": 4,
    "talks-speech": 4,
    "talks-clip": 4,
    "talks-both": 3,
    "talks-film": 2,
    "shapes": 4,
}
"""How many held-out samples of each source are shown."""

UNSEEN = (
    "Every figure is of samples whose concept never occurs in training, in any picture, recording "
    "or clip; questions about shapes are of pictures that were not trained on."
)
"""Of what the figures of the understanding run are."""
STRIP_FRAMES, STRIP_SIZE = 5, 96


@dataclass(frozen=True)
class Shown:
    """A sample as the page shows it: media of the question, words, media of answer and truth."""

    source: str
    media: tuple[Media, ...]
    question: str
    answer: str
    truth: str
    made: tuple[Media, ...] = ()
    wanted: tuple[Media, ...] = ()


def write_report(
    run: Path,
    stage1: Path,
    no_media: Path | None,
    figures: dict[str, Any],
    seconds: dict[str, float],
) -> Path:
    """Answer some held-out questions and write ``report.html`` into the run directory."""
    curves = {"stage 1": stage1, "stage 3": run, **({"no media": no_media} if no_media else {})}
    page = render(
        run=run,
        figures=figures,
        seconds=seconds,
        curves={
            name: read_columns(folder / "metrics.csv")["train/loss"]
            for name, folder in curves.items()
        },
        shown=answered(run),
        validations=validations(run),
    )
    target = run / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def answered(run: Path) -> list[Shown]:
    """Held-out questions with the model's own answers."""
    from mmfusion.inference import load
    from mmfusion.tools.quickstart.heldout import read_held_out, text_of
    from mmfusion.tools.quickstart.measure import data_of

    chosen = []
    left = dict(SHOWN)
    for source in data_of(run).val_sources.values():
        for item in read_held_out(source):
            if left.get(item.about["source"], 0):
                left[item.about["source"]] -= 1
                chosen.append(item)
    chosen.sort(key=lambda item: list(SHOWN).index(item.about["source"]))
    print(f"   report: answers to {len(chosen)} questions", flush=True)
    chat = load(run)
    asked: list[list[Message]] = [list(item.sample.messages[:1]) for item in chosen]
    answers = chat.generate(asked, max_new_tokens=32)
    return [
        Shown(
            item.about["source"],
            tuple(p for p in item.sample.messages[0].content if isinstance(p, Media)),
            text_of(item.sample.messages[0]),
            answer,
            text_of(item.sample.messages[1]),
            tuple(answer.media),
            tuple(item.sample.targets),
        )
        for item, answer in zip(chosen, answers, strict=True)
    ]


def render(
    run: Path,
    figures: dict[str, Any],
    seconds: dict[str, float],
    curves: dict[str, Sequence[tuple[int, float]]],
    shown: Sequence[Shown],
    validations: Mapping[str, Sequence[Shown]] | None = None,
    table: Iterable[tuple[str, dict[str, Any], str]] | None = None,
    held_out: str = UNSEEN,
    other: tuple[str, str] | None = None,
) -> str:
    """The page. Whatever comes from data is escaped.

    Args:
        run: that it is about.
        figures: of the run.
        seconds: that each step took.
        curves: losses by step.
        shown: held-out samples with answers.
        validations: what each made.
        table: lines of the table of figures (default: the understanding run's).
        held_out: of what the figures are.
        other: what another page is about, and its address from this one.
    """
    environment = Environment(
        loader=PackageLoader("mmfusion.tools.quickstart", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
    )
    environment.filters |= {"show": show, "play": play}
    return environment.get_template("report.html.jinja").render(
        title=run.name,
        run=shlex.quote(str(run)),
        bounds_of_small=BOUNDS_OF_SMALL if figures["checkpoints"]["small"] else "",
        rows=list(rows(figures) if table is None else table),
        captions="captions" in figures,
        held_out=held_out,
        other=other,
        training=figures["training"],
        memory=figures["memory_gib"],
        seconds=seconds,
        curves=Markup(draw_curves(curves)),
        shown=shown,
        validations=validations or {},
    )


def validations(run: Path) -> dict[str, list[Shown]]:
    """What the run kept of its validations that answers, or should answer, with media."""
    found = {}
    for file in sorted((run / "samples").glob("val-*/samples.jsonl")):
        rows = [json.loads(line) for line in file.open(encoding="utf-8")]
        items = [_kept(file.parent, row) for row in rows if row["made"] or row["wanted"]]
        if items:
            found[f"step {int(file.parent.name.removeprefix('val-'))}"] = items
    return found


def _kept(folder: Path, row: dict[str, Any]) -> Shown:
    def media(kind: str) -> tuple[Media, ...]:
        files = [(item["modality"], item["file"]) for item in row[kind] if item["file"]]
        return tuple(
            Media(modality, (folder / file).read_bytes(), Path(file).suffix[1:])
            for modality, file in files
        )

    words = (row["prompt"], row["answer"], row["truth"])
    return Shown(row["source"], media("media"), *words, media("made"), media("wanted"))


def draw_curves(curves: dict[str, Sequence[tuple[int, float]]]) -> str:
    """Loss by step as one SVG element."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(curves)), squeeze=False)[0]
    for axis, (name, points) in zip(axes, curves.items(), strict=False):
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        axis.plot(steps, losses, color="#9bb", linewidth=0.8, label="of a step")
        axis.plot(steps, smooth(losses), color="#147", linewidth=1.6, label="smoothed")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axis.legend()
        axis.set(title=name, xlabel="step", ylabel="loss (nats a token)")
        axis.grid(alpha=0.3)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def smooth(values: Sequence[float], width: float = 3.0) -> list[float]:
    """Mean of the values on both sides, with the weights of a Gaussian: it does not lag behind a
    loss that falls.

    Args:
        values: evenly spaced.
        width: standard deviation of the Gaussian, in values.
    """
    places = np.arange(len(values))
    weights = np.exp(-0.5 * ((places[:, None] - places) / width) ** 2)
    return list((weights @ np.asarray(values, float)) / weights.sum(1))


def show(media: Media) -> Markup:
    """A media item as HTML that needs no other file."""
    if media.modality == "image":
        kind = "jpeg" if media.format == "jpg" else media.format
        return Markup('<img src="{}" alt="picture">').format(_data_url(f"image/{kind}", media.data))
    if media.modality == "audio":
        url = _data_url(f"audio/{media.format}", media.data)
        return Markup('<audio controls src="{}"></audio>').format(url)
    return Markup('<img class="strip" src="{}" alt="frames">').format(
        _data_url("image/jpeg", frame_strip(media.data))
    )


def play(media: Media) -> Markup:
    """As :func:`show`; a clip is one to be played, where browsers can."""
    if media.modality == "video" and media.format in ("mp4", "webm"):
        url = _data_url(f"video/{media.format}", media.data)
        return Markup('<video controls src="{}"></video>').format(url)
    return show(media)


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def frame_strip(data: bytes) -> bytes:
    """Frames of a clip side by side, evenly spread."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    picked = [
        frames[round(i * (len(frames) - 1) / (STRIP_FRAMES - 1))] for i in range(STRIP_FRAMES)
    ]
    strip = Image.new("RGB", (STRIP_FRAMES * STRIP_SIZE, STRIP_SIZE), "white")
    for place, frame in enumerate(picked):
        strip.paste(frame.resize((STRIP_SIZE, STRIP_SIZE)), (place * STRIP_SIZE, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
