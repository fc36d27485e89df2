"""``metrics.csv`` in the run directory, which every run writes, whatever else it logs to."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

STEP, ATTEMPT = "trainer/global_step", "trainer/attempt"


class MetricsCSV(Logger):
    """Appends metrics to ``metrics.csv``, a row a step.

    Rows are never lost: a resumed run appends, a new metric adds a column (the file is then
    rewritten aside and renamed). After a crash the steps since the checkpoint are logged again,
    under the next attempt.

    Args:
        run_dir: where ``metrics.csv`` is.
        attempt: which start of the run this is.
    """

    def __init__(self, run_dir: str | Path, attempt: int = 1) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self.attempt = attempt
        self._columns: list[str] | None = None
        self._last: dict[str, Any] | None = None
        self._offset = 0

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> int:
        return self.attempt

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved recipe is the run directory's config.yaml; nothing to add."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a row at once; what is logged for the step of the last row goes into that row."""
        row: dict[str, Any] = {
            STEP: step,
            ATTEMPT: self.attempt,
            **{key: float(value) for key, value in metrics.items() if key != STEP},
        }
        if self._columns is None:
            self._columns = self._open()
        merges = self._last is not None and self._last[STEP] == step
        if merges and self._last is not None:
            row = {**self._last, **row}
        if new := [key for key in row if key not in self._columns]:
            self._grow(new, without_last=merges)
            merges = False
        with self.path.open("r+b") as file:
            self._offset = file.seek(*((self._offset, os.SEEK_SET) if merges else (0, os.SEEK_END)))
            file.write(self._line(row))
            file.truncate()
        self._last = row

    def _line(self, row: Mapping[str, Any]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self._columns or (), lineterminator="\n").writerow(row)
        return text.getvalue().encode()

    def _open(self) -> list[str]:
        """Columns of the file so far; a row torn by a kill is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        if (whole := text.rfind(b"\n") + 1) < len(text):
            os.truncate(self.path, whole)
        with self.path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _grow(self, new: list[str], without_last: bool) -> None:
        rows = _complete_rows(self.path) if self.path.exists() else []
        rows = rows[:-1] if without_last else rows
        self._columns = [*(self._columns or []), *new]
        aside = self.path.with_name(".metrics.csv.tmp")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)


def read_metrics(path: str | Path, all_attempts: bool = False) -> list[dict[str, float]]:
    """The rows of a ``metrics.csv``, empty cells left out; a torn last row is ignored.

    Args:
        path: the file.
        all_attempts: keep also the rows a later attempt of the run logged again.
    """
    rows = [
        {key: float(value) for key, value in row.items() if value}
        for row in _complete_rows(Path(path))
    ]
    if all_attempts:
        return rows
    first_step: dict[float, float] = {}
    for row in rows:
        attempt, step = row[ATTEMPT], row.get(STEP, 0.0)
        first_step[attempt] = min(step, first_step.get(attempt, step))
    return [
        row
        for row in rows
        if all(
            row.get(STEP, 0.0) < start
            for attempt, start in first_step.items()
            if attempt > row[ATTEMPT]
        )
    ]


def _complete_rows(path: Path) -> list[dict[str, str]]:
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
