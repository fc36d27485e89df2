"""The README's pictures of losses, of a run of the quickstart: of the understanding stages, and of
those after them where there are any.

python docs/images/quickstart_loss.py runs/quickstart
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmfusion.tools.quickstart.figures import read_columns
from mmfusion.tools.quickstart.report import smooth

FEWEST = 40
"""Sources that are in fewer steps have no curve."""


def by_source(column: str) -> str | None:
    """The source whose loss of the next token it is."""
    source = column.removeprefix("train/next_token/")
    return None if source == column else source


def by_objective(column: str) -> str | None:
    """The objective whose loss it is."""
    stem, _, name = column.partition("/")
    named = name.startswith(("align_", "denoise_")) or name == "next_token"
    return name if stem == "train" and named and "/" not in name else None


def draw(axes: Axes, title: str, run: Path, named: Callable[[str], str | None]) -> None:
    """Each loss, smoothed, and what it is in validations, which leave its weight out."""
    objectives = yaml.safe_load((run / "config.yaml").read_text())["model"]["objectives"]
    weights = {name: one["init_args"].get("weight", 1) for name, one in objectives.items()}
    columns = read_columns(run / "metrics.csv")
    for column, points in columns.items():
        name = named(column)
        if name is None or len(points) < FEWEST:
            continue
        steps, losses = zip(*points, strict=True)
        plain = [loss / weights.get(name, 1) for loss in smooth(losses)]
        (line,) = axes.plot(steps, plain, label=name, linewidth=1.4)
        if found := columns.get(column.replace("train/", "val/", 1)):
            axes.plot(*zip(*found, strict=True), "o", color=line.get_color(), markersize=5)
    axes.plot([], [], "o", color="gray", label="on held-out samples")
    axes.set(title=title, xlabel="optimizer step")
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2, loc="upper right")


def picture(
    file: str, ylabel: str, stages: dict[str, Path], named: Callable[[str], str | None]
) -> None:
    """Two stages side by side, where the second one has been run."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=100)
    for axes, (title, run) in zip(figure.subplots(1, 2), stages.items(), strict=True):
        draw(axes, title, run, named)
    figure.axes[0].set_ylabel(ylabel)
    figure.savefig(Path(__file__).with_name(file))


if __name__ == "__main__":
    run = Path(sys.argv[1])
    first = {"stage 1: captions": run / "1_align_input", "stage 3: conversations": run}
    picture("quickstart_loss.png", "loss per supervised token (nats)", first, by_source)
    last = {
        "stage 2: signal tokens": run / "2_align_output",
        "last stage: any to any": run / "any_to_any",
    }
    if all((stage / "metrics.csv").is_file() for stage in last.values()):
        picture("answers_loss.png", "loss", last, by_objective)
