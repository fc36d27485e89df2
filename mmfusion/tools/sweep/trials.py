"""The trials of a sweep: a run directory each, and what came of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mmfusion.data.whole_file import write_whole
from mmfusion.tools.runs import standing
from mmfusion.tools.sweep.space import Space
from mmfusion.training.loggers import read_metrics
from mmfusion.training.run import RunDirectory

FILE = "sweep.json"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        number: from 1.
        values: of the recipe's keys.
        run: its directory.
    """

    number: int
    values: Mapping[str, Any]
    run: RunDirectory

    @property
    def overrides(self) -> list[str]:
        """For the command line; JSON, which is YAML and keeps types."""
        return [f"--{key}={_written(value)}" for key, value in self.values.items()]

    @property
    def state(self) -> str:
        """As `mmfusion runs` says it; ``waiting`` where it was never begun."""
        begun = self.run.identity.is_file()
        return standing(self.run).state if begun else "waiting"

    def result(self, metric: str) -> float | None:
        """The last value of a metric, as W&B's sweeps take it."""
        file = self.run.path / "metrics.csv"
        rows = read_metrics(file) if file.is_file() else []
        found = [row[metric] for row in rows if metric in row]
        return found[-1] if found else None


def trials_of(folder: Path, values: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """A directory each, in a sweep's."""
    return [
        Trial(number, one, RunDirectory(folder / f"trial-{number:04d}"))
        for number, one in enumerate(values, 1)
    ]


def remember(folder: Path, about: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """Write what the sweep is, or compare with what it was: trials may be added, not changed.

    Raises:
        ValueError: naming what differs.
    """
    now = {**about, "trials": [dict(trial.values) for trial in trials]}
    now = json.loads(json.dumps(now))
    file = folder / FILE
    if file.is_file():
        before = json.loads(file.read_text())
        for key in about:
            if before.get(key) != now[key]:
                _refuse(folder, f"{key} was {before.get(key)!r} and is {now[key]!r}")
        for number, (old, new) in enumerate(zip(before["trials"], now["trials"], strict=False), 1):
            if old != new:
                _refuse(folder, f"trial {number} was {old} and is {new}")
        if len(before["trials"]) > len(now["trials"]):
            return  # fewer of the same are looked at; the others stay
    folder.mkdir(parents=True, exist_ok=True)
    with write_whole(str(file)) as written:
        written.write(json.dumps(now, indent=1).encode())


def _refuse(folder: Path, difference: str) -> None:
    raise ValueError(f"{folder} is another sweep: {difference}. Use another --run_dir.")


def table(trials: Sequence[Trial], space: Space) -> Table:
    """The best first; those without a result last."""
    found = [(trial, trial.result(space.metric)) for trial in trials]
    sign = -1 if space.maximize else 1

    def place(one: tuple[Trial, float | None]) -> tuple[bool, float]:
        value = one[1]
        return (value is None or value != value, sign * (value or 0.0))

    made = Table("trial", space.metric, "state", *(_short(key, space) for key in space.parameters))
    for trial, value in sorted(found, key=place):
        shown = "" if value is None else f"{value:.6g}"
        cells = [_written(trial.values[key]) for key in space.parameters]
        made.add_row(trial.run.path.name, shown, trial.state, *cells)
    return made


def _short(key: str, space: Space) -> str:
    """The last words of a key that tell it from the others."""
    words = key.split(".")
    for count in range(1, len(words)):
        short = ".".join(words[-count:])
        if sum(f".{other}".endswith(f".{short}") for other in space.parameters) == 1:
            return short
    return key


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
