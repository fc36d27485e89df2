"""The CSV keeps every row."""

from __future__ import annotations

import csv
from pathlib import Path

from mmfusion.training.loggers import MetricsCSV, read_metrics


def test_csv_appends_over_resumes_and_grows_columns(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path, attempt=1)
    first.log_metrics({"train/loss": 2.0}, step=1)
    first.log_metrics({"train/loss": 1.5, "val/loss": 3.0}, step=2)
    first.log_metrics({"train/loss": 9.0}, step=3)
    MetricsCSV(tmp_path, attempt=2).log_metrics({"train/loss": 1.25, "new": 7.0}, step=3)
    rows = read_metrics(tmp_path / "metrics.csv", all_attempts=True)
    assert [row["train/loss"] for row in rows] == [2.0, 1.5, 9.0, 1.25]
    assert rows[1]["val/loss"] == 3.0
    assert "val/loss" not in rows[0]
    assert rows[3] == {
        "trainer/global_step": 3.0,
        "trainer/attempt": 2.0,
        "train/loss": 1.25,
        "new": 7.0,
    }
    assert [row["train/loss"] for row in read_metrics(tmp_path / "metrics.csv")] == [2.0, 1.5, 1.25]


def test_csv_merges_what_is_logged_for_one_step(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1.0, "b": 0.125}, step=0)
    logger.log_metrics({"a": 2.0}, step=1)
    logger.log_metrics({"b": 0.25}, step=1)
    logger.log_metrics({"c": 3.0}, step=1)
    logger.log_metrics({"a": 4.0, "c": 1}, step=2)
    logger.log_metrics({"c": 12345.0}, step=2)
    rows = read_metrics(tmp_path / "metrics.csv")
    values = [[row.get(key) for key in "abc"] for row in rows]
    assert values == [[1.0, 0.125, None], [2.0, 0.25, 3.0], [4.0, None, 12345.0]]


def test_csv_row_torn_by_a_kill_is_cut_off(tmp_path: Path) -> None:
    MetricsCSV(tmp_path).log_metrics({"a": 1.5, "b": 2.5}, step=1)
    path = tmp_path / "metrics.csv"
    with path.open("a") as file:
        file.write("2,1,1.2")
    assert len(read_metrics(path)) == 1
    MetricsCSV(tmp_path, attempt=2).log_metrics({"a": 3.5, "b": 4.5}, step=2)
    with path.open() as file:
        assert [row["a"] for row in csv.DictReader(file)] == ["1.5", "3.5"]
