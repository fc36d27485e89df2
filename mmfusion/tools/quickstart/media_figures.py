"""The figures of the run that answers with media: measured once, kept, printed, and a page about
them with what was asked, made and true.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfusion.tools.quickstart.figures import (
    BOUNDS_OF_SMALL,
    HELD_OUT,
    QUESTIONS,
    newest_checkpoint,
    peak_memory,
    print_rows,
    read_columns,
    training_figures,
)
from mmfusion.tools.quickstart.intervals import Estimate
from mmfusion.tools.quickstart.judges import SmallJudge
from mmfusion.tools.quickstart.measure_media import Said, Sizes, measure_media
from mmfusion.tools.quickstart.report import Shown, render, validations
from mmfusion.types import Media, Text

SIZES = {
    False: Sizes(96, QUESTIONS[False], HELD_OUT[False]),
    True: Sizes(6, 30, HELD_OUT[True] // 2),
}
"""By ``small``."""

SHOWN = 8
"""Answers on the page, of each kind."""

NAMES = {"image": "picture", "audio": "sound", "video": "clip"}
ASPECTS = {"image": "right color and shape", "audio": "right sound", "video": "right motion"}
NEW_WORDS = (
    "Requests are put in words that no request of training has. Pictures and sounds are of the "
    "colored shapes and the kinds of sounds of training, but other ones; who moves how in a clip "
    "was never shown together in training. Questions about what is seen and heard are of concepts "
    "that never occur in training."
)
"""Of what the figures are."""
UNDERSTANDING = {
    "shapes": "questions about shapes: exact match",
    "stamps": "stamps: right one of 8 captions",
    "motions": "clips: right one of 8 motions",
}


def measure_and_report(
    run: Path,
    stages: Mapping[str, Path],
    judges: Mapping[str, SmallJudge],
    seconds: Mapping[str, float],
    small: bool,
) -> None:
    """Measure a finished run, unless that was done for the same checkpoints; print the figures.

    Args:
        run: that answers with media.
        stages: ``stage 1``, the understanding run this one began from, ``before``, and ``stage 2``.
        judges: one for each modality, built.
        seconds: that the steps so far took.
        small: a few samples of each.
    """
    runs = {"run": run, "before": stages["before"]}
    key: dict[str, Any] = {name: newest_checkpoint(folder) for name, folder in runs.items()}
    key["small"] = small
    key["judges"] = {
        name: hashlib.sha256(Path(judge.path).read_bytes()).hexdigest()
        for name, judge in judges.items()
    }
    file = run / "figures.json"
    if not file.exists() or json.loads(file.read_text())["checkpoints"] != key:
        figures, said = measure_media(run, stages, judges, SIZES[small])
        curves = {"stage 2": stages["stage 2"], "last stage": run}
        training = {name: training_figures(folder) for name, folder in curves.items()}
        figures |= {"checkpoints": key, "training": training, "memory_gib": peak_memory()}
        text = json.dumps(figures, indent=1, default=Estimate.as_dict)
        page = render(
            run=run,
            figures=json.loads(text),
            seconds=dict(seconds),
            curves={
                name: read_columns(folder / "metrics.csv")["train/loss"]
                for name, folder in curves.items()
            },
            shown=list(shown(said)),
            validations=validations(run),
            table=rows(json.loads(text)),
            held_out=NEW_WORDS,
            other=("What it understands", os.path.relpath(stages["before"] / "report.html", run)),
        )
        (run / "report.html").write_text(page, encoding="utf-8")
        file.write_text(text)
    print_rows(list(rows(json.loads(file.read_text()))), small)
    if small:
        print(f"   {BOUNDS_OF_SMALL}")
    print(f"   page: {run / 'report.html'}")


def rows(figures: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(what, figure, unit) of every line of the table."""
    for modality, name in NAMES.items():
        yield (
            f"{name}s asked for in new words: {ASPECTS[modality]}",
            _of(figures, "right", modality),
            "share",
        )
        yield f"  the judge on true {name}s", _of(figures, "judges", modality), "share"
        if modality in figures["remade"]:
            yield (
                f"{name}s asked for by another: {ASPECTS[modality]}",
                _of(figures, "remade", modality),
                "share",
            )
    yield "media or words, as is asked: F1", figures["emission"], "share"
    for modality, name in NAMES.items():
        found = figures["denoising"][modality]
        for kind, what in (
            ("ours", "our conditioning"),
            ("caption", "the caption's"),
            ("empty", "that of \u201c\u201d"),
        ):
            yield f"{name}s: denoising loss under {what}", found[kind], "loss"
        yield f"{name}s: share of the caption's gain", found["gain"], "share"
    for name, found in figures["understanding"].items():
        for when in ("before", "after", "change"):
            yield f"{UNDERSTANDING[name]}: {when}", found[when], "share"


def _of(figures: dict[str, Any], kind: str, modality: str) -> dict[str, Any]:
    return dict(figures[kind][modality])


def shown(said: Sequence[Said]) -> Iterator[Shown]:
    """The first few answers of each kind."""
    left: dict[str, int] = defaultdict(lambda: SHOWN)
    for one in said:
        source = one.item.about["source"]
        if not left[source]:
            continue
        left[source] -= 1
        asked, truth = one.item.sample.messages[:2]
        yield Shown(
            source,
            tuple(p for p in asked.content if isinstance(p, Media)),
            "".join(p.text for p in asked.content if isinstance(p, Text)).strip(),
            str(one.answer),
            "".join(p.text for p in truth.content if isinstance(p, Text)).strip(),
            made=tuple(one.answer.media),
            wanted=tuple(p for p in truth.content if isinstance(p, Media)),
        )
