"""The README's picture of losses, of a run of the quickstart.

python docs/images/quickstart_loss.py runs/quickstart
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmfusion.tools.quickstart.figures import read_columns
from mmfusion.tools.quickstart.report import smooth

LOSS, FEWEST = "train/next_token/", 40
"""Sources that are in fewer steps have no curve."""


def draw(axes: Axes, title: str, run: Path) -> None:
    """The loss of each source, smoothed, and the losses of validations."""
    columns = read_columns(run / "metrics.csv")
    for name, points in columns.items():
        source = name.removeprefix(LOSS)
        if source == name or len(points) < FEWEST:
            continue
        steps, losses = zip(*points, strict=True)
        (line,) = axes.plot(steps, smooth(losses), label=source, linewidth=1.4)
        if found := columns.get(f"val/next_token/{source}"):
            axes.plot(*zip(*found, strict=True), "o", color=line.get_color(), markersize=5)
    axes.plot([], [], "o", color="gray", label="on held-out samples")
    axes.set(title=title, xlabel="optimizer step")
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2, loc="upper right")


if __name__ == "__main__":
    run = Path(sys.argv[1])
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2)
    draw(left, "stage 1: captions", run / "1_align_input")
    draw(right, "stage 3: conversations", run)
    left.set_ylabel("loss per supervised token (nats)")
    figure.savefig(Path(__file__).with_suffix(".png"))
