"""The figures of a quickstart run: measured once, kept in ``figures.json``, and as a table."""

from __future__ import annotations

import json
import resource
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmfusion.tools.quickstart.intervals import Estimate
from mmfusion.training.loggers import STEP, read_metrics

HELD_OUT = {False: 240, True: 48}
QUESTIONS = {False: 600, True: 60}
"""Samples of a data set and questions about shapes that are measured, by ``small``."""

BOUNDS_OF_SMALL = "The bounds are the whole quickstart's; --small is too short to reach them."

UNITS = {"share": "%", "nats": "nats", "loss": ""}
TITLES = {"pictures": "pictures", "speech": "speech", "motions": "clips of motions"}


def measure_run(run: Path, stage1: Path, no_media: Path | None, small: bool) -> dict[str, Any]:
    """Measure a finished run, unless that was done for the same checkpoints."""
    from mmfusion.tools.quickstart.measure import measure_answers, measure_captions

    runs = {"stage 1": stage1, "stage 3": run, **({"no media": no_media} if no_media else {})}
    key: dict[str, Any] = {name: newest_checkpoint(folder) for name, folder in runs.items()}
    key["small"] = small
    file = run / "figures.json"
    if file.exists() and (known := json.loads(file.read_text()))["checkpoints"] == key:
        return known
    training = {name: training_figures(folder) for name, folder in runs.items()}
    peaks = [found.get("throughput/rss_peak_gib", 0.0) for found in training.values()]
    figures = {
        "checkpoints": key,
        "captions": measure_captions(stage1, no_media, HELD_OUT[small]),
        "shapes": measure_answers(run, QUESTIONS[small]),
        "training": training,
        "memory_gib": max(peak_memory(), *peaks),
    }
    text = json.dumps(figures, indent=1, default=Estimate.as_dict)
    file.write_text(text)
    return json.loads(text)


def newest_checkpoint(run: Path) -> str:
    """Its name and when it was written: a run that was started over has others of the same name."""
    name = (run / "checkpoints" / "latest").read_text().strip()
    return f"{name} {(run / 'checkpoints' / name).stat().st_mtime_ns}"


def training_figures(run: Path) -> dict[str, float]:
    """Steps, last losses, speed and memory of a run, from its ``metrics.csv``."""
    columns = read_columns(run / "metrics.csv")
    found: dict[str, float] = {
        "steps": max((step for step, _ in columns["train/loss"]), default=-1) + 1
    }
    for name, column in columns.items():
        values = [value for _, value in column]
        if name.startswith("throughput/"):
            found[name] = max(values) if "peak" in name else statistics.median(values)
    return found


def read_columns(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Column of a ``metrics.csv`` -> (step, value) pairs."""
    columns: dict[str, list[tuple[int, float]]] = {"train/loss": []}
    for row in read_metrics(file):
        for name, value in row.items():
            if not name.startswith("trainer/"):
                columns.setdefault(name, []).append((int(row[STEP]), value))
    return columns


def peak_memory() -> float:
    """GiB of the largest process so far: this one or one it waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit / 2**30


def rows(figures: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(what, figure, unit) of every line of the table."""
    for name, found in figures["captions"].items():
        title = f"{TITLES[name]} ({found['samples']} samples, {found['concepts']} concepts)"
        for kind in ("right", "strangers", "blank", "no-media run"):
            if kind in found["loss"]:
                yield (
                    f"{title}: loss, {kind} media".replace("run media", "run"),
                    found["loss"][kind],
                    "nats",
                )
        for kind in ("over strangers", "over blank", "over no-media run"):
            if kind in found["gain"]:
                yield f"{title}: gain {kind}", found["gain"][kind], "nats"
        for source, choice in found["choice"].items():
            yield f"{source}: right one of 8 captions (chance 12.5 %)", choice, "share"
        if "motion choice" in found:
            yield "clips: right one of 8 motions (chance 12.5 %)", found["motion choice"], "share"
    shapes = figures["shapes"]
    for kind in ("exact match", "question only", "majority"):
        yield f"shapes ({shapes['questions']} questions): {kind}", shapes[kind], "share"


def print_figures(figures: dict[str, Any]) -> None:
    """The table of the understanding run."""
    print_rows(list(rows(figures)), figures["checkpoints"]["small"])
    if "no media" not in figures["training"]:
        print("   (`--with-baselines` adds the fair comparison: the same stage without media)")


def print_rows(table: Sequence[tuple[str, dict[str, Any], str]], small: bool) -> None:
    """A table, with 95 % intervals and the bounds; a small run's misses are no verdicts."""
    width = max(len(what) for what, _, _ in table)
    for what, figure, unit in table:
        scale, form = (100, ".1f") if unit == "share" else (1, ".2f")
        value, low, high = (format(scale * figure[k], form) for k in ("value", "low", "high"))
        bound = ""
        if figure["bound"] is not None:
            verdict = ": reached" if figure["reached"] else ": NOT REACHED"
            quiet = small and not figure["reached"]
            bound = f"  at least {format(scale * figure['bound'], form)}{'' if quiet else verdict}"
        interval = f"[{low}, {high}] {UNITS[unit]}"
        print(f"   {what:<{width}} {value:>6} {interval:<17}{bound}".rstrip())
